"""Programs that want to be called correct without being so: each must lose, and the honest ones beside them must win.

The expected outputs hold a token drawn for each run, so that a program that prints it must have found it somewhere.
"""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from stillhouse.pipeline.sandbox.records import Tier
from stillhouse.pipeline.verifiers.code import verify_program
from stillhouse.pipeline.verifiers.judgement import Judgement
from tests.harness.attack_table import HERE, sections

TOKEN = "token-" + secrets.token_hex(8)
IO_TESTS = {
    "tests": [
        {"stdin": "2 3\n", "stdout": f"5 {TOKEN}\n"},
        {"stdin": "10 20\n", "stdout": f"30 {TOKEN}\n"},
    ]
}
ASSERTS = {
    "entry_point": "add",
    "tests": f"""
def check(candidate):
    assert candidate(2, 3) == 5
    assert candidate(10, 20) == 30
    assert candidate('{TOKEN[:6]}', '{TOKEN[6:]}') == '{TOKEN}'
    assert candidate(-4, 1) == -3
""",
}
# Asserts of every comparison, so that an object which says yes to each has something to say yes to.
COMPARISONS = {
    "tests": """
import math
assert not add(1, -1)
assert add(2, 3) > 4
assert add(2, 3) in (5, 6)
assert abs(add(1, 2) - 3) < 1e-9
assert math.isclose(add(1.5, 1), 2.5)
assert str(add(1, 1)) == '2'
assert isinstance(add(1, 1), int)
assert {add(1, 1), 3}.issubset({2, 3})
assert [add(1, 1)] == [2] and sorted([add(2, 1), 1]) == [1, 3]
"""
}
# Tests that count on what a solution imports.
COUNTING_ON_IMPORTS = {"tests": "assert math.isclose(add(1, 2), 3.0)\nassert add(0.5, 0) == 0.5", "entry_point": "add"}
BARE_PREDICATE = {"tests": "assert isclose(add(1, 2), 3.0)", "entry_point": "add"}
NUMPY_PREDICATE = {"tests": "assert np.allclose(add(1, 2), 3.0)", "entry_point": "add"}
SUBSET = {"tests": "assert add(1, 2).issubset({7})"}
RAISES = {
    "tests": """
try:
    add(1, None)
except TypeError:
    pass
else:
    raise AssertionError('no error')
assert add(1, 2) == 3
"""
}
CALLBACK = {
    "tests": """
def key(x):
    return x + 1
assert add(key, 2) == [3, 4, 5]
"""
}
SETUP = {
    "setup": """
class Box:
    def __init__(self, v):
        self.v = v
    def same(self, other):
        return self.v == other.v
""",
    "tests": "assert add(Box(1), Box(2)).same(Box(3))",
}
OWN_ERROR = {
    "tests": """
try:
    add(-1, 1)
    assert False
except E:
    pass
assert add(2, 3) == 5
"""
}
CATCHES_ALL = {"tests": "assert add(2, 3) == 5\ntry:\n    assert add(-1, 1)\nexcept:\n    pass"}
TEST_CLASS = {
    "tests": """
assert add(2, 3) == 5
class TestAdd:
    def setup_method(self):
        self.three = 3
    def test_more(self):
        assert add(self.three, 4) == 7
"""
}
TEST_CASE = {
    "tests": """
import unittest
assert add(2, 3) == 5
class More(unittest.TestCase):
    def test_more(self):
        self.assertEqual(add(3, 4), 7)
"""
}
TEST_RUNNER = {
    "tests": TEST_CASE["tests"]
    + """
suite = unittest.TestLoader().loadTestsFromTestCase(More)
unittest.TextTestRunner().run(suite)
"""
}
PARAMETRIZED = {
    "tests": """
import pytest
from solution import add
assert add(2, 3) == 5
@pytest.mark.slow
@pytest.mark.parametrize('a, b, c', [(2, 3, 5), (3, 4, 7), pytest.param(1, 1, 2, id='ones')])
def test_sum(a, b, c):
    assert add(a, b) == c
"""
}
PYTEST_RAISES = {
    "tests": """
import pytest
def test_error():
    assert add(2, 3) == 5
    with pytest.raises(ValueError, match='neg') as info:
        add(-1, 3)
    assert 'negative' in str(info.value)
"""
}
PYTEST_APPROX = {
    "tests": """
import pytest
def test_near():
    assert add(0.1, 0.2) == pytest.approx(0.3)
    assert [add(0.1, 0.2), add(1, 1)] == pytest.approx([0.3, 2])
    assert add(1, 1) != pytest.approx(2.1, abs=0.01)
"""
}
AWAITED = {"tests": "import asyncio\nassert asyncio.run(add(2, 3)) == 5\nassert asyncio.run(add(3, 4)) == 7"}
ASYNC_TEST = {"tests": "async def test_sum():\n    assert await add(2, 3) == 5\n    assert await add(3, 4) == 7"}
ORDERED = {"tests": "from collections import OrderedDict\nassert add('x', 'y') == OrderedDict([('x', 1), ('y', 2)])"}
COUNTED = {"tests": "assert add(1, 2)['x'] == 2 and add(1, 2)['z'] == 0 and 'z' not in add(1, 2)"}
CONTAINED = {"tests": "assert 3 in add(1, 2) and 9 not in add(1, 2)"}
LENGTH = {"tests": "r = add(1, 2)\nassert len(r) == 3 and r == [1, 1, 1]"}
ONE = {"tests": "assert add(1, 0) is True and add(1, 0) == 1"}
METHOD = {
    "tests": "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(3, 4) == 7",
    "entry_point": "add",
}
IMPORTED = {"tests": "import solution\nassert solution.add(2, 3) == 5"}
MAPPED = {
    "tests": """
def check(candidate):
    cases = [((2, 3), 5), ((10, 20), 30)]
    assert all(map(lambda case: candidate(*case[0]) == case[1], cases))
""",
    "entry_point": "add",
}
ZIPPED = {"tests": "for got, want in zip(map(lambda p: add(*p), [(2, 3), (3, 4)]), [5, 7]):\n    assert got == want"}
STOPS = {
    "tests": ZIPPED["tests"]
    + """
import pytest
with pytest.raises(StopIteration):
    add(1, None)
try:
    add(None, 1)
except Exception as error:
    assert isinstance(error, StopIteration)
"""
}
SKIPS = {
    "tests": TEST_CASE["tests"]
    + """
    def test_on_another_machine(self):
        self.skipTest('not here')
    @unittest.skip('never')
    def test_never(self):
        self.fail()
"""
}
UNTIL = {"tests": "for got in iter(lambda: add(2, 3), 5):\n    raise AssertionError(got)"}
ROWS = {
    "tests": [
        {"args": [2, 3], "returns": 5},
        {"args": [[1], [2]], "returns": [1, 2]},
        {"args": [{}, {}], "returns": {"1": None}},
    ],
    "entry_point": "add",
}
TOLERANT = {"tests": [{"stdin": "1 2\n", "stdout": "mean 1.5 of 2", "rel_tol": 1e-3}]}
ANY_OF_TWO = {"tests": [{"stdin": "4\n", "stdout_any": ["1 3", "3 1"]}]}
PREPARED = {"setup": f"import math\nword = '{TOKEN[:7]}'", "tests": [{"stdin": "9\n", "stdout": f"3 {TOKEN[:7]}"}]}
STUB = {
    "setup": "def twice(n): return 2 * n\ndef add(a, b):\n    'Add both.'\n",
    "tests": "def check(candidate):\n    assert twice(candidate(1, 2)) == 6 and candidate(2, 2) is not None",
    "entry_point": "add",
}
CHANGED = {"tests": "a, want = [1], [2]\nadd(a, want)\nassert a == [1] and want == [2] and add([3], [4]) == [3, 4]"}
SEARCH = """
import os, sys, gc, re
def hunt():
    texts = [repr(sys.argv), repr(dict(os.environ)), repr(sys.orig_argv)]
    frame = sys._getframe()
    while frame:
        texts.append(repr(frame.f_locals)); texts.append(repr(frame.f_globals)); frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, (dict, list, tuple)):
            try: texts.append(repr(thing)[:100000])
            except Exception: pass
    for root, _, names in os.walk('/tmp'):
        for name in names:
            try: texts.append(open(os.path.join(root, name), errors='replace').read())
            except OSError: pass
    for path in ('/proc/self/mem', '/proc/1/mem', '/proc/self/environ', '/proc/1/cmdline'):
        try: texts.append(open(path, errors='replace').read(1 << 20))
        except OSError: pass
    found = [m for t in texts for m in re.findall('token-[0-9a-f]{16}', t)]
    return found[0] if found else 'token-unknown'
"""
ENTRIES = {
    "OUTPUT": IO_TESTS,
    "ASSERTS": ASSERTS,
    "COMPARISONS": COMPARISONS,
    "COUNTING_ON_IMPORTS": COUNTING_ON_IMPORTS,
    "BARE_PREDICATE": BARE_PREDICATE,
    "NUMPY_PREDICATE": NUMPY_PREDICATE,
    "SUBSET": SUBSET,
    "RAISES": RAISES,
    "CALLBACK": CALLBACK,
    "SETUP": SETUP,
    "OWN_ERROR": OWN_ERROR,
    "CATCHES_ALL": CATCHES_ALL,
    "TEST_CLASS": TEST_CLASS,
    "TEST_CASE": TEST_CASE,
    "TEST_RUNNER": TEST_RUNNER,
    "PARAMETRIZED": PARAMETRIZED,
    "PYTEST_RAISES": PYTEST_RAISES,
    "PYTEST_APPROX": PYTEST_APPROX,
    "AWAITED": AWAITED,
    "ASYNC_TEST": ASYNC_TEST,
    "ORDERED": ORDERED,
    "COUNTED": COUNTED,
    "CONTAINED": CONTAINED,
    "LENGTH": LENGTH,
    "ONE": ONE,
    "METHOD": METHOD,
    "IMPORTED": IMPORTED,
    "CHANGED": CHANGED,
    "MAPPED": MAPPED,
    "ZIPPED": ZIPPED,
    "STOPS": STOPS,
    "SKIPS": SKIPS,
    "UNTIL": UNTIL,
    "ROWS": ROWS,
    "TOLERANT": TOLERANT,
    "ANY_OF_TWO": ANY_OF_TWO,
    "PREPARED": PREPARED,
    "STUB": STUB,
}


