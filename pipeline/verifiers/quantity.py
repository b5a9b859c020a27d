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
from stillhouse.pipeline.verifiers.math_answer import readings
from stillhouse.pipeline.verifiers.tree import Tree
from stillhouse.pipeline.verifiers.units import is_known, unit_of

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
    try:
        value, unit = _number(answer)
    except (Unreadable, Undecidable) as error:
        return Judgement("wrong", f"not a number with a unit: {error}")
    gold_unit = gold_unit or entry.get("unit") or unit
    if unit is not None and gold_unit is not None:
        have, want = unit_of(unit), unit_of(gold_unit)
        if have.dimension != want.dimension:
            return Judgement("wrong", f"{unit} is not of the kind of {gold_unit}")
        value *= have.factor / want.factor
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
        tolerance = Fraction(str(value))
    except ValueError as error:
        raise ValueError(f"{name} must be a number, got {value!r}") from error
    if tolerance < 0:
        raise ValueError(f"{name} must not be negative, got {value!r}")
    return tolerance


# Here a letter is a unit and never a variable: "\\sqrt{2} m", "5m".
_WITH_UNIT = re.compile(r"(?P<value>.*[\d)}])\s*(?P<unit>[A-Za-zµ%][A-Za-zµ %/^{}\d-]*)")


def _number(text: str) -> tuple[Fraction, str | None]:
    plain = normalized(text)
    if (parts := _WITH_UNIT.fullmatch(plain)) and is_known(parts["unit"]):
        tree: Tree = ("qty", readings(parts["value"])[-1], parts["unit"])
    else:
        tree = readings(plain)[-1]  # 1000,99 as a number, not as a pair
    if tree[0] == "rel" and len(tree[2]) == 2 and tree[1] == ("=",):
        tree = tree[2][1]
    unit = None
    if tree[0] == "qty":
        tree, unit = tree[1], tree[2]
    elif tree[0] == "pct":
        tree, unit = tree[1], "%"
    elif tree[0] == "deg":
        tree, unit = tree[1], "degree"
    if not is_constant(tree):
        raise Unreadable("no number")
    exact = exact_value(tree)
    if exact is not None:
        return exact, unit
    value = decimal_value(tree)
    if value.imag:
        raise Undecidable("a complex number")
    return Fraction(str(value.real)), unit
