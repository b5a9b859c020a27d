"""The same verdict from the main thread, another thread, another process and a Ray actor."""

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from stillhouse.pipeline.verifiers.rows import judge_row

# The first is decided in the process itself, the second and third by the second opinion, the last by nobody.
ROWS = [
    {"gold": "x^2-1", "pred": "(x-1)(x+1)"},
    {"gold": "55", "pred": r"\sum_{k=1}^{10} k"},
    {"gold": "54", "pred": r"\sum_{k=1}^{10} k"},
    {"gold": "5", "pred": r"\sum_{k=1}^{10^{12}} k^{k}"},
]
EXPECTED = ["correct", "correct", "wrong", "undecided"]
judged = functools.partial(judge_row, "math", timeout_s=3)


def verdicts(said):
    return [one["verdict"] for one in said]


@pytest.mark.slow
def test_the_verdict_does_not_depend_on_who_asks():
    """verl scored every answer 0 because math-verify raises off the main thread; a Ray actor's methods run there."""
    import ray

    assert verdicts(map(judged, ROWS)) == EXPECTED
    with ThreadPoolExecutor(2) as threads:
        assert verdicts(threads.map(judged, ROWS)) == EXPECTED
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        assert verdicts(processes.map(judged, ROWS)) == EXPECTED

    class Judge:
        def judge(self, judged, rows):
            return [judged(row) for row in rows]

        def judge_in_a_thread(self, judged, rows):
            with ThreadPoolExecutor(1) as threads:
                return list(threads.map(judged, rows))

    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    try:
        judge = ray.remote(Judge).remote()
        assert verdicts(ray.get(judge.judge.remote(judged, ROWS), timeout=120)) == EXPECTED
        assert verdicts(ray.get(judge.judge_in_a_thread.remote(judged, ROWS), timeout=120)) == EXPECTED
    finally:
        ray.shutdown()
