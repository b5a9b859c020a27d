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
from stillhouse.pipeline.verifiers.code import program_of, verify_code, verify_program
from stillhouse.pipeline.verifiers.program_output import first_difference, normalised
from stillhouse.pipeline.verifiers.rows import judge_row
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


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_honest_programs_are_correct(sandbox, every):
    """Correct traces would be thrown away."""
    rows = cheats(honest=True)[::every]
    assert len(rows) >= 6
    with ThreadPoolExecutor(2) as threads:
        said = dict(zip([row.name for row in rows], threads.map(lambda row: judge(row, timeout_s=30), rows)))
    assert {name: judgement for name, judgement in said.items() if judgement.outcome != "correct"} == {}


# Cheats by which the tests cannot come to an end of their own.
UNDECIDED = {
    *("yes to every comparison", "issubset that says yes", "raise the tests' recursion", "a numpy that says yes"),
    *("an exception class that catches all", "a forged exception class", "a forged named tuple", "a metaclass that says yes"),
    *("a type named int", "a reply that calls back what is not there", "deep nesting on the wire"),
    *("an object where the tests catch everything", "a module that is missing on purpose", "an object of a package's"),
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
        "patched reading",
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
            "imports numpy, and the sandbox shows the standard library only; .* STILLHOUSE_SANDBOX_PACKAGES=numpy shows it too",
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


UNITTEST = "import unittest\nclass Tests(unittest.TestCase):\n"


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("def helper(): return 1", "never call the program"),
        ("assert f(1) == undefined_thing", "nothing defines undefined_thing"),
        ("import numpy as np\nassert f(1) == 2", "No module named 'numpy'"),
        ("import numpy as np\nassert f(1) == 2", "STILLHOUSE_SANDBOX_PACKAGES=numpy shows it too"),
        ("open('t', 'w').write('1')\nassert f(open('t').read()) == 2", "files, which do not cross"),
        ("assert f(1) ==", "SyntaxError"),
        ("class Own:\n    pass\nassert f(Own()) == 2", "hand over a Own"),
        ("assert f.__name__ == 'f'", "__name__"),
        ("def check(candidate):\n    assert candidate(1) == 2\nassert g", "nothing defines g"),
        ("def test_it(fixture):\n    assert f(1) == 2", "only pytest could give"),
        ("import sys\nassert f(1) == 2 and sys.stdout.getvalue() == ''", "do not cross"),
        ("from unittest import mock\nwith mock.patch('builtins.print') as p:\n    f(1)\n    p.assert_called()", "do not cross"),
        ("from pathlib import Path as P\nassert f(1) == 2 and P('made').exists()", "do not cross"),
        ("import pytest\nassert f(1) == 2\ndef test_it():\n    pytest.skip('not here')", "SkipTest: not here"),
        (UNITTEST + "    def test_a(self):\n        if f(1) == 2: self.skipTest('asked')", "SkipTest: asked"),
        (UNITTEST + "    @unittest.expectedFailure\n    def test_a(self): self.assertEqual(f(1), 3)", "expect test_a to fail"),
    ],
)
def test_tests_that_do_not_run_decide_nothing(sandbox, tests, reason):
    """Programs would be called wrong, or right, for a mistake in the data set."""
    judgement = verify_program({"tests": tests, "entry_point": "f"}, "def f(n): return n * 2", timeout_s=30)
    assert judgement.outcome == "undecided"
    assert reason in judgement.reason


@pytest.mark.parametrize(
    ("tests", "program"),
    [
        ("patch, open, Path, stdout = 1, 2, 3, 4\nassert f(patch) == open", "def f(n): return 3 * n"),
        ("a = f()\na.open()\nassert a.number == 2", "class f:\n    number = 3\n    def open(self): pass"),
        ("import random\nrandom.seed(0)\nassert f(1) == 2", "def f(n): return 3 * n  # not random"),
        (
            "from unittest import SkipTest\n" + UNITTEST + "    def test_a(self): f(1)",
            "import unittest\ndef f(n): raise unittest.SkipTest",
        ),
        ("assert f(1) == 2", "def f(n): raise PermissionError(1, 'Operation not permitted')"),
        ([{"stdin": "", "stdout": "1"}], "import sys\nsys.exit('File \"setup.py\"')"),
        ([{"args": [1], "returns": 9007199254740993, "abs_tol": 1e-9}], "def f(n): return 9007199254740992"),
        ([{"args": [1], "returns": 5.0, "abs_tol": 0.2}], "import decimal\ndef f(n): return decimal.Decimal('1e99999999')"),
    ],
)
def test_a_word_is_no_way_out_for_a_wrong_program(sandbox, tests, program):
    """Wrong programs would be called undecided, or correct, by a name, a comment or a tolerance."""
    judgement = verify_program({"tests": tests, "entry_point": "f"}, program, timeout_s=30)
    assert judgement.outcome == "wrong", judgement