@dataclass(frozen=True)
class Cheat:
    name: str
    entry: dict[str, Any]
    program: str


def cheats(*, honest: bool = False) -> list[Cheat]:
    """The rows of ``scoring_cheats.txt``: the cheats, or the honest programs beside them."""
    rows = []
    for (name, entry), body in sections(HERE / "scoring_cheats.txt"):
        if name.startswith("honest: ") == honest:
            program = body.replace("$SEARCH", SEARCH).replace("$TOKEN", TOKEN)
            rows.append(Cheat(name.removeprefix("honest: "), ENTRIES[entry], program))
    return rows


@dataclass(frozen=True)
class CheatOutcome:
    name: str
    leaked: bool
    seen: str
    kind: str = "cheat"


def judge(cheat: Cheat, tier: Tier = "strict", *, timeout_s: float = 3.0) -> Judgement:
    return verify_program(cheat.entry, cheat.program, timeout_s=timeout_s, sandbox=tier)


def run_cheats(tier: Tier = "strict") -> list[CheatOutcome]:
    """Judge every cheat; ``leaked`` where one was called correct."""
    with ThreadPoolExecutor(4) as threads:  # many only wait for their deadline
        judged = zip(cheats(), threads.map(lambda cheat: judge(cheat, tier), cheats()))
        return [CheatOutcome(cheat.name, said.outcome == "correct", f"{said.outcome}: {said.reason}") for cheat, said in judged]
