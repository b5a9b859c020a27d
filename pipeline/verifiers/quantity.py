"""Judge a number with a tolerance and a unit: ``1800 L`` is ``1.8 m^3``."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from stillhouse.pipeline.verifiers.evaluate import decimal_value, exact_value
from stillhouse.pipeline.verifiers.exact_values import Undecidable, is_constant
from stillhouse.pipeline.verifiers.judgement import Judgement
from stillhouse.pipeline.verifiers.latex import Unreadable, normalized
from stillhouse.pipeline.verifiers.readings import readings
from stillhouse.pipeline.verifiers.tree import Tree
from stillhouse.pipeline.verifiers.units import DEGREE, is_known, plain_signs, unit_of

DEFAULT_REL_TOL = 1e-6
_NO_NUMBER = (Unreadable, ArithmeticError, RecursionError)  # Undecidable is an ArithmeticError


def verify_number(gold: str, answer: str, entry: Mapping[str, Any]) -> Judgement:
    """Judge a number, with or without unit.

    Args:
        gold: number and unit, ``1800 L``; the unit may stand in the entry.
        entry: ``rel_tol`` (1e-6 where neither is given), ``abs_tol`` in the gold's unit, ``unit``. An answer is right when it
            is within one of the two. A unit on one side alone is taken to be the other's, but for a per cent sign: 25% is 25
            and 0.25; two units are converted.
    """
    try:
        gold_value, gold_unit = _number(gold)
    except _NO_NUMBER as error:
        return Judgement("undecided", f"the gold {gold[:40]!r} is not a number with a unit: {_why(error)}")
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
        return Judgement("wrong", f"not a number with a unit: {_why(error)}")
    except (ArithmeticError, RecursionError) as error:
        return Judgement("undecided", _why(error))
    gold_unit = gold_unit or (given_unit.strip() if given_unit else None) or None
    values = [value]
    if unit == "%" and gold_unit is None:
        values = [value / 100] if abs(gold_value) < 1 else [value, value / 100]
    elif unit is not None and gold_unit is not None:
        factor = _converted(unit, gold_unit)
        if factor is None:
            return Judgement("wrong", f"{unit} is not of the kind of {gold_unit}")
        values = [factor(value)]
    if rel_tol is None and abs_tol is None:
        rel_tol = Fraction(str(DEFAULT_REL_TOL))
    gap = min(abs(value - gold_value) for value in values)
    allowed = max((rel_tol or 0) * abs(gold_value), abs_tol or 0)
    near = gap <= allowed
    return Judgement("correct" if near else "wrong", f"off by {_short(gap)}, {_short(allowed)} allowed")


def _converted(unit: str, wanted: str) -> Callable[[Fraction], Fraction] | None:
    """How a number in one unit becomes one in another; None where they are not of one kind."""
    have, want = unit_of(unit), unit_of(wanted)
    if want.offset and have.dimension == DEGREE:  # 20° where °C is meant
        have = want
    elif want.offset and unit.strip() in ("C", "F"):  # 20 C, no coulombs
        have = unit_of(f"deg{unit.strip()}")
    elif {unit.strip(" s").casefold(), wanted.strip(" s").casefold()} == {"£", "pound"}:
        have = want
    have_factor, want_factor = have.factor, want.factor
    if have.dimension != want.dimension:
        # An angle has no dimension: rad/s is 1/s. A hertz is one turn in a second: 60 rpm, and not 1 rad/s.
        turns = [dict(each.dimension).get("degree", 0) for each in (have, want)]
        rest = [{base: power for base, power in each.dimension if base != "degree"} for each in (have, want)]
        if rest[0] != rest[1] or not any(rest[0]):
            return None
        angle = unit_of("rev" if _HERTZ.search(unit + " " + wanted) else "rad").factor
        have_factor, want_factor = (each.factor / angle**turn for each, turn in zip((have, want), turns))
    return lambda value: (value * have_factor + have.offset - want.offset) / want_factor


def _why(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error) or "it has no value"


def _short(number: Fraction) -> str:
    try:
        return f"{float(number):.3g}"
    except OverflowError:
        return "more than 1e308"


def _tolerance(entry: Mapping[str, Any], name: str) -> Fraction | None:
    value = entry.get(name)
    if value is None:
        return None
    if isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r}")
    try:
        # By way of a float: "1e999999999" would be a fraction of as many digits.
        tolerance = Fraction(repr(float(value)))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} must be a number, got {value!r}") from error
    if tolerance < 0:
        raise ValueError(f"{name} must not be negative, got {value!r}")
    return tolerance


_DECIMAL_COMMA = re.compile(r"([-+]?\d+),(\d{1,2}|\d{4,})(?!\d)")
_EXPONENT = re.compile(r"(?<![A-Za-z\d.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d{1,4})(?![\w.])")
_UPRIGHT_NUMBER = re.compile(r"\\(?:text|math)(?:bf|rm|tt|sf|it)?\s*\{\s*([-+]?[\d.,]+)\s*\}")
_EQUALS = re.compile(r"(?<![<>!:=\\])=(?!=)|≈|≃|\\(?:approx|simeq)(?![A-Za-z])")
_IN_BRACES = re.compile(r"\{[^{}]*\}")
_TERM = re.compile(r"-?\s*[\d.]*\s*[A-Za-z]\s*[-+/]\s*[\d.]+|(?:-|-?\s*[\d.]+)\s*[A-Za-z]")
_SUBSCRIPT = re.compile(r"_\{[^{}]*\}")
_SEVERAL = re.compile(r"[,;]|\b(?:and|or)\b")
# Where a unit may begin: behind a digit, a bracket or pi. Here a letter is a unit and never a variable: "\\sqrt{2} m", "5m".
_UNIT_BEGINS = re.compile(
    r"(?<=[\d)}i½⅓⅔¼¾⅛])(?=(?:[\s~]|\\[,;:! ])*(?:[A-Za-zµÅ°%$€£¥₹(/]|(?:\^\s*)?(?:\{\s*)?\\(?:circ|degree)|\\[A-Za-z%$])"
    r"|[\s~]+1/[A-Za-z])"
)
_MAX_UNIT_CHARS = 120
_MAX_UNIT_WORDS = 6
_END_OF_PHRASE = re.compile(r"\.\s|[,;:!?\n]|(?<![/*·])\s\(")
_LEADING_CURRENCY = re.compile(
    r"([-+−]?)\s*(?:(US)?\\?\$|([€£¥₹])|(USD|EUR|GBP|JPY|INR|Rs\.?)(?![A-Za-z]))[\s~]*(?=[-+−]?[\d.])"
)
_CURRENCIES = {"USD": "$", "EUR": "€", "GBP": "£", "JPY": "¥", "INR": "₹", "Rs": "₹", "Rs.": "₹"}
_HERTZ = re.compile(r"Hz(?![A-Za-z])|[Hh]ertz")
_PER = re.compile(r"(?:\\text\w*\s*\{)?\s*(?:/|per\b)")
_SCALARS = frozenset(["num", "dec", "const", "add", "neg", "mul", "div", "pow", "fn"])
_ROUGHLY = Fraction(1, 20)


def _number(text: str) -> tuple[Fraction, str | None]:
    """Read a number and its unit; of ``v = 9.8 · 2 ≈ 19.6 m/s`` the exactest member, if the others are about the same."""
    text = plain_signs(text).strip().rstrip("\\").strip()
    if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1].replace("\\$", ""):
        text = text[1:-1].strip()
    bare = _IN_BRACES.sub("", _IN_BRACES.sub("", text))
    members = [member.strip() for member in _EQUALS.split(text)]
    if len(members) == 1 or len(_EQUALS.findall(bare)) < len(members) - 1:
        return _one_number(text)
    found: list[tuple[Fraction, str | None]] = []
    for member in members:
        try:
            found.append(_one_number(member))
        except _NO_NUMBER:
            if _SEVERAL.search(_SUBSCRIPT.sub("", member)):  # x = 5, y = 6
                raise Unreadable("several numbers") from None
            if _TERM.fullmatch(member):  # 2x = 5
                raise Unreadable("an equation that is not solved") from None
            last_is_name = len(members) == 2 and member is members[-1]  # 5 = x
            if member is members[-1] and not last_is_name:
                raise
    if not found:
        raise Unreadable("no number")
    value, unit = found[-1]
    for other, other_unit in reversed(found[:-1]):
        same = value
        if None not in (unit, other_unit):
            factor = _converted(unit, other_unit)
            if factor is None:
                raise Unreadable("two kinds of unit")
            same = factor(value)
        if abs(other - same) > _ROUGHLY * abs(other):
            raise Unreadable("two different numbers")
        value, unit = other, other_unit or unit
    return value, unit


def _one_number(text: str) -> tuple[Fraction, str | None]:
    text = _UPRIGHT_NUMBER.sub(r"\1", text)
    if currency := _LEADING_CURRENCY.match(text):
        sign, _, symbol, word = currency.groups()
        name = symbol or _CURRENCIES.get(word or "", "$")
        value, unit = _one_number(sign + text[currency.end() :])
        if unit is not None and _PER.match(unit):  # $5 per kg
            return value, f"{name} {unit}"
        if unit is not None and unit_of(unit).dimension != unit_of(name).dimension:
            raise Unreadable("two units")
        return value, unit or name
    for begin in _UNIT_BEGINS.finditer(text, 1):
        unit = text[begin.end() :].strip(" ~").removeprefix("\\,").strip(" ~")
        if len(unit) > _MAX_UNIT_CHARS or not is_known(unit):
            continue
        with contextlib.suppress(*_NO_NUMBER):  # 1 hour 30 minutes
            return _exact(_named_value(_readings(text[: begin.start()]))), "%" if unit_of(unit) == unit_of("%") else unit
    tree = _named_value(_readings(text))
    unit = None
    if tree[0] == "qty":
        tree, unit = tree[1], tree[2]
    elif tree[0] == "pct":
        tree, unit = tree[1], "%"
    elif tree[0] == "deg":
        tree, unit = tree[1], "degree"
    return _exact(tree), unit


def _readings(text: str) -> Tree:
    plain = normalized(_EXPONENT.sub(r"\1\\times 10^{\2}", text.replace("~", " "))).removeprefix("\\approx").strip()
    comma = _DECIMAL_COMMA.match(plain)
    if comma and "," not in plain[comma.end() :]:
        plain = f"{comma[1]}.{comma[2]}{plain[comma.end() :]}"
    return readings(plain)[-1]


def _exact(tree: Tree) -> Fraction:
    if tree[0] not in _SCALARS or not is_constant(tree):
        raise Unreadable("no number")
    exact = exact_value(tree)
    if exact is not None:
        return exact
    value = decimal_value(tree)
    if value.imag:
        raise Undecidable("a complex number")
    return Fraction(str(value.real))


def with_unit(found: str, text: str) -> str:
    """Return the last occurrence of a number in prose with the unit that follows it: ``5 km`` of "it is 5 km away".

    The number as it was found where nothing follows that belongs to it.
    """
    with contextlib.suppress(*_NO_NUMBER):
        if _number(found)[1] is not None:
            return found
    at = text.rfind(found)
    following = _END_OF_PHRASE.split(text[at + len(found) : at + len(found) + _MAX_UNIT_CHARS])[0] if at >= 0 else ""
    words = re.findall(r"\s*\S+", following)[:_MAX_UNIT_WORDS]
    for num_words in range(len(words), 0, -1):
        longer = found + "".join(words[:num_words]).rstrip(".*")
        if longer.endswith(" in") and num_words < len(words):  # 5 in total
            continue
        with contextlib.suppress(*_NO_NUMBER):
            _, unit = _number(longer)
            if unit is None or is_known(unit):
                return longer
    return found


def _named_value(tree: Tree) -> Tree:
    """``x = 5`` is 5."""
    return tree[2][1] if tree[0] == "rel" and len(tree[2]) == 2 and tree[1] == ("=",) else tree
