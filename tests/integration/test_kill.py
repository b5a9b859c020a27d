"""kill -9 of the whole process tree, in five stages, and the same command again: it finishes and pays for nothing twice."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from stillhouse.pipeline.records import Trace
from stillhouse.pipeline.report import read_report
from stillhouse.pipeline.store import RunStore
from stillhouse.pipeline.trace_store.live import look_into_spool
from stillhouse.pipeline.trace_store.store import TraceStore
from tests.small_demo import small_demo

NUM_PLANNED, BATCH, NUM_ACTORS = 96, 16, 2


def num_answers(run: Path) -> int:
    """Traces on disk, sealed or not, of a run that may be writing more."""
    spool = look_into_spool(run / "traces" / "spool")
    return spool.totals.num_answered if spool else 0


POINTS: dict[str, Callable[[Path], bool]] = {
    "first traces": lambda run: num_answers(run) >= BATCH,
    "more traces": lambda run: num_answers(run) >= 4 * BATCH,
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
    store = TraceStore(run / "traces")
    keys = [trace.key for trace in store.traces()]
    assert len(keys) == len(set(keys)) == store.num_rows == NUM_PLANNED
    totals = store.totals()
    # Two of the kills fell into the traces stage; each can have cost a batch an actor.
    assert NUM_PLANNED <= totals.num_calls <= NUM_PLANNED + 2 * NUM_ACTORS * BATCH
    assert totals.num_answered == NUM_PLANNED
    results = read_report(run / "report.json").results
    assert results.num_generated == totals.num_calls
    assert results.num_lost_in_flight == totals.num_lost == totals.num_calls - NUM_PLANNED
    assert results.cost.num_kept == len(RunStore(run).read("kept", Trace))
    assert [point.step for point in results.loss] == list(range(1, 13))
