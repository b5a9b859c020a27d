"""Judge a number with a tolerance and a unit: ``1800 L`` is ``1.8 m^3``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from stillhouse.pipeline.verifiers.evaluate import decimal_value, exact_value
from stillhouse.pipeline.verifiers.exact_values import Undecidable, is_constant
from stillhouse.pipeline.verifiers.judgement import Judgement
from stillhouse.pipeline.verifiers.latex import Unreadable, normalized
from stillhouse.pipeline.verifiers.readings import readings
from stillhouse.pipeline.verifiers.tree import Tree
from stillhouse.pipeline.verifiers.units import DEGREE, is_known, unit_of

DEFAULT_REL_TOL = 1e-6


def verify_number(gold: str, answer: str, entry: Mapping[str, Any]) -> Judgement:
    """Judge a number, with or without unit.

    Args:
        gold: number and unit, ``1800 L``; the unit may stand in the entry.
        entry: ``rel_tol`` (1e-6 where neither is given), ``abs_tol`` in the gold's unit, ``unit``. An answer is right when it
            is within one of the two. A unit on one side alone is taken to be the other's; two units are converted.
    """
    try:
        gold_value, gold_unit = _number(gold)
    except (Unreadable, Undecidable) as error:
        return Judgement("undecided", f"the gold {gold[:40]!r} is not a number with a unit: {error}")
    try:
        rel_tol, abs_tol = (_tolerance(entry, name) for name in ("rel_tol", "abs_tol"))
    except ValueError as error:
        return Judgement("undecided", str(error))
    given_unit = entry.get("unit")
    if not isinstance(given_unit, str | None):
        return Judgement("undecided", f"the unit must be text, got {given_unit!r:.40}")
    try:
        value, unit = _number(answer)
    except (Unreadable, Undecidable) as error:
        return Judgement("wrong", f"not a number with a unit: {error}")
    gold_unit = gold_unit or given_unit or unit
    if unit is not None and gold_unit is not None:
        have, want = unit_of(unit), unit_of(gold_unit)
        if have.dimension == DEGREE and want.offset:  # 20° where °C is meant
            have = want
        if have.dimension != want.dimension:
            return Judgement("wrong", f"{unit} is not of the kind of {gold_unit}")
        value = (have.in_si(value) - want.offset) / want.factor
    if rel_tol is None and abs_tol is None:
        rel_tol = Fraction(str(DEFAULT_REL_TOL))
    gap = abs(value - gold_value)
    allowed = max((rel_tol or 0) * abs(gold_value), abs_tol or 0)
    near = gap <= allowed
    return Judgement("correct" if near else "wrong", f"off by {_short(gap)}, {_short(allowed)} allowed")


def _short(number: Fraction) -> str:
    try:
        return f"{float(number):.3g}"
    except OverflowError:
        return "more than 1e308"


def _tolerance(entry: Mapping[str, Any], name: str) -> Fraction | None:
    value = entry.get(name)
    if value is None:
        return None
    try:
        # By way of a float: "1e999999999" would be a fraction of as many digits.
        tolerance = Fraction(repr(float(value)))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} must be a number, got {value!r}") from error
    if tolerance < 0:
        raise ValueError(f"{name} must not be negative, got {value!r}")
    return tolerance


# A unit whose sign is no letter: in a box of text it would be rewritten as mathematics.
_SIGNED_UNIT = re.compile(r"(?:\\[,;:! ])?\s*\\(?:text|textrm|mathrm|mbox)\s*\{\s*([^{}]*[°µμΩ][^{}]*)\}")
# Here a letter is a unit and never a variable: "\\sqrt{2} m", "5m", and a lone "1,5" a decimal and no pair.
_WITH_UNIT = re.compile(r"(?P<value>.*?(?:[\d)}]|\\pi))\s*(?P<unit>[A-Za-zµ%][A-Za-zµ %/^{}*()\d-]*)")
_MARKED_UNIT = re.compile(r"\\(?:text\w*|mathrm|mbox|operatorname)\s*\{([^{}]*)\}")
_TIMES_UNIT = re.compile(r"(?<=[A-Za-z}\d])\s*\\cdot\s*(?=[A-Za-z])")
_DECIMAL_COMMA = re.compile(r"([-+]?\d+),(\d{1,2}|\d{4,})(?!\d)")
_EXPONENT = re.compile(r"(?<![A-Za-z\d.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d{1,4})(?![\w.])")
_SCALARS = frozenset(["num", "dec", "const", "add", "neg", "mul", "div", "pow", "fn"])


def _number(text: str) -> tuple[Fraction, str | None]:
    plain = _EXPONENT.sub(r"\1\\times 10^{\2}", _SIGNED_UNIT.sub(r" \1", text.replace("~", " ")))
    plain = _TIMES_UNIT.sub("*", _MARKED_UNIT.sub(r" \1 ", normalized(plain))).removeprefix("\\approx").strip()
    comma = _DECIMAL_COMMA.match(plain)
    if comma and "," not in plain[comma.end() :]:
        plain = f"{comma[1]}.{comma[2]}{plain[comma.end() :]}"
    if (parts := _WITH_UNIT.fullmatch(plain)) and is_known(parts["unit"]):
        tree: Tree = ("qty", _named_value(readings(parts["value"])[-1]), parts["unit"])
    else:
        tree = _named_value(readings(plain)[-1])
    unit = None
    if tree[0] == "qty":
        tree, unit = tree[1], tree[2]
    elif tree[0] == "pct":
        tree, unit = tree[1], "%"
    elif tree[0] == "deg":
        tree, unit = tree[1], "degree"
    if tree[0] not in _SCALARS or not is_constant(tree):
        raise Unreadable("no number")
    exact = exact_value(tree)
    if exact is not None:
        return exact, unit
    value = decimal_value(tree)
    if value.imag:
        raise Undecidable("a complex number")
    return Fraction(str(value.real)), unit


def _named_value(tree: Tree) -> Tree:
    """``x = 5`` is 5."""
    return tree[2][1] if tree[0] == "rel" and len(tree[2]) == 2 and tree[1] == ("=",) else tree
