"""A real S3-compatible server (moto's) behind a small proxy that can behave as other object stores do."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"


class S3Proxy(ThreadingHTTPServer):
    """Forwards to an S3 server. Set the attributes at any time.

    Args:
        conditional: False takes ``If-None-Match`` off, as stores do that have never heard of it; True passes conditional
            PUTs on one at a time, because moto looks and writes in two steps where S3 does both in one.
    """

    daemon_threads = True

    def __init__(self, port: int, *, conditional: bool):
        super().__init__(("127.0.0.1", 0), Forward)
        self.upstream_port = port
        self.conditional = conditional
        self.refuse: tuple[int, str, str] | None = None
        """Answer every request with this status, code and message."""
        self.refuse_conditions = False
        """Answer 501 to conditional PUTs."""
        self.lose_replies = 0
        """Pass that many conditional PUTs on and break the connection instead of replying."""
        self.one_at_a_time = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # without these two every answer waits 40 ms for an acknowledgement
    wbufsize = 1 << 16
    server: S3Proxy

    def handle_expect_100(self) -> bool:
        go_on = super().handle_expect_100()
        self.wfile.flush()
        return go_on

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        condition = self.headers.get("If-None-Match") is not None
        if self.server.refuse is not None:
            self.reply_error(*self.server.refuse)
            return
        if condition and self.server.refuse_conditions:
            self.reply_error(501, "NotImplemented", "A header you provided implies functionality that is not implemented")
            return
        if condition and not self.server.conditional:
            del self.headers["If-None-Match"]
        with self.server.one_at_a_time if condition else contextlib.nullcontext():
            status, headers, answer = self.forward(body)
        if condition and self.server.lose_replies > 0:
            self.server.lose_replies -= 1
            self.close_connection = True
            return
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(answer)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one

    def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream_port, timeout=60)
        try:
            upstream.request(self.command, self.path, body=body, headers=dict(self.headers.items()))
            reply = upstream.getresponse()
            return reply.status, reply.getheaders(), reply.read()
        finally:
            upstream.close()

    def reply_error(self, status: int, code: str, message: str) -> None:
        answer = ERROR.format(code, message).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def running_s3() -> Iterator[int]:
    """A moto server on a free port of this machine; yields the port."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


@contextlib.contextmanager
def running_proxy(port: int, *, conditional: bool) -> Iterator[S3Proxy]:
    """A proxy before the S3 server at ``port``."""
    proxy = S3Proxy(port, conditional=conditional)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
