"""Handing a job to a cluster that is not ready, over HTTP with Ray's own client."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from stillhouse.jobs.submit import _hand_over

# Word for word what the dashboard of Ray 2.5x answers while no node's agent has registered (dashboard/modules/job/job_head.py).
NOT_YET = "No available agent to submit job, please try again later."
JOB = {"submission_id": "stillhouse-demo-1", "entrypoint": "true"}


@pytest.fixture
def dashboard():
    """A dashboard that answers submissions by the list ``answers``, its last entry for ever; notes what it was asked."""
    answers, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self):
            self.reply(200, json.dumps({"version": "4", "ray_version": "2.50.0", "ray_commit": "", "session_name": "s"}))

        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["submission_id"])
            self.reply(*(answers.pop(0) if len(answers) > 1 else answers[0]))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers, asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(dashboard):
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(dashboard[0])


def test_a_cluster_that_has_just_started_is_waited_for(dashboard, client):
    """A script that starts a cluster and submits at once would fail, or not, by the machine's speed."""
    _, answers, asked = dashboard
    answers += [(500, NOT_YET), (500, NOT_YET), (200, json.dumps({"job_id": "1", "submission_id": JOB["submission_id"]}))]
    said = []
    _hand_over(client, JOB, said.append, pause_s=0.01)
    assert asked == [JOB["submission_id"]] * 3
    assert said == ["stillhouse: the cluster has no agent yet that takes jobs; trying again for 120 s\n"]


def test_a_cluster_that_never_takes_jobs_and_one_that_refuses_this_one_are_errors(dashboard, client):
    """Waiting for ever would hide a broken cluster; asking again about a refusal would only delay it."""
    _, answers, asked = dashboard
    answers.append((500, NOT_YET))
    with pytest.raises(RuntimeError, match="No available agent"):
        _hand_over(client, JOB, [].append, patience_s=0.1, pause_s=0.01)
    asked.clear()
    answers[:] = [(400, "ValueError: no such thing")]
    with pytest.raises(RuntimeError, match="no such thing"):
        _hand_over(client, JOB, [].append)
    assert len(asked) == 1