def test_shared_memory_that_the_sandbox_refuses_is_not_held_against_a_program(sandbox):
    """Right programs that use mmap with its own defaults would be learnt to be wrong."""
    program = "import mmap\ndef f(n):\n    mmap.mmap(-1, 64)\n    return 2 * n\nif __name__ == '__main__': print(f(1))"
    for entry in ({"tests": "assert f(1) == 2"}, {"tests": [{"stdin": "", "stdout": "2"}]}):
        judgement = verify_program(entry, program, timeout_s=30)
        assert judgement.outcome == "undecided"
        assert "no shared anonymous memory" in judgement.reason
        assert verify_program(entry, program.replace("64", "64, 2"), timeout_s=30).outcome == "correct"  # MAP_PRIVATE


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


def data_set_problems() -> list[tuple[str, str, dict[str, str], str]]:
    """Name, what is expected, the row without its prediction, and the prediction, of each program of ``code_shapes.txt``."""
    problems: dict[str, dict[str, list[str]]] = {}
    for (name, part), body in sections(Path(__file__).with_name("code_shapes.txt")):
        problems.setdefault(name, {}).setdefault(part, []).append(body.strip("\n"))
    rows = []
    for name, parts in problems.items():
        row = {part: parts[part][0] for part in ("tests", "entry_point", "setup") if part in parts}
        rows += [(name, "correct", row, parts["program"][0]), *((name, "wrong", row, wrong) for wrong in parts["wrong"])]
    return rows


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_problems_of_the_usual_data_sets_are_judged_as_the_page_converts_them(sandbox, every):
    """Whoever follows the page's table would get right programs called wrong, or wrong ones learnt."""
    rows = data_set_problems()[::every]
    preds = [row | {"pred": f"<think>x</think>\n```python\n{program}\n```"} for _, _, row, program in rows]
    with ThreadPoolExecutor(2) as threads:
        said = list(threads.map(lambda row: judge_row("code", row, timeout_s=30), preds))
    assert [
        (name, expected, got) for (name, expected, _, _), got in zip(rows, said, strict=True) if got["verdict"] != expected
    ] == []


