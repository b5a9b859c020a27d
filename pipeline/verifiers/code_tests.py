"""The forms that the tests of a code problem may have, read into the two that are run: rows of outputs, and asserts."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from numbers import Real
from typing import Any

from stillhouse.pipeline.errors import RecipeError


def from_json(tests: Any) -> Any:
    """A list that stands in its column as JSON text; anything else as it is."""
    if isinstance(tests, str) and tests.lstrip().startswith("["):
        try:
            return json.loads(tests)
        except (ValueError, RecursionError):  # Python, then
            return tests
    return tests


def are_rows(tests: Any, *columns: str) -> bool:
    """Whether tests are a list of objects that have one of these columns each."""
    listed = isinstance(tests, Sequence) and bool(tests)
    return listed and all(isinstance(test, Mapping) and any(test.get(name) is not None for name in columns) for test in tests)


def as_text(value: Any) -> str:
    """An input or output: text, or a list of lines."""
    if isinstance(value, (list, tuple)):
        return "\n".join(map(str, value))
    return "" if value is None else str(value)


def accepted_outputs(test: Mapping[str, Any]) -> list[bytes]:
    """The outputs that are right for one test: its ``stdout``, or each of its ``stdout_any``.

    Raises:
        RecipeError: ``stdout_any`` is not a list of outputs.
    """
    accepted = test.get("stdout_any")
    if accepted is None:
        accepted = [test["stdout"]]
    if not isinstance(accepted, Sequence) or isinstance(accepted, str) or not accepted:
        raise RecipeError(f'a test\'s "stdout_any" is a list of outputs that are right, got {str(accepted)[:80]!r}')
    return [as_text(output).encode(errors="surrogatepass") for output in accepted]


def arguments(row: Mapping[str, Any]) -> list[Any]:
    """The positional arguments of one row.

    Raises:
        RecipeError: ``args`` is not a list, or no ``returns`` stands beside it.
    """
    if "returns" not in row:  # what a function that returns None would pass
        raise RecipeError(f'a test\'s "args" need "returns", the result (null for None); this one has only {sorted(row)}')
    if not isinstance(row["args"], Sequence) or isinstance(row["args"], str):
        raise RecipeError(f'a test\'s "args" is the list of the arguments of one call, got {str(row["args"])[:80]!r}')
    return list(row["args"])


def tolerances(test: Mapping[str, Any]) -> tuple[float, float]:
    """A test's ``rel_tol`` and ``abs_tol``, 0 where it has none.

    Raises:
        RecipeError: one is not a number from 0.
    """
    found = tuple(0 if test.get(name) is None else test[name] for name in ("rel_tol", "abs_tol"))
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in found)
    if not numbers or not all(0 <= value <= sys.float_info.max for value in found):
        raise RecipeError(f'a test\'s "rel_tol" and "abs_tol" are numbers from 0, got {found}')
    return float(found[0]), float(found[1])


def same(got: Any, want: Any, rel_tol: float, abs_tol: float) -> bool:
    """Whether a result is a JSON value: a tuple or numpy's array is a list, a key a text."""
    if type(got).__module__ == "numpy":
        got = got.tolist()
    if isinstance(want, list):
        alike = isinstance(got, (list, tuple)) and len(got) == len(want)
        return alike and all(same(a, b, rel_tol, abs_tol) for a, b in zip(got, want))
    if isinstance(want, dict):
        got = {str(key): value for key, value in got.items()} if isinstance(got, dict) else {}
        return got.keys() == want.keys() and all(same(got[key], want[key], rel_tol, abs_tol) for key in want)
    if (rel_tol or abs_tol) and all(isinstance(v, (Real, Decimal)) and not isinstance(v, bool) for v in (got, want)):
        if isinstance(got, int) and isinstance(want, int):  # which may be larger than a float is exact
            return abs(got - want) <= max(Fraction(str(rel_tol)) * max(abs(got), abs(want)), Fraction(str(abs_tol)))
        try:
            return math.isclose(got, want, rel_tol=rel_tol, abs_tol=abs_tol)
        except OverflowError:  # an integer that no float holds
            return got == want
    return bool(got == want)


def as_asserts(rows: Sequence[Mapping[str, Any]]) -> str:
    """Python tests, ``check(candidate)``, of rows of ``args`` and ``returns`` (JSON values), perhaps with tolerances.

    Raises:
        RecipeError: a row's ``args`` or tolerances are none, or it has no ``returns``.
    """
    head = "from __future__ import annotations\nimport math\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
    head += "from math import inf, nan\nfrom numbers import Real\nfrom typing import Any\n"
    lines = [f"    assert same(candidate(*{arguments(row)!r}), {row['returns']!r}, *{tolerances(row)!r})" for row in rows]
    return "\n".join([head, inspect.getsource(same), "def check(candidate):", *lines])
