r"""Decide whether two expressions are the same by their values: exactly where they are rational, else to many digits.

Rational expressions are computed with ``Fraction`` at integer points. With roots, exponentials or trigonometry in them they are
computed twice, to 30 and to 60 digits, at random real points: a difference that is truly zero shrinks with the precision, one
that is not stays. That needs no scale, so 1/2^99 and 1/2^98 differ and so do 1/2004! and 1/2006!. Whatever would take long, or
drown a small term in a large one (10^(10^9) + 1), is refused and left to another opinion. What has no value of its own (an
unknown function, a sum over k) is given one that depends on the values of its parts alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from stillhouse.pipeline.verifiers.digit_values import in_digits
from stillhouse.pipeline.verifiers.exact_values import BUDGET, NUM_POINTS, Irrational, Undecidable, exactly, is_constant
from stillhouse.pipeline.verifiers.tree import Tree, contains

_DIGITS = 30
_BROKEN_LINES = frozenset(["abs", "floor", "ceil", "max", "min", "mod"])
_MORE_POINTS = 33


def exact_value(tree: Tree) -> Fraction | None:
    """Return the value of a constant rational expression, None where it has none."""
    try:
        return exactly(tree, 0, [BUDGET])
    except (Irrational, Undecidable):
        return None


def same_value(left: Tree, right: Tree) -> bool:
    """Whether two expressions are equal, as numbers or as functions of their symbols (where these are positive).

    Raises:
        Undecidable: a value is not defined, or too large to compute.
    """
    if left == right:
        return True
    compare = _compared(left, right)
    for point in _points(left, right):
        try:
            if not compare(point):
                return False
        except Undecidable:
            if point < NUM_POINTS or any(_is_defined(side, point) for side in (left, right)):
                raise
    return True


def _is_defined(tree: Tree, point: int) -> bool:
    try:
        exactly(tree, point, [BUDGET])
    except Undecidable:
        return False
    except Irrational:
        with contextlib.suppress(Undecidable):
            in_digits(_DIGITS)[1](tree, point)
            return True
        return False
    return True


def constant_ratio(left: Tree, right: Tree) -> int | None:
    """Return the sign of ``left / right`` where that quotient is the same number everywhere and not zero; else None.

    Two equations ``left = 0`` and ``right = 0`` with such a quotient are the same equation.
    """
    ratio: Any = None
    for point in range(NUM_POINTS + (_MORE_POINTS if _is_broken(left, right) else 1)):
        try:
            over, under = exactly(left, point, [BUDGET]), exactly(right, point, [BUDGET])
        except (Irrational, Undecidable):
            if point > NUM_POINTS:
                continue
            return _ratio_in_digits(left, right)
        if not under or not over:
            if bool(under) != bool(over):
                return None
            continue
        if ratio is None:
            ratio = over / under
        elif ratio != over / under:
            return None
    return None if ratio is None else (1 if ratio > 0 else -1)


def _ratio_in_digits(left: Tree, right: Tree) -> int | None:
    context, value = in_digits(_DIGITS)
    ratio = None
    for point in range(NUM_POINTS + (_MORE_POINTS if _is_broken(left, right) else 0)):
        try:
            over, under = value(left, point), value(right, point)
        except Undecidable:
            if point < NUM_POINTS:
                raise
            continue
        if abs(under) < 1e-20 or abs(over) < 1e-20:
            return None
        if ratio is None:
            ratio = over / under
        elif abs(ratio - over / under) > abs(ratio) * context.mpf(10) ** (10 - _DIGITS):
            return None
    if abs(context.im(ratio)) > 1e-20 * abs(ratio):
        return None
    return 1 if context.re(ratio) > 0 else -1


def decimal_value(tree: Tree) -> Any:
    """Return the value of a constant expression to 30 digits, an ``mpf`` or ``mpc``."""
    return in_digits(_DIGITS)[1](tree, 0)


def _points(left: Tree, right: Tree) -> range:
    if is_constant(left) and is_constant(right):
        return range(1)
    return range(NUM_POINTS + _MORE_POINTS) if _is_broken(left, right) else range(NUM_POINTS)


def _is_broken(*trees: Tree) -> bool:
    """Whether a modulus bends or a floor steps: there large positive numbers say little, and small and negative ones count."""
    return any(contains(tree, "fn", _BROKEN_LINES) for tree in trees)


def _compared(left: Tree, right: Tree) -> Callable[[int], bool]:
    def compare(point: int) -> bool:
        try:
            return exactly(left, point, [BUDGET]) == exactly(right, point, [BUDGET])
        except (Irrational, Undecidable):
            return compare_digits(point)

    def compare_digits(point: int) -> bool:
        few_context, few = in_digits(_DIGITS)
        rough = few(left, point), few(right, point)
        difference = abs(rough[0] - rough[1])
        largest = max(abs(rough[0]), abs(rough[1]))
        noise = largest < few_context.mpf(10) ** (-_DIGITS * 2 // 3)  # sin(pi) and 0: only what shrinks is zero
        if difference > largest * few_context.mpf(10) ** (-_DIGITS // 3) and not noise:
            return False
        _, many = in_digits(2 * _DIGITS)
        fine = abs(many(left, point) - many(right, point))
        if fine <= largest * few_context.mpf(10) ** (-_DIGITS - _DIGITS // 2):
            return True
        return bool(fine * few_context.mpf(10) ** (_DIGITS // 2) < difference)

    return compare
