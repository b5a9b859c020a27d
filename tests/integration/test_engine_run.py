"""A recipe whose teacher is an engine's own server, started by Ray: the same stages, and right answers."""

from __future__ import annotations

import json

import pytest

from stillhouse.pipeline.trace_store.store import TraceStore
from tests.small_demo import SMALL_DEMO, command

NUM_PROBLEMS = 12
TEACHER = {
    "kind": "transformers_serve",
    "model": "tiny",
    "dtype": "float32",
    "sampling": {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 160},
    "opens_think": False,
}
SETTINGS = (
    *(value for value in SMALL_DEMO if not value.startswith(("teacher.", "problems.train"))),
    *(f"problems.train.{family}.size={NUM_PROBLEMS // 3}" for family in range(3)),
    "cluster.num_teacher_actors=1",
    f"teacher={json.dumps(TEACHER)}",
)


def call(verb: str, *flags: str) -> list[str]:
    return command(verb, "demo", *flags, *(part for value in SETTINGS for part in ("--set", value)))


@pytest.mark.slow
def test_traces_come_from_a_server_that_ray_started(stillhouse, tmp_path):
    """A recipe that runs in process on a laptop would not run on an engine, or its traces would not verify."""
    out = str(tmp_path / "run")
    planned = stillhouse(*call("plan"))
    assert "python -m transformers.cli.transformers serve" in planned.stdout
    done = stillhouse(*call("generate", "--out", out))
    assert done.returncode == 0, done.stderr
    traces = list(TraceStore(tmp_path / "run" / "traces").traces())
    assert len(traces) == NUM_PROBLEMS
    assert all(trace.reasoning for trace in traces if trace.finish_reason == "stop")
    assert stillhouse(*call("filter", "--out", out)).returncode == 0
    kept = json.loads((tmp_path / "run" / "stages" / "filter.json").read_text())["counts"]["num_kept"]
    # The tiny teacher is right nine times in ten; four duplicates and wrong ones of twelve are bad luck, seven are a defect.
    assert kept > NUM_PROBLEMS // 2
