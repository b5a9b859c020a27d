"""The code verifier: what counts as a program, as the same output, as correct, wrong and undecided."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import fractions
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.sandbox.choice import chosen_sandbox
from stillhouse.pipeline.sandbox.crossing import CannotCross, decode, encode, overwrite
from stillhouse.pipeline.sandbox.probe import probed
from stillhouse.pipeline.sandbox.records import SandboxUnavailable
from stillhouse.pipeline.sandbox.service import SandboxService
from stillhouse.pipeline.verifiers.code import normalised, program_of, verify_code, verify_program
from tests.harness.attack_table import sections
from tests.harness.scoring_cheats import cheats, judge


@pytest.fixture(scope="module")
def sandbox():
    found = probed()
    if found.tier != "strict":
        pytest.skip(f"no strict sandbox on this machine: {found.missing}")


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("<think>x</think>\n```python\nprint(1)\n```", "print(1)\n"),
        ("<think>x</think>\n```python\na\n```\nor better\n```python\nb\n```\nwhich prints\n```\n1\n```", "b\n"),
        ("<think>\n```python\na\n```\n</think>\nI would say so.", None),
        ("<think>\n```python\na\n```", None),
        ("<think>x</think>\n```python\nnever closed", None),
        ("<think>x</think>\n```\nprint(1)\n```\nwhich prints\n```\n1\n```", "print(1)\n"),
        ("<think>x</think>\n```\nf(1)\n```\n```py\nprint(1)\n```\n```\ng(2)\n```", "print(1)\n"),
        ("<think>x</think>\nprint(1)", "\nprint(1)"),
        ("<think>x</think>\nI would say so.", None),
        ("~~~python\nprint(1)\n~~~", "print(1)\n"),
        ("````python\na\n```\nb\n````", "a\n```\nb\n"),
        ("```{.python .numberLines}\na\n```", "a\n"),
        ('```python title="a.py"\na\n```', "a\n"),
        ("```pythonic\na\n```", None),
        ("1. So:\n\n   ```python\n   if a:\n       b\n   ```\n", "if a:\n    b\n"),
        ("<think>x</think>\n```\nno language\n```", None),
        ("<think>x</think>\n```cpp\nint main;\n```", None),
        ("<think>x</think>\n```Python3\r\na\r\n```\r\n", "a\r\n"),
        ("<think>x</think>\n```python\ns = '```'\n```", "s = '```'\n"),
        ("<think>x</think>\n```python\n\n```", None),
        ("no think tags\n```py\na\n```", "a\n"),
        ("print(1)", "print(1)"),
        ("no think tags\n```\na\n```", None),
        (" \n", None),
    ],
)
def test_the_last_program_of_after_the_think_block_is_the_program(completion, program):
    """A draft inside the reasoning, or sample output, would be judged in place of the answer."""
    assert program_of(completion) == program


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (b"1\n2\n", b"1\n2", True),
        (b"1 \t\r\n2  \n\n\n", b"1\n2", True),
        (b"1\n\n2", b"1\n2", False),
        (b" 1", b"1", False),
        (b"1  2", b"1 2", False),
        (b"\n1", b"1", False),
        (b"1", b"1.0", False),
        (b"yes", b"YES", False),
        (b"", b"\n", True),
        (b"1\x00", b"1", False),
    ],
)
def test_only_white_space_at_the_ends_of_lines_is_forgiven(a, b, same):
    """Right programs would fail on a blank at a line's end, or wrong ones pass on another layout."""
    assert (normalised(a) == normalised(b)) is same


@pytest.mark.parametrize("cheat", cheats(honest=True), ids=lambda cheat: cheat.name)
def test_honest_programs_are_correct(sandbox, cheat):
    """Correct traces would be thrown away."""
    assert judge(cheat, timeout_s=30).outcome == "correct"


# Cheats by which the tests cannot come to an end of their own.
UNDECIDED = {
    *("yes to every comparison", "issubset that says yes", "raise the tests' recursion", "a numpy that says yes"),
    *("an exception class that catches all", "a forged exception class", "a forged named tuple", "a metaclass that says yes"),
    *("a type named int", "a reply that calls back what is not there", "deep nesting on the wire"),
    "an object where the tests catch everything",
}


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_no_cheat_is_called_correct(sandbox, every):
    """A student would be trained on programs that only fool the checker."""
    waits = (
        "the right output, then a hang",
        "never answer",
        "patched json",
        "an iterator of everything",
        "stop and let the clock run",
    )
    rows = [cheat for cheat in cheats() if cheat.name not in waits][::every]
    assert len(rows) >= 12
    with ThreadPoolExecutor(2) as threads:
        said = dict(zip([cheat.name for cheat in rows], threads.map(lambda cheat: judge(cheat, timeout_s=20), rows)))
    assert {name: judgement for name, judgement in said.items() if judgement.outcome == "correct"} == {}
    undecided = {name for name, judgement in said.items() if judgement.outcome == "undecided"}
    assert undecided <= UNDECIDED


