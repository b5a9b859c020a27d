"""The same verdicts of every kind, whoever asks: main thread, other threads, processes, event loops, Ray actors."""

import asyncio
import functools
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from stillhouse.pipeline.problems import reasoning_gym_problems
from stillhouse.pipeline.verifiers.rows import judge_row

pytestmark = pytest.mark.slow

OWN_VERIFIER = """
def verify(answer, gold, entry):
    while answer == "for ever":
        pass
    return answer == gold[::-1]
"""
ADDS = "```python\nprint(sum(map(int, input().split())))\n```"
TESTS = [{"stdin": "1 2\n", "stdout": "3\n"}]
ASSERTS = {"tests": "assert add(1, 2) == 3", "entry_point": "add"}
(SUM,) = reasoning_gym_problems("chain_sum", split="train", size=1, seed=7, options={})
ENTRY = {"gold": None, "entry": json.loads(SUM.entry)}

# Of math, the first is decided in the process itself, the next two by the second opinion. A hang ends undecided.
ROWS = [
    ("math", {"gold": "x^2-1", "pred": "(x-1)(x+1)"}, "correct"),
    ("math", {"gold": "55", "pred": r"\sum_{k=1}^{10} k"}, "correct"),
    ("math", {"gold": "54", "pred": r"\sum_{k=1}^{10} k"}, "wrong"),
    ("choice", {"gold": "B", "pred": "(b)"}, "correct"),
    ("choice", {"gold": "B", "pred": "C"}, "wrong"),
    ("exact", {"gold": "New York", "pred": r"\boxed{New York}"}, "correct"),
    ("exact", {"gold": "New York", "pred": "York"}, "wrong"),
    ("number", {"gold": "1800 L", "pred": "1.8 m^3"}, "correct"),
    ("number", {"gold": "1800 L", "pred": "1.8 km"}, "wrong"),
    ("json", {"schema": {"type": "array"}, "pred": "```json\n[1]\n```"}, "correct"),
    ("json", {"gold": {"a": 1}, "pred": '{"a": 2}'}, "wrong"),
    ("regex", {"gold": "[ab]+", "pred": "abba"}, "correct"),
    ("regex", {"gold": "[ab]+", "pred": "abc"}, "wrong"),
    ("code", {"tests": TESTS, "pred": ADDS}, "correct"),
    ("code", {"tests": TESTS, "pred": ADDS.replace("sum", "max")}, "wrong"),
    ("code", {"tests": TESTS, "pred": "```python\nraise SystemExit(0)\n```"}, "wrong"),
    ("code", {**ASSERTS, "pred": "```python\ndef add(a, b): return a + b\n```"}, "correct"),
    ("code", {**ASSERTS, "pred": "```python\ndef add(a, b): return a\n```"}, "wrong"),
    ("reasoning_gym", {**ENTRY, "pred": rf"\boxed{{{SUM.answer}}}"}, "correct"),
    ("reasoning_gym", {**ENTRY, "pred": r"\boxed{1}"}, "wrong"),
    ("python:own_verifier_of_tests:verify", {"gold": "abc", "pred": "cba"}, "correct"),
    ("python:own_verifier_of_tests:verify", {"gold": "abc", "pred": "abc"}, "wrong"),
    ("math", {"gold": "5", "pred": r"\sum_{k=1}^{10^{12}} k^{k}"}, "hang"),
    ("regex", {"gold": "(a+)+b", "pred": "a" * 60}, "hang"),
    ("code", {"tests": TESTS, "pred": "```python\nwhile True: pass\n```"}, "hang"),
    ("python:own_verifier_of_tests:verify", {"gold": "abc", "pred": "for ever"}, "hang"),
]
EXPECTED = ["undecided" if outcome == "hang" else outcome for _, _, outcome in ROWS]
# Only what hangs gets a short time: a machine under load must not change a verdict of the others.
JUDGE = [functools.partial(judge_row, kind, row, timeout_s=0.7 if end == "hang" else 60) for kind, row, end in ROWS]


@pytest.fixture(scope="module", autouse=True)
def own_verifier(tmp_path_factory):
    """A user's own verifier where processes of every sort find it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_verifier_of_tests.py").write_text(OWN_VERIFIER)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
        yield


def unexpected(said):
    return [
        (kind, row["pred"], one["verdict"], one["reason"])
        for (kind, row, _), one, expected in zip(ROWS, said, EXPECTED, strict=True)
        if one["verdict"] != expected
    ]


def in_a_process(method):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as processes:
        return [one.result() for one in [processes.submit(judge) for judge in JUDGE]]


def in_a_daemon():
    with multiprocessing.get_context("spawn").Pool(1) as processes:  # a pool's processes are daemons
        return [processes.apply(judge) for judge in JUDGE]


def in_threads():
    with ThreadPoolExecutor(3) as threads:
        return [one.result() for one in [threads.submit(judge) for judge in JUDGE]]


def in_an_event_loop():
    """In a coroutine, with its loop in a thread of its own."""

    async def judge_all():
        return [judge() for judge in JUDGE]

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(asyncio.run, judge_all()).result()


def beside_an_event_loop():
    async def judge_all():
        return await asyncio.gather(*(asyncio.to_thread(judge) for judge in JUDGE))

    return asyncio.run(judge_all())


@pytest.mark.parametrize(
    "judged",
    [
        pytest.param(lambda: [judge() for judge in JUDGE], id="main thread"),
        pytest.param(in_threads, id="threads"),
        pytest.param(functools.partial(in_a_process, "spawn"), id="spawned process"),
        pytest.param(functools.partial(in_a_process, "fork"), id="forked process"),
        pytest.param(in_a_daemon, id="daemon process"),
        pytest.param(in_an_event_loop, id="event loop"),
        pytest.param(beside_an_event_loop, id="beside an event loop"),
    ],
)
def test_the_verdict_does_not_depend_on_who_asks(judged):
    """verl scored every answer 0 because math-verify raises off the main thread."""
    assert not unexpected(judged())


def test_ray_actors_give_the_same_verdicts():
    """A Ray actor's methods run in its main thread, an asynchronous one's in another; the verdicts of a run must not tell."""
    import ray

    class Judge:
        def judge(self, tasks):
            return [task() for task in tasks]

    class AsyncJudge:
        async def judge(self, tasks):
            return [task() for task in tasks]

    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    try:
        actor = ray.remote(num_cpus=0)(Judge).remote()
        asynchronous = ray.remote(num_cpus=0)(AsyncJudge).remote()
        for said in (actor.judge.remote(JUDGE), asynchronous.judge.remote(JUDGE)):
            assert not unexpected(ray.get(said, timeout=200))
    finally:
        ray.shutdown()
