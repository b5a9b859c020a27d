"""The traces stage against a real HTTP teacher that refuses in the middle: what was paid for is kept, and not asked again."""

from __future__ import annotations

import json

import pytest

from stillhouse.jobs.sources import resolve_teacher
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.teachers.local import TransformersGenerator
from tests.chat_server import ChatServer, changed, status
from tests.small_demo import SMALL_DEMO, command

NUM_TRACES, IN_FLIGHT, NUM_ANSWERED = 24, 8, 11


@pytest.fixture(scope="module")
def server():
    """The shipped tiny teacher behind an OpenAI-compatible endpoint."""
    with ChatServer(TransformersGenerator(resolve_teacher("tiny"), dtype="float32")) as running:
        yield running


def generate(server, out) -> list[str]:
    """The small demo's ``generate`` with the endpoint as its teacher."""
    teacher = {
        "kind": "endpoint",
        "base_url": server.base_url,
        "model": "tiny",
        "api_key_env": "TEACHER_KEY",
        "max_concurrent": IN_FLIGHT,
        "samples_per_problem": 1,
        "sampling": {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 160},
        "opens_think": False,
    }
    # The demo's other teacher settings belong to an in-process model.
    kept = [value for value in SMALL_DEMO if not value.startswith(("teacher.", "problems.train"))]
    sizes = [f"problems.train.{family}.size={NUM_TRACES // 3}" for family in range(3)]
    settings = [part for value in (*kept, *sizes, f"teacher={json.dumps(teacher)}") for part in ("--set", value)]
    return command("generate", "demo", "--out", str(out), *settings)


@pytest.mark.slow
def test_a_refusal_in_the_middle_keeps_what_was_answered(server, stillhouse, tmp_path, environment, monkeypatch):
    """A key that runs out of credit must cost nothing that was answered before, and the same command goes on from there."""
    monkeypatch.setitem(environment, "TEACHER_KEY", "canary-0b5f")
    out = tmp_path / "run"
    whole = changed(lambda answer: answer)
    server.faults = [whole] * NUM_ANSWERED
    server.fault_for_all = status(402, text="out of credit")
    stopped = stillhouse(*generate(server, out))
    assert stopped.returncode == 4, stopped.stderr
    assert "402" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    answered = {trace.key for trace in TraceStore(out / "traces").traces()}
    assert len(answered) == NUM_ANSWERED

    before = len(server.requests)
    server.fault_for_all = None
    done = stillhouse(*generate(server, out))
    assert done.returncode == 0, done.stderr
    assert len(server.requests) - before == NUM_TRACES - NUM_ANSWERED
    traces = list(TraceStore(out / "traces").traces())
    assert len(traces) == len({trace.key for trace in traces}) == NUM_TRACES
    assert answered < {trace.key for trace in traces}
    assert any(trace.reasoning for trace in traces)
    counts = json.loads((out / "stages" / "traces.json").read_text())["counts"]
    assert counts["num_answered"] == counts["num_traces"] == NUM_TRACES
    assert counts["num_calls"] == NUM_TRACES + counts["num_failed"]
    assert counts["num_lost"] == 0
    for path in out.rglob("*"):
        if path.is_file():
            assert b"canary-0b5f" not in path.read_bytes(), path
    assert "canary-0b5f" not in stopped.stderr + done.stderr
