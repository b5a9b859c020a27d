"""A real S3 server (moto's) in a process of its own, on request one that ignores If-None-Match like backends of old.

``python -m tests.chaos.s3_server [--ignore-if-none-match]`` prints its URL and serves until its standard input closes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

BUCKET = "traces"
_KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def running_s3_server(*, honours_if_none_match: bool) -> Iterator[dict[str, str]]:
    """A server with an empty bucket ``traces``; gives the variables by which a client finds it."""
    flags = [] if honours_if_none_match else ["--ignore-if-none-match"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.s3_server", *flags],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), "the S3 server did not start"
        yield _KEYS | {"AWS_ENDPOINT_URL": url}
    finally:
        process.kill()
        process.wait()


def serve(*, honours_if_none_match: bool) -> None:
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)

    one_put = threading.Lock()

    def answer(environ, start_response):
        if environ["REQUEST_METHOD"] != "PUT":
            return application(environ, start_response)
        if not honours_if_none_match:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        with one_put:  # moto looks and then writes: two threads would both find nothing there, which S3 never does
            return application(environ, start_response)

    server = make_server("127.0.0.1", 0, answer, threaded=True)
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ.update(_KEYS)
    boto3.client("s3", endpoint_url=url).create_bucket(Bucket=BUCKET)
    print(url, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(honours_if_none_match="--ignore-if-none-match" not in sys.argv)