@pytest.mark.parametrize(
    ("program", "outcome", "reason"),
    [
        ("def f(n): return n * 2", "correct", "all tests pass, 3 answers"),
        ("def f(n): return n + 2", "wrong", r"failed at line 3 of the tests: assert f\(3\) == 6"),
        ("def g(n): return n * 2", "wrong", "the program defines no f"),
        ("def f(n): return n * 2 / 0", "wrong", "the program raised ZeroDivisionError"),
        ("def f(n) return n", "wrong", "the program raised SyntaxError"),
        ("def f(n): return None", "wrong", "failed at line 2"),
        (
            "import numpy\ndef f(n): return n * 2",
            "undecided",
            "imports numpy, and the sandbox shows it the standard library only",
        ),
        ("import nonsense\n" + "x" * (1 << 20), "undecided", "1048592 characters"),
        ("def f(n):\n    while True: pass", "undecided", "not ready after 1 s"),
    ],
)
def test_a_verdict_has_a_reason_to_read(sandbox, program, outcome, reason):
    """A user who asks why a trace was dropped would get no answer."""
    entry = {"tests": "x = 2\nassert f(x) == 4\nassert f(3) == 6\nassert f(-1) == -2", "entry_point": "f"}
    judgement = verify_program(entry, program, timeout_s=1 if "while True" in program else 30)
    assert judgement.outcome == outcome, judgement
    assert re.search(reason, judgement.reason), judgement


def test_a_time_out_is_undecided_and_costs_its_deadline(sandbox):
    """A loaded machine would turn right programs into wrong ones."""
    entry = {"tests": [{"stdin": "", "stdout": "1"}, {"stdin": "", "stdout": "1"}]}
    judgement = verify_program(entry, "import time; time.sleep(600)", timeout_s=0.5)
    assert (judgement.outcome, judgement.reason) == ("undecided", "test 1 of 2: not ready after 0.5 s; killed")


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("def helper(): return 1", "never call the program"),
        ("assert f(1) == undefined_thing", "nothing defines undefined_thing"),
        ("import numpy as np\nassert f(1) == 2", "No module named 'numpy'"),
        ("assert f(1) ==", "SyntaxError"),
        ("class Own:\n    pass\nassert f(Own()) == 2", "hand over a Own"),
        ("assert f.__name__ == 'f'", "__name__"),
        ("def check(candidate):\n    assert candidate(1) == 2\nassert g", "nothing defines g"),
        ("def test_it(fixture):\n    assert f(1) == 2", "only pytest could give"),
        ("import sys\nassert f(1) == 2 and sys.stdout.getvalue() == ''", "does not cross"),
    ],
)
def test_tests_that_do_not_run_decide_nothing(sandbox, tests, reason):
    """Programs would be called wrong, or right, for a mistake in the data set."""
    judgement = verify_program({"tests": tests, "entry_point": "f"}, "def f(n): return n * 2", timeout_s=30)
    assert judgement.outcome == "undecided"
    assert reason in judgement.reason


def data_set_forms() -> dict[str, dict[str, str]]:
    """Entries by the name of the data set whose form they have, ``program`` among their parts."""
    forms: dict[str, dict[str, str]] = {}
    for (name, part), body in sections(Path(__file__).with_name("code_forms.txt")):
        forms.setdefault(name, {})[part] = body.strip()
    return forms


@pytest.mark.parametrize("form", data_set_forms().values(), ids=data_set_forms())
def test_the_usual_data_sets_forms_are_understood(sandbox, form):
    """Whole data sets would come out wrong or undecided."""
    judgement = verify_program(form, form["program"], timeout_s=30)
    assert judgement.outcome == "correct", judgement


def test_a_whole_completion_is_judged_by_its_last_block(sandbox):
    """Traces could not be verified as they come from the teacher."""
    entry = {"tests": [{"stdin": "4", "stdout": "16"}]}
    completion = "<think>\n```python\nprint(0)\n```\n</think>\nHere:\n```python\nprint(int(input()) ** 2)\n```\n"
    assert verify_code(entry, completion, timeout_s=30).outcome == "correct"
    assert verify_code(entry, "<think>x</think> 16").outcome == "wrong"


