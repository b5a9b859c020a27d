"""The tests' end of a function-style check: runs the tests as they are written, in a process that holds no line of the program.

Where they call the program, the call goes as one line of JSON to the other sandbox and the result comes back as data: expected
values stay here, and nothing there can touch a comparison. Each request carries a fresh nonce that its answer has to repeat;
whatever else the program writes is passed over. To forge an answer is to return that value.

What can cross: plain data (``crossing.py``); instances of classes that the entry's ``setup`` defines, by their attributes; the
tests' own functions, called back; the program's objects, by reference: they can be called, iterated, indexed and read, and are
never equal to anything but themselves; its coroutines can be awaited and its exception classes caught. What the program does
in place to an argument is done to the tests' copy.
"""

import ast
import builtins
import functools
import importlib
import json
import math
import secrets
import sys
import types

from stillhouse.pipeline.sandbox.crossing import CannotCross, decode, encode, overwrite
from stillhouse.pipeline.sandbox.tests_found import (
    SETUP,
    TESTS,
    free_names,
    is_only_looked_into,
    looks_outside,
    names_in,
    required,
    uncalled,
    where,
    where_loops_may_end,
)
from stillhouse.pipeline.sandbox.wire import (
    DEEP,
    instance,
    raised,
    rebuilt,
    run_coroutine,
    send,
    setup_classes,
    state_of,
    take_pipes,
)

_SAFE_MODULES = ("builtins", "math", "operator")
# Names by which values are judged: methods of builtin types that answer yes or no, and functions that compare. An object or a
# function of the program's that answers to one of them would be its own judge.
_PREDICATES = {
    *(name for kind in (str, bytes, set, float) for name in dir(kind) if name.startswith("is") or name.endswith("swith")),
    *("isclose", "isnan", "isinf", "isfinite", "allclose", "array_equal", "array_equiv", "approx", "compare_digest"),
}


class ProgramEnded(BaseException):
    """The other sandbox has closed its end."""


class Remote:
    """An object of the program's, as the tests see it."""

    def __init__(self, key, kind, ask, package=""):
        self.__dict__.update(_key=key, _kind=kind, _ask=ask, _package=package)

    def __call__(self, *args, **kwargs):
        return self._ask("call", self._key, args, kwargs)

    def __getattr__(self, name):
        if name.startswith("__") or name in _PREDICATES:
            raise CannotCross(f"the tests ask a {self._kind} of the program's for its {name}")
        return self._ask("attribute", self._key, (name,))

    def __setattr__(self, name, value):
        self._ask("set", self._key, (name, value))

    def __getitem__(self, key):
        return self._ask("item", self._key, (key,))

    def __setitem__(self, key, value):
        self._ask("set item", self._key, (key, value))

    def __iter__(self):
        return self._ask("iter", self._key)

    def __next__(self):
        return self._ask("next", self._key)

    def __len__(self):
        return self._ask("len", self._key)

    def __str__(self):
        return self._ask("str", self._key)

    def __repr__(self):
        return self._ask("repr", self._key)

    def __eq__(self, other):
        if isinstance(other, Remote) and other._key != self._key:
            raise CannotCross(f"the tests compare two objects of the program's, {self._kind} and {other._kind}")
        if self._package and not isinstance(other, Remote):  # sympy's Integer(5) is 5, and we cannot ask it
            raise CannotCross(f"the tests compare a {self._kind} of the package {self._package}")
        return self is other or isinstance(other, Remote)

    __hash__ = object.__hash__

    def __bool__(self):
        raise CannotCross(f"the tests ask whether a {self._kind} of the program's is true")


