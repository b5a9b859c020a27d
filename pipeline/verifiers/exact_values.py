"""Compute an expression exactly, with fractions, its symbols set to numbers of either sign; every step is bounded."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

from stillhouse.pipeline.verifiers.tree import Tree

NUM_POINTS = 3
BUDGET = 20_000
_MAX_BITS = 200_000
_WHOLE_LETTERS = tuple("ijklmnN")
_PARTS = tuple(Fraction(hundredths, 100) for hundredths in (1, 10, 25, 37, 50, 67, 83, 99))
_MAX_FACTORIAL = 5_000


class Undecidable(ArithmeticError):
    """The values cannot be computed within bounds, or are not defined."""


class Unknown(Undecidable):
    """A part whose value this module does not know; another opinion may."""


class Irrational(Exception):
    """The expression has a part that is not a fraction."""


def is_constant(tree: Tree) -> bool:
    """Whether a tree is an expression of numbers alone: no symbol, no text."""
    if tree[0] in ("num", "dec", "const"):
        return True
    if tree[0] in ("sym", "text", "opaque"):
        return False
    return all(is_constant(part) for part in tree[1:] if isinstance(part, tuple))


def is_negative(name: str, point: int) -> bool:
    """Whether a symbol is negative there: none is at the first points, then each has a sign of its own.

    Capitals share one: ``|AB|`` is the length ``AB`` before it is a modulus.
    """
    return point >= NUM_POINTS and hashed("A" if name[:1].isupper() else name, point, "sign") % 2 == 1


def _of_symbol(name: str, point: int) -> Fraction:
    if point <= NUM_POINTS:
        size = Fraction(hashed(name, point) % 999_983 + 2)
    else:
        number, limit = hashed(name, point), 10 ** (1, 0, 1, 2, 1, 3, 0, 4)[point % 8]
        # Letters that count are whole; the floor of any other is not the letter itself.
        part = 1 if name.startswith(_WHOLE_LETTERS) else _PARTS[number // limit % len(_PARTS)]
        size = number % limit + Fraction(part)
    return -size if is_negative(name, point) else size


def hashed(*parts: object) -> int:
    """A number that depends on the parts alone, the same on every machine."""
    # hexadecimal: Python refuses to write integers of more than 4,300 digits in decimal
    texts = [f"{part.numerator:x}/{part.denominator:x}" if isinstance(part, Fraction) else repr(part) for part in parts]
    return int.from_bytes(hashlib.blake2b(repr(texts).encode(), digest_size=5).digest(), "big")


def exactly(tree: Tree, point: int, budget: list[int]) -> Fraction:
    """The value at one of the points; every step on long numbers takes from the budget, as much as its time grows."""
    kind = tree[0]
    if kind in ("num", "dec"):
        return tree[1]
    if kind == "sym":
        return _of_symbol(tree[1], point)
    if kind == "add":
        total = Fraction(0)
        for part in tree[1:]:
            total += exactly(part, point, budget)
            _charge(total, budget)
        return total
    if kind == "neg":
        return -exactly(tree[1], point, budget)
    if kind == "mul":
        product = Fraction(1)
        for part in tree[1:]:
            product *= exactly(part, point, budget)
            _charge(product, budget)
        return product
    if kind in ("div", "ratio"):
        quotient = exactly(tree[1], point, budget)
        for part in tree[2:]:
            divisor = exactly(part, point, budget)
            if not divisor:
                raise Undecidable("division by zero")
            quotient /= divisor
            _charge(quotient, budget)
        return quotient
    if kind == "pow":
        if not is_constant(tree[2]):  # the sign of (-1)^n at three points is a matter of luck
            raise Irrational
        return _exact_power(exactly(tree[1], point, budget), exactly(tree[2], point, budget))
    if kind == "pct":
        return exactly(tree[1], point, budget) / 100
    if kind in ("rel", "list", "tuple"):  # inside a sum's bounds, or the arguments of an unknown function
        kind = (kind, tree[1]) if kind == "rel" else kind
        return Fraction(hashed(kind, *(exactly(part, point, budget) for part in parts_of(tree))) + 2)
    if kind == "opaque":
        return Fraction(
            hashed(tree[1], *(exactly(part, point, budget) if isinstance(part, tuple) else part for part in tree[2:])) + 2
        )
    if kind == "fn":
        return _exact_function(tree, point, budget)
    if kind in ("const", "deg"):
        raise Irrational
    # Words and units: nobody else's opinion, which passes them over.
    raise (Undecidable if kind in ("text", "qty", "set") else Unknown)(f"{kind} has no value")


def parts_of(tree: Tree) -> tuple[Tree, ...]:
    """The trees in a relation, a list or a tuple."""
    return tree[2] if tree[0] == "rel" else tree[1:]


def _charge(number: Fraction, budget: list[int]) -> None:
    bits = number.numerator.bit_length() + number.denominator.bit_length()
    if bits < 4_096:
        return
    budget[0] -= (bits >> 12) ** 2  # reducing a fraction is quadratic in its length
    if bits > _MAX_BITS or budget[0] < 0:
        raise Undecidable("too large a number")


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        odd_of_negative = base < 0 and exponent.denominator % 2 == 1  # the real one: the cube root of -8 is -2
        root = _exact_root(-base if odd_of_negative else base, exponent.denominator)
        if root is None:
            raise Irrational
        base = -root if odd_of_negative else root
    whole = exponent.numerator
    if not base:
        if whole <= 0:
            raise Undecidable("zero to that power")
        return base
    if abs(base) == 1:
        return base if whole % 2 else Fraction(1)
    if (base.numerator.bit_length() + base.denominator.bit_length()) * abs(whole) > _MAX_BITS:
        raise Undecidable("too large a power")
    return base**whole


def _exact_root(number: Fraction, degree: int) -> Fraction | None:
    """The root where it is a fraction; None else, and for what is negative or long."""
    if number < 0 or degree > 64 or number.numerator.bit_length() + number.denominator.bit_length() > 4_096:
        return None
    parts = []
    for part in (number.numerator, number.denominator):
        root = math.isqrt(part) if degree == 2 else _integer_root(part, degree)
        if root**degree != part:
            return None
        parts.append(root)
    return Fraction(parts[0], parts[1])


def _integer_root(number: int, degree: int) -> int:
    low, high = 0, 1 << (number.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= number else (low, middle - 1)
    return low


def _exact_function(tree: Tree, point: int, budget: list[int]) -> Fraction:
    name = tree[1]
    values = [exactly(part, point, budget) for part in tree[2:]]
    if name == "abs":
        return abs(values[0])
    if name == "root":
        if not values[1]:
            raise Undecidable("a root of degree zero")
        return _exact_power(values[0], 1 / values[1])
    if name == "factorial" and values[0].denominator == 1 and is_constant(tree):
        if not 0 <= values[0] <= _MAX_FACTORIAL:
            raise Undecidable("too large a factorial")
        return Fraction(math.factorial(int(values[0])))
    if name == "binomial" and all(v.denominator == 1 for v in values) and is_constant(tree):
        if not 0 <= values[1] <= values[0] <= _MAX_FACTORIAL:
            raise Undecidable("too large a binomial coefficient")
        return Fraction(math.comb(int(values[0]), int(values[1])))
    if name in ("floor", "ceil"):
        return Fraction(math.floor(values[0]) if name == "floor" else math.ceil(values[0]))
    if name == "mod" and values[1] > 0:
        return values[0] % values[1]
    if name in ("max", "min"):
        return max(values) if name == "max" else min(values)
    if name in ("gcd", "lcm") and all(v.denominator == 1 for v in values):
        return Fraction((math.gcd if name == "gcd" else math.lcm)(*(int(v) for v in values)))
    raise Irrational