def test_tests_may_be_a_list_and_texts_lists_of_lines(sandbox):
    """MBPP's and APPS's own columns would have to be rewritten."""
    asserts = {"tests": ["assert f(1) == 2", "assert f(2) == 4"]}
    assert verify_program(asserts, "def f(n): return 2 * n", timeout_s=30).outcome == "correct"
    assert verify_program(asserts, "def f(n): return n + 1", timeout_s=30).outcome == "wrong"
    lines = {"tests": [{"stdin": ["1", "2"], "stdout": ["2", "1"]}]}
    assert verify_program(lines, "a, b = input(), input()\nprint(b)\nprint(a)", timeout_s=30).outcome == "correct"


def test_what_a_program_needs_and_does_not_see_is_not_held_against_it(sandbox):
    """Right programs that use numpy would be learnt to be wrong."""
    judgement = verify_program(
        {"tests": [{"stdin": "", "stdout": "1"}]}, "import numpy as np\nprint(np.int64(1))", timeout_s=30
    )
    assert judgement.outcome == "undecided"
    assert "imports numpy" in judgement.reason


@pytest.mark.parametrize("entry", [{}, {"tests": []}, {"tests": ""}, {"tests": [{"stdin": "1"}]}, {"tests": 3}])
def test_an_entry_of_another_form_is_the_recipes_mistake(entry):
    """A typing error in a data set would look like wrong programs."""
    with pytest.raises(RecipeError, match='needs "tests"'):
        verify_program(entry, "print(1)")


def test_asserts_are_not_sent_to_a_service():
    """Expected values would enter the process of the program."""
    with pytest.raises(RecipeError, match="stdin/stdout"):
        verify_program({"tests": "assert f(1) == 1"}, "f = int", sandbox=SandboxService("http://127.0.0.1:9"))


def test_the_environment_says_where_programs_run(monkeypatch):
    """A machine that forbids namespaces could judge no code at all, or a typing error would take the sandbox away."""
    monkeypatch.delenv("STILLHOUSE_SANDBOX", raising=False)
    assert chosen_sandbox() == "strict"
    monkeypatch.setenv("STILLHOUSE_SANDBOX", "http://sandbox:8080")
    assert chosen_sandbox() == SandboxService("http://sandbox:8080")
    monkeypatch.setenv("STILLHOUSE_SANDBOX", "http://127.0.0.1:9")
    with pytest.raises(SandboxUnavailable, match=r"127\.0\.0\.1:9/run_code cannot be reached"):
        verify_program({"tests": [{"stdin": "", "stdout": "1"}]}, "print(1)")
    monkeypatch.setenv("STILLHOUSE_SANDBOX", "unsafe")
    with pytest.raises(RecipeError, match="one of strict, unsafe-confined, unsafe-limits, or the http"):
        verify_program({"tests": [{"stdin": "", "stdout": "1"}]}, "print(1)")


VALUES = [
    None, True, 0, -(10**5000), 1.5, -0.0, math.inf, 2j, "", "\ud800 \x00 é", b"\xff", bytearray(b"a"), (), (1, (2, [3])), [[]],
    {1, 2}, frozenset({"a"}), {"a": {(1, 2): [None]}}, range(1, 9, 3), collections.deque([1, 2]), decimal.Decimal("1.10"),
    collections.OrderedDict([(2, 1), (1, 2)]), collections.Counter("aab"), collections.defaultdict(list, {1: [2]}),
    fractions.Fraction(1, 3), datetime.datetime(2024, 2, 29, 1, 2, 3), datetime.date(2024, 2, 29), datetime.timedelta(1, 2, 3),
]  # fmt: skip


def refuse(*_):
    raise CannotCross


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_plain_values_cross_unchanged(value):
    """A right answer would arrive as another value, or as another type."""
    arrived = decode(encode(value, refuse), refuse)
    assert arrived == value
    assert type(arrived) is type(value)
    assert isinstance(value, int) or repr(arrived) == repr(value)  # -0.0 and the order of keys; a huge int has no repr


def test_what_is_not_plain_crosses_as_plain_or_not_at_all():
    """A class of the program's could bring its own comparison along."""
    liar = type("Liar", (int,), {"__eq__": lambda self, other: True, "__hash__": None, "__format__": lambda *_: "5"})
    arrived = decode(encode(liar(7), refuse), refuse)
    assert type(arrived) is int
    assert arrived == 7
    assert decode(encode(collections.Counter("aab"), refuse), refuse) == {"a": 2, "b": 1}
    with pytest.raises(CannotCross):
        encode(object(), refuse)


def test_changes_made_in_place_are_made_to_the_tests_copy():
    """Programs that sort or rotate their argument in place would all be wrong."""

    @dataclasses.dataclass
    class Node:
        v: int

    old = ([3, 1], {"a": 1}, {1}, Node(1))
    inner = old[0]
    overwrite(old, ([1, 3], {"b": 2}, set(), Node(5)))
    assert old == ([1, 3], {"b": 2}, set(), Node(5))
    assert old[0] is inner