class Judge:
    """Runs the tests and asks the program over the wire."""

    def __init__(self):
        self.incoming, self.outgoing = take_pipes()
        self.functions, self.missing = [], set()
        self.answers, self.opaque, self.gone = 0, False, False
        self.exceptions, self.classes = {}, set()
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        self.names = vars(module)
        self.lines_of_stops = set()

    def refer(self, value):
        if isinstance(value, Remote):
            return ["h", value._key]
        if isinstance(value, types.FunctionType):
            if value not in self.functions:
                self.functions.append(value)
            return ["c", self.functions.index(value)]
        if isinstance(value, (types.BuiltinFunctionType, type)) and value.__module__ in _SAFE_MODULES:
            return ["n", value.__module__, value.__qualname__]
        form = state_of(value, self.classes, self.refer)
        if form is None:
            raise CannotCross(f"the tests hand over a {type(value).__name__}")
        return form

    def resolve(self, tag, parts):
        if tag == "h":
            key, kind, can_be_called, package = parts
            self.opaque |= not can_be_called
            ours = package in sys.stdlib_module_names or package == "program"
            return Remote(int(key), str(kind)[:80], self.ask, "" if ours else str(package)[:80])
        if tag == "k":
            return self.awaited(int(parts[0]))
        if tag == "x":
            return self.exception_class(*parts)
        if tag == "c":
            return self.functions[parts[0]]
        if tag == "o":
            return instance(parts, self.classes, self.names, self.resolve)
        raise ValueError(f"unknown kind {tag}")

    async def awaited(self, key):
        return self.ask("await", key)

    def exception_class(self, kinds):
        """A class of ours for the program's exception class: ``except`` then catches what the program raises, and no more."""
        name = str(kinds[0])
        base = next((k for k in (getattr(builtins, str(kind), None) for kind in kinds) if isinstance(k, type)), Exception)
        if name not in self.exceptions:
            if not issubclass(base, Exception) or (name == base.__name__ and issubclass(AssertionError, base)):
                raise CannotCross(f"the program's {name} would catch failed asserts")
            self.exceptions[name] = base if name == base.__name__ else type(name, (base,), {})
        return self.exceptions[name]

    def ask(self, do, key, args=(), kwargs=None):
        """Send one request and wait for its answer, serving what the program calls back meanwhile."""
        nonce = secrets.token_hex(16)
        encoded = [encode(arg, self.refer) for arg in args]
        named = {name: encode(value, self.refer) for name, value in (kwargs or {}).items()}
        send(self.outgoing, b"c", {"id": nonce, "do": do, "on": key, "args": encoded, "kwargs": named})
        while "back" in (answer := self.receive(nonce)):
            send(self.outgoing, b"c", {"id": nonce} | self.called_back(answer))
        self.answers += 1
        if "raised" in answer:
            raise rebuilt(*answer["raised"], self.names, ends_loops=do == "next" or self.may_end_loops())
        for name, form in answer.get("changed", {}).items():
            overwrite(kwargs[name] if name in (kwargs or {}) else args[int(name)], decode(form, self.resolve))
        return decode(answer["value"], self.resolve)

    def may_end_loops(self):
        """Whether the tests' line that asks, or one that called it, expects StopIteration."""
        frame = sys._getframe()
        while frame is not None:
            if frame.f_code.co_filename == TESTS and frame.f_lineno in self.lines_of_stops:
                return True
            frame = frame.f_back
        return False

    def receive(self, nonce):
        for line in self.incoming:
            try:
                answer = json.loads(line)
            except ValueError:  # not ours: the program writes what it likes
                continue
            if isinstance(answer, dict) and answer.get("id") == nonce:
                return answer
        self.gone = True
        raise ProgramEnded

    def called_back(self, answer):
        function = self.functions[answer["back"]]
        try:
            said = {"value": encode(function(*(decode(arg, self.resolve) for arg in answer["args"])), self.refer)}
        except Exception as error:
            said = {"raised": raised(error)}  # the program called, the program gets it
        return said

    def fetch(self, name):
        """Bring a name of the program's into the tests' namespace."""
        nonce = secrets.token_hex(16)
        send(self.outgoing, b"c", {"id": nonce, "do": "name", "name": name})
        answer = self.receive(nonce)
        if "raised" in answer:
            raise rebuilt(*answer["raised"], self.names, ends_loops=False)
        if "missing" in answer:
            self.missing.add(name)
            return
        self.names[name] = decode(answer["value"], self.resolve)
        self.answers += not isinstance(self.names[name], (Remote, type))

    def run(self, setup, tests, entry_point):
        self.classes = setup_classes(setup, entry_point)
        exec(compile(setup, SETUP, "exec"), self.names)
        tree = ast.parse(tests, TESTS)
        self.captures = looks_outside(tree, setup)
        self.lines_of_stops = where_loops_may_end(tree)
        solution = types.ModuleType("solution")  # tests may say `from solution import f`
        sys.modules["solution"] = solution
        solution.__getattr__ = self.attribute_of_solution
        wanted = names_in(entry_point or "0")
        # What the setup defines, both sides have; but a prompt's unfinished function is the program's to define.
        for name in sorted(free_names(tree, entry_point) - set(self.names) | wanted):
            if name in sys.stdlib_module_names and name not in wanted and is_only_looked_into(name, tree):
                self.names[name] = importlib.import_module(name)  # tests count on the solution's imports
            elif name in _PREDICATES - wanted:
                self.names[name] = getattr(math, name, None) or refuse(f"the tests compare with {name} and do not import it")
            else:
                self.fetch(name)
            if name == entry_point and name in self.missing:
                self.fetch_method(name)
            if name in self.names:
                setattr(solution, name, self.names[name])
        if "unittest" in tests:
            quieten_unittest()
        exec(compile(tree, TESTS, "exec"), self.names)
        for node in uncalled(tree, {name for name, value in self.names.items() if is_test_case(value)}):
            self.run_test(node, entry_point)

    def attribute_of_solution(self, name):
        """What ``import solution; solution.f`` asks for."""
        if not name.startswith("__") and name not in self.names:
            self.fetch(name)
        if name.startswith("__") or name in self.missing:
            raise AttributeError(f"the program defines no {name}", name=name)
        return self.names[name]

    def fetch_method(self, name):
        """Take a function that the program does not define from its class Solution, as in LeetCode's problems."""
        self.fetch("Solution")
        if "Solution" in self.names:
            made = self.names["Solution"]()
            if isinstance(made, Remote):
                self.missing.discard(name)
                self.names[name] = getattr(made, name)

    def run_test(self, node, entry_point):
        """Run one function or class that nothing calls if a test runner would, or if it is HumanEval's check."""
        test = self.names.get(node.name)
        if isinstance(node, ast.ClassDef):
            if is_test_case(test):
                unittest = sys.modules["unittest"]
                cases = list(unittest.defaultTestLoader.loadTestsFromTestCase(test))
                for case in cases:
                    if expects_failure(case):
                        refuse(f"the tests expect {case._testMethodName} to fail")
                    case.debug = functools.partial(self.unless_skipped, case.debug)
                unittest.TestSuite(cases).debug()  # raises what fails
            elif node.name.startswith("Test"):
                for part in node.body:
                    if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)) and part.name.startswith("test"):
                        made = test()
                        for name in ("setup_method", part.name, "teardown_method"):
                            call_test(getattr(made, name, None), name)
        elif node.name == "check" and required(node):
            if not entry_point:
                refuse("the tests define check(candidate), and no entry_point says what the candidate is")
            call_test(test, "check", eval(entry_point, self.names))
        elif node.name.startswith("test") or node.name == "check":
            call_test(test, node.name)

    def unless_skipped(self, run):
        """Run a test case, which may skip itself before it has asked the program for anything."""
        before = self.answers
        try:
            run()
        except sys.modules["unittest"].SkipTest as skip:
            if hasattr(skip, "of_the_program") or self.answers > before:
                raise

    def verdict(self, setup, tests, entry_point):
        """Run the tests: ``{"outcome", "reason"}``, or ``{"ended": true}`` where the program was gone too early."""
        outcome = "wrong"
        try:
            self.run(setup, tests, entry_point)
        except ProgramEnded:
            return {"ended": True}
        except CannotCross as error:
            return {"outcome": "undecided", "reason": f"{error}; that cannot be carried between the two sandboxes"}
        except SystemExit as error:
            if error.code in (None, 0, False):  # unittest.main() of tests that passed
                return self.passed()
            reason = f"the tests ended with status {error.code}"
        except RecursionError:
            outcome, reason = "undecided", "a value, or the tests, go deeper than Python's recursion limit"
        except BaseException as error:
            place = where(error, tests)
            said = f"{getattr(error, 'of_the_program', type(error).__name__)}: {error}".strip(": ")
            if hasattr(error, "of_the_program"):
                reason = f"the program raised {said}{place}"
            elif isinstance(error, AssertionError):
                reason = f"failed{place}"
            elif isinstance(error, NameError) and error.name in self.missing:
                own = not entry_point or error.name in names_in(entry_point)
                outcome = "wrong" if own else "undecided"
                reason = f"nothing defines {error.name}" if not own else f"the program defines no {error.name}"
            else:
                ours = isinstance(error, (NameError, ImportError, SyntaxError)) or type(error).__name__ == "SkipTest"
                ours |= self.opaque or not self.answers
                outcome = "undecided" if ours else "wrong"
                reason = f"the tests stop with {said}{place}"
            if outcome == "wrong" and self.captures:
                outcome, reason = "undecided", f"{reason}; the tests look at its output, or files, which do not cross"
        else:
            return self.passed()
        return {"outcome": outcome, "reason": reason}

    def passed(self):
        if self.gone:  # and the tests have caught it
            return {"ended": True}
        if CannotCross.reasons:
            return {
                "outcome": "undecided",
                "reason": f"{CannotCross.reasons[0]}; that cannot be carried, and the tests caught it",
            }
        if not self.answers:
            return {"outcome": "undecided", "reason": "the tests never call the program"}
        return {"outcome": "correct", "reason": f"all tests pass, {self.answers} answers of the program"}