@pytest.fixture
def numpy_shown(sandbox, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_SANDBOX_PACKAGES", "numpy")


HUMANEVAL_PLUS = """
import numpy as np

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return False

def assertion(out, exp, atol):
    exact_match = out == exp
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not exact_match and atol != 0:
        assert type(out) == type(exp)
        if isinstance(exp, (list, tuple)):
            assert len(out) == len(exp)
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert exact_match

def check(candidate):
    inputs = [[[1.0, 2.0]], [[3.0]], [[]]]
    results = [[0.5, 1.0], [1.5], []]
    for i, (inp, exp) in enumerate(zip(inputs, results)):
        assertion(candidate(*inp), exp, 0)
"""
ACROSS = [
    (HUMANEVAL_PLUS, "def f(xs): return [x / 2 + 1e-9 for x in xs]", "correct"),
    (HUMANEVAL_PLUS, "def f(xs): return [x / 2 + 1e-3 for x in xs]", "wrong"),
    (HUMANEVAL_PLUS, "def f(xs): raise StopIteration", "wrong"),
    ("assert f([1, 2]) == 3", "import numpy as np\ndef f(x): return np.sum(x)", "correct"),
    ("assert f([1, 2]) == 3", "import numpy as np\ndef f(x): return np.prod(x)", "wrong"),
    ("assert f(4) is True or f(4) == True", "import numpy as np\ndef f(x): return np.bool_(x % 2 == 0)", "correct"),
    (
        "import numpy as np\na = np.arange(6).reshape(2, 3)\nassert np.array_equal(f(a), a.T)",
        "def f(a): return a.T",
        "correct",
    ),
    ("import numpy as np\na = np.arange(6).reshape(2, 3)\nassert np.array_equal(f(a), a.T)", "def f(a): return a", "wrong"),
    ("import numpy as np\na = np.ones(3)\nf(a=a)\nassert a.tolist() == [2, 2, 2]", "def f(a): a *= 2", "correct"),
    (
        "import numpy as np\nnp.testing.assert_allclose(f(2), [[0, 1e-9]], atol=1e-6)\nassert f(2).dtype == np.float32",
        "import numpy as np\ndef f(n): return np.zeros((1, n), dtype=np.float32)",
        "correct",
    ),
    ("assert f(1) == [None]", "import numpy as np\ndef f(n): return np.array([None])", "undecided"),
    (
        "import numpy as np\nassert np.array_equal(f(1), [1, 2])",
        "import numpy as np\nclass All(np.ndarray):\n    __array__ = __eq__ = lambda *a: True\n"
        "def f(n): return np.zeros(2).view(All)",
        "undecided",
    ),
    (
        "import random\nrandom.seed(0)\nassert f() == 6",
        "import random\ndef f(): return random.randint(10, 20)",
        "undecided",
    ),
    ("assert f(1) == 2", "import pandas\ndef f(n): return 2", "undecided"),
    ([{"args": [2], "returns": 5.0, "abs_tol": 0.2}], "import numpy as np\ndef f(n): return np.float32(5.1)", "correct"),
    ([{"args": [2], "returns": [[0, 1]]}], "import numpy as np\ndef f(n): return [np.arange(n)]", "correct"),
    ([{"args": [2], "returns": 5}], "import numpy as np\ndef f(n): return np.array([5])", "wrong"),
    ([{"args": [2], "returns": "a"}], "import numpy as np\ndef f(n): return np.array(['a'])", "wrong"),
]


@pytest.mark.parametrize(
    ("tests", "program", "outcome"),
    [*ACROSS[:6], *(pytest.param(*row, marks=pytest.mark.slow) for row in ACROSS[6:])],
)
def test_values_of_a_package_that_is_shown_cross(numpy_shown, tests, program, outcome):
    """Programs that return numpy's numbers or arrays would be called wrong, although every other judge takes them."""
    judgement = verify_program({"tests": tests, "entry_point": "f"}, program, timeout_s=30)
    assert judgement.outcome == outcome, judgement


def test_an_array_that_is_none_is_refused():
    """A program could let the tests' process reserve memory without end, or read objects out of its bytes."""
    import numpy

    value = numpy.array([[1, 2]], dtype="int16")
    assert decode(encode(value, refuse), refuse).tolist() == [[1, 2]]
    for forged in (
        ["A", "|O", [1], "00" * 8],
        ["A", "<i8", [1 << 40], "00"],
        ["A", "<i8", [-1, -1], "00"],
        ["A", "V8", [1], "00" * 8],
    ):
        with pytest.raises(ValueError, match=r"array|shape|dimension"):
            decode(forged, refuse)


def test_a_package_that_is_not_shown_is_named_beside_those_that_are(numpy_shown):
    """The user would be told to show one package and lose the others."""
    reason = verify_program({"tests": [{"stdin": "", "stdout": ""}]}, "import scipy", timeout_s=30).reason
    assert "shows the standard library and numpy" in reason
    assert "STILLHOUSE_SANDBOX_PACKAGES=numpy,scipy shows it too" in reason


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (
            {"setup": "import math\nx = 1 / 0", "tests": "assert f(1) == 2"},
            "ZeroDivisionError: division by zero at line 2 of the setup",
        ),
        ({"setup": "import (", "tests": "assert f(1) == 2"}, "SyntaxError"),
        ({"setup": "x = 1 / 0", "tests": [{"stdin": "", "stdout": ""}]}, "the setup stops with ZeroDivisionError"),
        ({"setup": "import json\njson.loads('')", "tests": [{"stdin": "", "stdout": ""}]}, "the setup stops with json"),
        (
            {
                "setup": "from unittest.mock import patch",
                "tests": "with patch('builtins.print') as p:\n    f(1)\n    assert p.called",
            },
            "do not cross",
        ),
    ],
)
def test_a_setup_that_fails_decides_nothing(sandbox, entry, reason):
    """A mistake in a data set's column would make all programs wrong."""
    judgement = verify_program(entry, "def f(n): return 2 * n", timeout_s=30)
    assert judgement.outcome == "undecided"
    assert reason in judgement.reason


