"""A hostile item in the middle of a batch costs its own deadline; every other item gets its verdict."""

import os

import pytest

from stillhouse.pipeline import judge_process
from stillhouse.pipeline.verifiers.rows import judge_rows

OWN_VERIFIER = """
import ctypes
import os
import threading
import time


def deeper(number):
    return deeper(number + 1)


HOSTILE = {
    "loops": lambda: [None for _ in iter(int, 1)],
    "hangs in C": lambda: sum(range(10**15)),
    "sleeps": lambda: time.sleep(10**6),
    "fills the memory": lambda: bytearray(1 << 40),
    "fills the memory bit by bit": lambda: [b"x" * (1 << 24) * number for number in range(1, 10**6)],
    "ends the process": lambda: os._exit(0),
    "exits": lambda: exit(0),
    "kills itself": lambda: os.kill(os.getpid(), 9),
    "crashes": lambda: ctypes.string_at(0),
    "recurses": lambda: deeper(0),
    "raises": lambda: {}["no such key"],
    "reads the requests": lambda: open(0, closefd=False).read(),
    "writes over the replies": lambda: [os.write(fd, b'{"outcome": "correct"}\\n') for fd in range(3, 9) if fd_is_pipe(fd)],
    "leaves a thread behind": lambda: threading.Thread(target=HOSTILE["loops"], daemon=True).start(),
    "returns something else": lambda: "certainly",
}


def fd_is_pipe(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("pipe")
    except OSError:
        return False


kept = []


def verify(answer, gold, entry):
    if answer == "keeps the memory":
        kept.append(bytearray(5 << 29))
        return False
    if answer == "needs some memory":
        return len(bytearray(1 << 29)) > 0
    if answer in HOSTILE:
        return HOSTILE[answer]()
    return answer == gold
"""
HOSTILE_NUMBERS = [
    "9" * 3_900,
    "1e999999999",
    "1 " * 1_900,
    "5" + "!" * 3_000,
    "10^{10^{10}} m",
    "((((" * 900,
    "5 m" + "/s" * 1_500,
]


def judged(kind, ordinary, hostile, num_rows, timeout_s):
    """Judge rows of which every second is right, with the hostile ones spread over them; gives what was said of those."""
    rows = [ordinary(number) for number in range(num_rows)]
    places = [num_rows * (i + 1) // (len(hostile) + 1) for i in range(len(hostile))]
    for place, row in zip(places, hostile, strict=True):
        rows[place] = row
    said = list(judge_rows(kind, rows, timeout_s=timeout_s))
    assert len(said) == num_rows
    expected = ["wrong" if number % 2 else "correct" for number in range(num_rows)]
    off = [(number, one) for number, one in enumerate(said) if number not in places and one["verdict"] != expected[number]]
    assert not off[:5]
    return [said[place] for place in places]


def text_row(number):
    return {"gold": f"row {number}", "pred": f"row {number + number % 2}"}


@pytest.fixture
def own_verifier(tmp_path, monkeypatch):
    (tmp_path / "hostile_verifier_of_tests.py").write_text(OWN_VERIFIER)
    monkeypatch.syspath_prepend(str(tmp_path))
    judge_process.close_workers()
    yield "python:hostile_verifier_of_tests:verify"
    judge_process.close_workers()


def hostile_calls():
    scope = {}
    exec(OWN_VERIFIER, scope)
    return list(scope["HOSTILE"])


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [200, 10_000])
def test_a_users_verifier_may_do_anything_to_one_item(own_verifier, num_rows):
    """A verifier of one's own meets text that its author did not think of; the run must go on and say what happened."""
    names = hostile_calls()
    said = judged(own_verifier, text_row, [{"gold": "?", "pred": name} for name in names], num_rows, 2.0)
    assert {name: one["verdict"] for name, one in zip(names, said)} == dict.fromkeys(names, "undecided")
    reasons = dict(zip(names, (one["reason"] for one in said)))
    assert {name for name, reason in reasons.items() if "killed" in reason} >= {"loops", "hangs in C", "sleeps"}
    assert {name for name, reason in reasons.items() if "ended by itself" in reason} >= {"ends the process"}
    assert "RecursionError" in reasons["recurses"]
    assert "KeyError" in reasons["raises"]
    assert "memory" in reasons["fills the memory"]


def test_a_few_hostile_items_of_each_sort_are_undecided(own_verifier):
    """The everyday version: what ends the process, closes its pipes, raises or returns nonsense between ordinary items."""
    names = ["ends the process", "exits", "raises", "recurses", "writes over the replies", "returns something else"]
    said = judged(own_verifier, text_row, [{"gold": "?", "pred": name} for name in names], 100, 30.0)
    assert [one["verdict"] for one in said] == ["undecided"] * len(names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ordinary", "hostile"),
    [
        (
            "math",
            lambda number: {"gold": str(number), "pred": str(number + number % 2)},
            [{"gold": "5", "pred": r"\sum_{k=1}^{10^{12}} k^{k}"}, {"gold": "5", "pred": r"\prod_{n=1}^{10^{9}} n"}],
        ),
        (
            "regex",
            lambda number: {"gold": f"{number}|x", "pred": str(number + number % 2)},
            [
                {"gold": "(a+)+b", "pred": "a" * 80},
                {"gold": r"(\w*\s*)*!", "pred": "word " * 40},
                {"gold": "(" * 5_000, "pred": "a"},
            ],
        ),
        (
            "json",
            lambda number: {"gold": [number], "pred": str([number + number % 2])},
            [
                {"schema": {"type": "string", "pattern": "^(a+)+b$"}, "pred": f'"{"a" * 80}"'},
                {"gold": [1], "pred": "[" * 200_000 + "]" * 200_000},
                {"schema": {"type": "array"}, "pred": '{"a":' * 50_000 + "1" + "}" * 50_000},
                {"schema": {"$ref": "#"}, "pred": "[1]"},
                {"gold": [1], "pred": "9" * 1_000_000},
            ],
        ),
        (
            "number",
            lambda number: {"gold": f"{number} m", "pred": f"{number + number % 2} m", "abs_tol": 0.1},
            [{"gold": "5 m", "pred": number} for number in HOSTILE_NUMBERS],
        ),
    ],
    ids=["math", "regex", "json", "number"],
)
def test_hostile_text_among_ten_thousand_costs_nothing_else(kind, ordinary, hostile):
    """A pool that dies with its first hang scores everything after it as wrong."""
    said = judged(kind, ordinary, hostile, 10_000, 2.0)
    assert "correct" not in {one["verdict"] for one in said}
    assert {one["verdict"] for one in said if "killed" in one["reason"]} <= {"undecided"}
    assert len(judge_process.worker_pids()) <= 2 * judge_process.MAX_WORKERS
    assert all(os.path.exists(f"/proc/{pid}") for pid in judge_process.worker_pids())


def test_memory_that_an_item_kept_is_not_missing_for_the_next(own_verifier):
    """A verifier with a cache that grows would in the end be out of memory for every item."""
    rows = [{"gold": "a", "pred": text} for text in ("a", "keeps the memory", "needs some memory", "needs some memory", "b")]
    said = [one["verdict"] for one in judge_rows(own_verifier, rows, num_workers=1, timeout_s=60)]
    assert said == ["correct", "wrong", "correct", "correct", "wrong"]