def refuse(why):
    raise CannotCross(why)


def call_test(test, name, *args):
    """Call a test as a test runner does; one that wants fixtures, or is no function, decides nothing."""
    import inspect  # only here: the tests of most data sets are plain asserts

    if test is None and name in ("setup_method", "teardown_method"):
        return
    for case in getattr(test, "cases", [{}]):  # pytest.mark.parametrize
        try:
            inspect.signature(test).bind(*args, **case)
        except TypeError:
            refuse(f"{name} wants arguments that only pytest could give")
        returned = test(*args, **case)
        if inspect.iscoroutine(returned):
            run_coroutine(returned)


def is_test_case(value):
    return "unittest" in sys.modules and isinstance(value, type) and issubclass(value, sys.modules["unittest"].TestCase)


def expects_failure(case):
    parts = (type(case), getattr(case, case._testMethodName))
    return any(getattr(part, "__unittest_expecting_failure__", False) for part in parts)


def quieten_unittest():
    """Let unittest.main() do nothing: the test cases are run one by one afterwards, so that the first that fails is named."""
    import unittest

    whole = unittest.main
    unittest.main = lambda *args, exit=True, **options: None if exit else whole(*args, exit=False, **options)


def judge() -> None:
    """Run the tests of the work folder and send their verdict."""
    texts = []
    for name in ("setup.py", "tests.py", "entry_point.txt"):
        with open(name, encoding="utf-8") as file:
            texts.append(file.read())
    setup, tests, entry_point = texts
    sys.setrecursionlimit(DEEP)
    found = Judge()
    said = found.verdict(setup, tests, entry_point)
    send(found.outgoing, b"v", said)
