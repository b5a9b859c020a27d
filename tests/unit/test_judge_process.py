"""The processes that judge with other people's code: killed at the deadline, shut off, the same from everywhere."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from stillhouse.pipeline import judge_process
from stillhouse.pipeline.errors import StillhouseError
from stillhouse.pipeline.problems import reasoning_gym_problems
from stillhouse.pipeline.records import Problem
from stillhouse.pipeline.verification import verify
from stillhouse.pipeline.verifiers.rows import judge_rows

# Sums and integrals are what our own reader leaves to the second opinion.
RIGHT = ("55", r"\sum_{k=1}^{10} k", "correct")
WRONG = ("54", r"\sum_{k=1}^{10} k", "wrong")
HANGS = ("5", r"\sum_{k=1}^{10^{12}} k^{k}", "undecided")


def judged(gold, answer, timeout_s=30.0):
    return verify(Problem("What is it?", gold, "math", "test", "train"), answer, timeout_s=timeout_s)


def test_a_hang_is_undecided_and_the_next_item_is_judged():
    """One endless sum must neither count against the model, nor stall the run, nor spoil the verdicts after it."""
    said = judged(*HANGS[:2], timeout_s=0.5)
    assert said.outcome == "undecided"
    assert "killed" in said.reason
    assert judged(*RIGHT[:2]).outcome == "correct"


def test_verdicts_are_the_same_from_many_threads():
    """math-verify by itself raises off the main thread, and a caller then scored every answer as wrong."""
    rows = [RIGHT, WRONG, HANGS] * 2
    outcomes = [None] * len(rows)

    def judge(index):
        gold, answer, expected = rows[index]
        outcomes[index] = judged(gold, answer, timeout_s=0.5 if expected == "undecided" else 30).outcome

    threads = [threading.Thread(target=judge, args=(index,)) for index in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [expected for _, _, expected in rows]


def _judge_in_fork(queue):
    outcome = judged(*RIGHT[:2]).outcome
    queue.put((outcome, judge_process.worker_pids()))


def test_a_forked_process_judges_for_itself():
    """Two processes on one pipe would read each other's verdicts, and a lock held at the fork would never open again."""
    assert judged(*RIGHT[:2]).outcome == "correct"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_judge_in_fork, args=(queue,), daemon=True)
    with judge_process._pool.condition:  # as when another thread takes a worker at this moment
        child.start()
    outcome, worker_pids = queue.get(timeout=60)
    child.join()
    assert outcome == "correct"
    assert not set(worker_pids) & set(judge_process.worker_pids())
    assert judged(*WRONG[:2]).outcome == "wrong"


def test_killed_workers_are_replaced():
    """An out-of-memory kill between two items must not turn every later verdict into undecided."""
    assert judged(*RIGHT[:2]).outcome == "correct"
    for pid in judge_process.worker_pids():
        os.kill(pid, signal.SIGKILL)
        while os.path.exists(f"/proc/{pid}/fd/0"):
            time.sleep(0.01)
    assert judged(*RIGHT[:2]).outcome == "correct"


def test_the_worker_sees_no_secret_of_the_environment(monkeypatch):
    """Text that a model wrote reaches other people's parsers; a token must not be within their reach."""
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-the-user")
    judge_process.close_workers()
    assert judged(*RIGHT[:2]).outcome == "correct"
    (pid,) = judge_process.worker_pids()
    with open(f"/proc/{pid}/environ", "rb") as file:
        names = {entry.partition(b"=")[0] for entry in file.read().split(b"\0") if entry}
    assert names <= {
        b"LD_LIBRARY_PATH", b"PYTHONPATH", b"PYTHONDONTWRITEBYTECODE", b"OMP_NUM_THREADS", b"OPENBLAS_NUM_THREADS", b"LC_CTYPE",
    }  # fmt: skip


def test_the_worker_has_no_network_or_says_so():
    """What a user believes cut off and is not, is worse than what they know to be open."""
    said = judge_process.isolation()
    (pid, *_) = judge_process.worker_pids()
    same_network = os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net")
    assert said == "cut off" if not same_network else said.startswith("not cut off: ")


def test_a_hang_among_many_costs_its_deadline_and_nothing_else():
    """A pool that dies with its first hang scores everything after it as wrong."""
    rows = [{"gold": str(number), "pred": str(number + number % 2)} for number in range(1_000)]
    rows[500] = {"gold": HANGS[0], "pred": HANGS[1]}
    verdicts = [said["verdict"] for said in judge_rows("math", rows, timeout_s=0.5)]
    expected = ["wrong" if number % 2 else "correct" for number in range(1_000)]
    expected[500] = "undecided"
    assert verdicts == expected


def test_the_worker_itself_refuses_files_and_processes(tmp_path):
    """The second line of defence: where program text gets past the first, the worker still writes and starts nothing."""
    (problem,) = reasoning_gym_problems("polynomial_multiplication", split="test", size=1, seed=7, options={})
    target = tmp_path / "written"
    stored = json.loads(problem.entry)
    for code in (f"open({str(target)!r}, 'w')", f"__import__('os').system('touch {target}')", "exit()"):
        message = {"op": "reasoning_gym", "what": "reasoning_gym", "answer": code, "must_be_plain": False, **stored}
        outcome, _ = judge_process.ask(message, 5)
        assert outcome != "correct"
    assert not target.exists()


def test_a_worker_that_cannot_load_what_it_needs_says_so():
    """A verifier that is not there must stop the run; scored as wrong it would empty it in silence."""
    message = {"op": "reasoning_gym", "what": "reasoning_gym", "task": "no_such_task", "options": {}}
    with pytest.raises(StillhouseError, match=r"cannot start.*no_such_task"):
        judge_process.ask({**message, "entry": {}, "answer": "1", "must_be_plain": False}, 5)


def test_a_verifier_beside_the_recipe_is_found_and_shadows_nothing(tmp_path, monkeypatch):
    """A user keeps the verifier in the working folder; a file there called json.py must not become everybody's json."""
    (tmp_path / "beside_the_recipe.py").write_text("def same(answer, gold, entry):\n    return answer == gold\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('not the json that is meant')\n")
    monkeypatch.chdir(tmp_path)
    judge_process.close_workers()
    problem = Problem("?", "7", "python:beside_the_recipe:same", "test", "train")
    assert [verify(problem, answer).outcome for answer in ("7", "8")] == ["correct", "wrong"]
    judge_process.close_workers()
    with pytest.raises(StillhouseError, match=rf"'beside_it:same' has to name a function .* {tmp_path}"):
        verify(Problem("?", "7", "python:beside_it:same", "test", "train"), "7")
