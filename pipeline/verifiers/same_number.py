"""Decide whether two numbers, quantities or expressions are the same; where a decimal is exact and where it is rounded."""

from __future__ import annotations

from fractions import Fraction

from stillhouse.pipeline.verifiers.evaluate import decimal_value, exact_value, same_value
from stillhouse.pipeline.verifiers.exact_values import Undecidable, Unknown, is_constant
from stillhouse.pipeline.verifiers.latex import plain_words
from stillhouse.pipeline.verifiers.tree import BIG_OPERATORS, Tree, contains
from stillhouse.pipeline.verifiers.units import DEGREE, Unit, unit_of

_ANSWER_DIGITS = 10
_GOLD_DIGITS = 4
_GREY_DIGITS = 3
_INEXACT_TOLERANCE = 1e-12
_FLOAT_DIGITS = 17
_FLOAT_NOISE = 2.0**-51  # 7/3 in double precision prints as 2.3333333333333335
_MARKS = {"pct": "%", "deg": "degree"}


def same_quantity(gold: Tree, answer: Tree) -> bool:
    if (gold[0] == "qty") != (answer[0] == "qty"):
        gold, answer = _degrees(gold), _degrees(answer)  # 45 degrees may be pi/4
    if "qty" in (gold[0], answer[0]):
        gold, answer = (("qty", tree[1], _MARKS[tree[0]]) if tree[0] in _MARKS else tree for tree in (gold, answer))
    gold_unit, answer_unit = (tree[2] if tree[0] == "qty" else None for tree in (gold, answer))
    if gold_unit is not None and answer_unit is not None:
        one, other = unit_of(gold_unit), unit_of(answer_unit)
        gold_number, number = gold[1], answer[1]
        if one == other or plain_words(gold_unit) == plain_words(answer_unit):
            return same_number(gold_number, number)
        if not one.known and not other.known:
            raise Undecidable(f"the units {gold_unit!r} and {answer_unit!r} are not known")
        if {one.offset, other.offset} != {0} and DEGREE in (one.dimension, other.dimension):  # 20° of 20 °C
            return same_number(gold_number, number)
        if one.dimension == other.dimension == DEGREE:  # one of them radians, whose factor is no fraction
            sides = ((gold_number, one), (number, other))
            return same_value(*(("deg", side) if unit.factor == 1 else side for side, unit in sides))
        if _says_more(gold_unit, one, answer_unit, other):
            return same_number(gold_number, number)
        if {gold_unit.strip(), answer_unit.strip(" s")} == {"£", "pound"}:
            return same_number(gold_number, number)
        if one.dimension != other.dimension:
            return False
        return same_value(_in_si(gold_number, one), _in_si(number, other))
    if gold_unit is not None or answer_unit is not None:
        gold, answer = (tree[1] if tree[0] == "qty" else tree for tree in (gold, answer))
        return same_quantity(gold, answer)
    for mark in ("pct", "deg"):
        if mark in (gold[0], answer[0]):
            if gold[0] == answer[0]:
                return same_number(gold[1], answer[1])
            value = exact_value(gold)
            if mark == "pct" and answer[0] == "pct" and value is not None and abs(value) < 1:
                return same_number(gold, answer)  # 0.25 is 25%, and not 0.25%
            bare = [tree[1] if tree[0] == mark else tree for tree in (gold, answer)]
            return same_number(*bare) or same_number(gold, answer)
    return same_number(gold, answer)


def _degrees(tree: Tree) -> Tree:
    if tree[0] != "qty":
        return tree
    unit = unit_of(tree[2])
    return ("deg", tree[1]) if unit.dimension == DEGREE and unit.factor == 1 else tree


def _says_more(gold: str, gold_unit: Unit, answer: str, unit: Unit) -> bool:
    """Whether one of two units is the other and further words: years, years old; not apples per day."""
    words, more = sorted((plain_words(gold).split(), plain_words(answer).split()), key=len)
    if not words or (gold_unit.known and unit.known) or {"per", "squared", "cubed", "square", "cubic"} & set(more):
        return False
    return more[: len(words)] == words and all(word.isalpha() for word in more)


def _in_si(number: Tree, unit: Unit) -> Tree:
    return ("add", ("mul", ("num", unit.factor), number), ("num", unit.offset))


def _lone_decimal(tree: Tree) -> tuple[Fraction, int, int] | None:
    """(value, places, significant digits) of an answer that is one decimal and nothing else."""
    if tree[0] != "dec":
        return None
    digits = len(str(abs(tree[1] * 10 ** tree[2]).numerator)) if tree[1] else 0
    return tree[1], tree[2], digits


def same_number(gold: Tree, answer: Tree) -> bool:
    if ("const", "inf") in (gold, answer) or ("neg", ("const", "inf")) in (gold, answer):
        return gold == answer
    if same_value(gold, answer):
        return True
    if contains(gold, "opaque", BIG_OPERATORS) or contains(answer, "opaque", BIG_OPERATORS):
        raise Unknown("a sum, product, integral or limit in it")
    gold_decimal, decimal = _lone_decimal(gold), _lone_decimal(answer)
    if (gold_decimal is None and decimal is None) or not (is_constant(gold) and is_constant(answer)):
        return False
    gap = _distance(gold, answer)
    if gold_decimal is not None and decimal is not None and min(gold_decimal[2], decimal[2]) > _FLOAT_DIGITS:
        return False
    if gold_decimal is not None and gap <= _INEXACT_TOLERANCE * abs(float(gold_decimal[0])):
        return True
    if gold_decimal is None and decimal is not None and decimal[2] >= _ANSWER_DIGITS:
        return not _ends(gold) and gap <= max(10.0 ** -decimal[1], _FLOAT_NOISE * abs(float(decimal[0])))
    halves = [(0.5 * 10.0 ** -lone[1], lone[2]) for lone in (gold_decimal, decimal) if lone is not None]
    half, digits = max(halves)
    if gap > half * (1 + 1e-12) or digits < _GREY_DIGITS:
        return False
    if decimal is None and digits >= _GOLD_DIGITS:
        return True
    raise Undecidable("equal only to the digits that are written")


def _ends(tree: Tree) -> bool:
    """Whether a number can be written as a decimal in full; then nothing less will do."""
    value = exact_value(tree)
    return value is not None and 10**400 % value.denominator == 0


def _distance(left: Tree, right: Tree) -> float:
    exact = exact_value(left), exact_value(right)
    if exact[0] is not None and exact[1] is not None:
        return float(abs(exact[0] - exact[1]))
    return float(abs(decimal_value(left) - decimal_value(right)))
