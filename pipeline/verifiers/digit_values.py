"""Compute an expression to many digits with mpmath, its symbols set to positive reals; sizes are bounded."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from stillhouse.pipeline.verifiers.exact_values import (
    BUDGET,
    Irrational,
    Undecidable,
    Unknown,
    exactly,
    hashed,
    is_constant,
    is_negative,
    parts_of,
)
from stillhouse.pipeline.verifiers.tree import Tree

_MAX_EXPONENT_BITS = 64

_contexts: dict[int, Any] = {}


def in_digits(digits: int) -> tuple[Any, Callable[[Tree, int], Any]]:
    """Return mpmath's context of that many digits and ten, and a function from (tree, point) to the value in it."""
    if digits not in _contexts:
        import mpmath  # a tenth of a second; only where a root or a sine is compared

        context = mpmath.mp.clone()
        context.dps = digits + 10
        _contexts[digits] = context
    context = _contexts[digits]

    def value(tree: Tree, point: int) -> Any:
        try:
            number = _decimal(tree, point, context)
        except (ValueError, ZeroDivisionError, OverflowError, TypeError, context.NoConvergence) as error:
            raise Undecidable(str(error)) from error
        if not context.isfinite(number):  # the logarithm of zero
            raise Undecidable("not a finite value")
        return number

    return context, value


def _decimal(tree: Tree, point: int, mp: Any) -> Any:
    kind = tree[0]
    if kind in ("num", "dec"):
        top, bottom = mp.mpf(tree[1].numerator), mp.mpf(tree[1].denominator)
        if top != tree[1].numerator or bottom != tree[1].denominator:
            raise Undecidable("more digits than are compared")
        return top / bottom
    if kind == "sym":
        size = mp.mpf(hashed(tree[1], point) % 1_999_993 + 7) / 1_000_003  # within (0, 2): sines stay sharp, powers small
        return -size if is_negative(tree[1], point) else size
    if kind == "const":
        if tree[1] == "inf":
            raise Undecidable("infinity has no value")
        return {"pi": mp.pi, "e": mp.e, "i": mp.j}[tree[1]] * 1
    if kind == "add":
        return _decimal_sum([_decimal(part, point, mp) for part in tree[1:]], mp)
    if kind == "neg":
        return -_decimal(tree[1], point, mp)
    if kind == "mul":
        product = mp.mpf(1)
        for part in tree[1:]:
            product *= _decimal(part, point, mp)
        return product
    if kind in ("div", "ratio"):
        quotient = _decimal(tree[1], point, mp)
        for part in tree[2:]:
            quotient /= _decimal(part, point, mp)
        return quotient
    if kind == "pow":
        base, exponent = _decimal(tree[1], point, mp), _decimal(tree[2], point, mp)
        if mp.im(base) == 0 and mp.re(base) < 0 and (odd := _odd_denominator(tree[2])):
            return _decimal_power(-base, exponent, mp) * (-1) ** odd.numerator
        return _decimal_power(base, exponent, mp)
    if kind == "pct":
        return _decimal(tree[1], point, mp) / 100
    if kind == "deg":
        return _decimal(tree[1], point, mp) * mp.pi / 180
    if kind in ("rel", "list", "tuple"):
        values = tuple(mp.nstr(_decimal(part, point, mp), 20) for part in parts_of(tree))
        return mp.mpf(hashed((kind, tree[1]) if kind == "rel" else kind, *values) + 2) / (1 << 39)
    if kind == "opaque":
        values = (mp.nstr(_decimal(part, point, mp), 20) if isinstance(part, tuple) else part for part in tree[2:])
        return mp.mpf(hashed(tree[1], *values) + 2) / (1 << 39)
    if kind == "fn" and tree[1] in ("floor", "ceil") and not is_constant(tree):  # of what is no fraction: by the argument
        return mp.mpf(hashed(tree[1], mp.nstr(_decimal(tree[2], point, mp), 20)) + 2) / (1 << 39)
    if kind == "fn":
        return _decimal_function(tree[1], [_decimal(part, point, mp) for part in tree[2:]], mp)
    raise (Undecidable if kind in ("text", "qty", "set") else Unknown)(f"{kind} has no value")


def _decimal_sum(terms: list[Any], mp: Any) -> Any:
    largest = max(abs(term) for term in terms)
    for term in terms:
        if term and abs(term) * mp.mpf(10) ** 20 < largest:
            raise Undecidable("a term drowns in the others")
    return mp.fsum(terms)


def _odd_denominator(exponent: Tree) -> Fraction | None:
    """An exponent such as 1/3 or 2/5, by which a negative number has a real power."""
    if not is_constant(exponent):
        return None
    try:
        value = exactly(exponent, 0, [BUDGET])
    except (Irrational, Undecidable):
        return None
    return value if value.denominator % 2 == 1 and value.denominator > 1 else None


def _decimal_power(base: Any, exponent: Any, mp: Any) -> Any:
    if abs(exponent) > 1 << _MAX_EXPONENT_BITS or (base and abs(mp.log(abs(base), 2) * exponent) > 1 << 20):
        raise Undecidable("too large a power")
    return mp.power(base, exponent)


def _decimal_function(name: str, values: list[Any], mp: Any) -> Any:
    first = values[0]
    if name == "abs":
        return abs(first)
    if name == "root":
        if values[1] == 2:
            return mp.sqrt(first)
        real_odd = mp.im(first) == 0 and mp.re(first) < 0 and mp.im(values[1]) == 0 and values[1] % 2 == 1
        return -mp.power(-first, 1 / values[1]) if real_odd else mp.power(first, 1 / values[1])
    if abs(first) > 1 << 20:
        raise Undecidable("too large an argument")
    if name == "ln":
        if not first:
            raise Undecidable("the logarithm of zero")
        return mp.ln(first)
    if name == "factorial":
        return mp.gamma(first + 1)
    if name == "binomial":
        if abs(values[1]) > 1 << 20:
            raise Undecidable("too large an argument")
        return mp.binomial(first, values[1])
    if name in ("floor", "ceil"):
        return mp.floor(first) if name == "floor" else mp.ceil(first)
    if name in ("max", "min"):
        return max(values) if name == "max" else min(values)
    functions = {
        "sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "cot": mp.cot, "sec": mp.sec, "csc": mp.csc, "arcsin": mp.asin,
        "arccos": mp.acos, "arctan": mp.atan, "sinh": mp.sinh, "cosh": mp.cosh, "tanh": mp.tanh, "exp": mp.exp,
    }  # fmt: skip
    if name not in functions:
        raise Unknown(f"{name} is not known")
    return functions[name](first)
