"""kill -9 of the whole process tree, in five stages, and the same command again: it finishes and pays for nothing twice."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from stillhouse.pipeline.records import Trace
from stillhouse.pipeline.report import read_report
from stillhouse.pipeline.store import RunStore
from tests.small_demo import small_demo

NUM_PLANNED, BATCH, NUM_ACTORS = 96, 16, 2

POINTS: dict[str, Callable[[Path], bool]] = {
    "first traces": lambda run: len(list(run.glob("traces/part-*"))) >= 1,
    "more traces": lambda run: len(list(run.glob("traces/part-*"))) >= 4,
    "filtered": lambda run: (run / "stages" / "filter.json").exists(),
    "training": lambda run: bool(list(run.glob("train/*/checkpoints/checkpoint-*"))),
    "evaluating": lambda run: (run / "stages" / "quantize.json").exists(),
}
"""When to kill, in the order in which a run gets there."""


def kill_when(reached: Callable[[Path], bool], run: Path, environment: dict[str, str]) -> None:
    """Start the run, wait for the point, and kill the process with all that descends from it."""
    with (run.parent / "log.txt").open("a") as log:
        process = subprocess.Popen(small_demo(run), cwd=run.parent, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 300
            while not reached(run):
                assert process.poll() is None, (run.parent / "log.txt").read_text()[-2000:]
                assert time.monotonic() < deadline, "the point was not reached"
                time.sleep(0.02)
        finally:
            victims = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for victim in victims:
                try:
                    victim.kill()
                except psutil.NoSuchProcess:
                    continue
            process.wait()
            psutil.wait_procs(victims, timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_five_times_finishes_and_pays_for_no_committed_trace_twice(tmp_path, environment):
    """A crash must cost at most what was in flight."""
    run = tmp_path / "demo"
    for reached in POINTS.values():
        kill_when(reached, run, environment)
    done = subprocess.run(
        small_demo(run), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    store = RunStore(run)
    keys = [trace.key for trace in store.read("traces", Trace)]
    assert len(keys) == len(set(keys)) == NUM_PLANNED
    begun = [key for path in (run / "traces" / "ledger").glob("*.json") for key in json.loads(path.read_text())["keys"]]
    # Two of the kills fell into the traces stage; each can have cost a batch an actor.
    assert NUM_PLANNED <= len(begun) <= NUM_PLANNED + 2 * NUM_ACTORS * BATCH
    results = read_report(run / "report.json").results
    assert results.num_generated == len(begun)
    assert results.num_lost_in_flight == len(begun) - NUM_PLANNED
    assert [point.step for point in results.loss] == list(range(1, 13))