def test_a_reason_cannot_steer_a_terminal_and_is_short(sandbox):
    """`stillhouse filter --explain` would run the escape sequences of whatever a model wrote, or fill the store with them."""
    noise = "\\x1b]0;owned\\x07\\u202e" + "x" * 100_000
    for entry in ({"tests": "assert f(1) == 2"}, {"tests": [{"stdin": "", "stdout": ""}]}):
        said = verify_program(entry, f"def f(n): raise ValueError('{noise}')\nif __name__ == '__main__': f(1)", timeout_s=30)
        assert said.outcome == "wrong"
        assert said.reason.isprintable()
        assert "owned" in said.reason
        assert len(said.reason) < 1_000


@pytest.mark.parametrize(
    ("got", "wanted", "rel_tol", "abs_tol", "line"),
    [
        (b"1.0000001", b"1", 0, 0, 0),
        (b"1.0000001", b"1", 1e-6, 0, None),
        (b"1e0 x", b"1.00 x", 0, 1e-9, None),
        (b"a\n2", b"a\n3", 0.5, 0, None),
        (b"a\n2", b"a\n3", 0.3, 0, 1),
        (b"1\n2", b"1", 1, 1, 1),
        (b"", b"0", 1, 1, 0),
        (b"nan", b"0", 1, 9, 0),
        (b"1e999", b"1e998", 1, 9, 0),
        (b"1 000", b"1000", 1, 9999, 0),
        (b"yes", b"no", 1, 9, 0),
        (b"9007199254740992", b"9007199254740993", 0, 1e-9, 0),
        (b"9007199254740992", b"9007199254740993", 0, 1, None),
        (b"17", b"10", 0.7, 0, None),
        (b"9" * 5000, b"1", 1, 9, 0),
    ],
)
def test_a_tolerance_is_for_numbers_and_for_nothing_else(got, wanted, rel_tol, abs_tol, line):
    """A right mean would fail for its last digit, or anything would pass where a tolerance is given."""
    assert first_difference(normalised(got), normalised(wanted), rel_tol, abs_tol) == line


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ([{"args": [1], "expected": 2}], r"need \"returns\".* only \['args', 'expected'\]"),
        ([{"args": "ab", "returns": 2}], '"args" is the list'),
        ([{"args": {"n": 1}, "returns": 2}], '"args" is the list'),
        ([{"args": [1], "returns": 2, "rel_tol": "1e-6"}], "are numbers from 0"),
        ([{"stdin": "", "stdout": "1", "abs_tol": -1}], "are numbers from 0"),
        ([{"stdin": "", "stdout": "1", "abs_tol": True}], "are numbers from 0"),
        ([{"args": [1], "returns": 2, "rel_tol": 10**400}], "are numbers from 0"),
        ([{"stdin": "", "stdout_any": "1"}], '"stdout_any" is a list'),
        ([{"stdin": "", "stdout_any": []}], '"stdout_any" is a list'),
    ],
)
def test_a_row_that_cannot_be_meant_is_refused(sandbox, tests, said):
    """A typing error would be read as another test, and programs judged by it."""
    with pytest.raises(RecipeError, match=said):
        verify_program({"tests": tests, "entry_point": "f"}, "def f(n): return 2")


def test_rows_of_arguments_need_a_function_to_call():
    """The user would see undecided rows and no word of the missing column."""
    with pytest.raises(RecipeError, match='need an "entry_point"'):
        verify_program({"tests": [{"args": [1], "returns": 2}]}, "f = int", sandbox="strict")


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
    with pytest.raises(RecipeError, match="from start to end"):
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
