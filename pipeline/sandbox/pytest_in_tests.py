"""What tests of data sets use of pytest, for the tests' sandbox, which has no installed packages: there it is ``pytest``.

``raises``, ``approx``, ``fail``, ``skip``, ``mark.parametrize`` (``tests_side.py`` runs its cases); other marks change
nothing. Fixtures are not there: a test that wants one decides nothing.
"""

import contextlib
import itertools
import math
import re
import types


@contextlib.contextmanager
def raises(expected, match=None):
    """Fail unless the block raises such an exception, with a text in which ``match`` is found."""
    info = types.SimpleNamespace(value=None, type=None)
    try:
        yield info
    except expected as error:
        info.value, info.type = error, type(error)
        if match is not None and not re.search(match, str(error)):
            raise AssertionError(f"{error!r} does not match {match!r}") from error
    else:
        raise AssertionError(f"{expected} was not raised")


class approx:
    """A number, or a list, tuple or dict of them, equal to what differs from it by no more than a tolerance."""

    __hash__ = None

    def __init__(self, expected, rel=None, abs=None):
        self.expected, self.rel, self.abs = expected, rel, abs

    def __eq__(self, actual):
        return self._equal(self.expected, actual)

    def _equal(self, expected, actual):
        if isinstance(expected, dict):
            return (
                isinstance(actual, dict)
                and expected.keys() == actual.keys()
                and all(self._equal(expected[key], actual[key]) for key in expected)
            )
        if isinstance(expected, (list, tuple)):
            return (
                isinstance(actual, (list, tuple))
                and len(expected) == len(actual)
                and all(self._equal(a, b) for a, b in zip(expected, actual))
            )
        numbers = (int, float)
        if not (isinstance(expected, numbers) and isinstance(actual, numbers)) or math.isinf(expected):
            return expected == actual
        tolerance = 0.0 if self.rel is None and self.abs is not None else (self.rel or 1e-6) * math.fabs(expected)
        return math.fabs(expected - actual) <= max(tolerance, 1e-12 if self.abs is None else self.abs)


def fail(reason=""):
    raise AssertionError(reason)


class SkipTest(Exception):
    """Tests that skip themselves decide nothing."""


def skip(reason="", **_):
    raise SkipTest(reason)


def param(*values, **_):
    return values


class _Marks:
    def __getattr__(self, name):
        return lambda *args, **options: args[0] if len(args) == 1 and callable(args[0]) and not options else _unchanged

    @staticmethod
    def parametrize(names, rows, **_):
        """Give a function the cases to run it with, each with each of those that it has."""
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        rows = [dict(zip(names, row if len(names) > 1 or isinstance(row, tuple) else [row])) for row in rows]

        def decorate(function):
            function.cases = [a | b for a, b in itertools.product(getattr(function, "cases", [{}]), rows)]
            return function

        return decorate


def _unchanged(function):
    return function


mark = _Marks()
