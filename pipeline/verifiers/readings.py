r"""The ways to read an answer: what is written like no formula (clock times, number bases, units in plain letters, thousands)
or has two meanings (1,22 is a pair or a decimal; 35 cm a quantity or a product).
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from itertools import pairwise

from stillhouse.pipeline.verifiers.atoms import named_unit
from stillhouse.pipeline.verifiers.counting import with_binomials
from stillhouse.pipeline.verifiers.dates import date_of
from stillhouse.pipeline.verifiers.expressions import read
from stillhouse.pipeline.verifiers.latex import Refused, Unreadable, normalized, plain_words
from stillhouse.pipeline.verifiers.tree import Tree, negated
from stillhouse.pipeline.verifiers.units import is_known, unit_of

FORMULA_WORD = re.compile(
    r"(?:a|arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|sqrt|pi|inf|infty|infinity|lg|max|min|gcd|lcm|floor|ceil|and|or"
)
# A plain number or formula without letters of its own, then a blank and a unit in plain letters: 125 miles, 35 cm, 28 percent.
_TRAILING_UNIT = re.compile(
    r"(?P<value>[-+]?(?:[\d.,/ ()+*-]|\\(?:d|t)?frac\s*\{[\d.,]+\}\s*\{[\d.,]+\})*"
    r"(?:[\d)}]|\\(?:times|cdot)\s*10\s*\^\s*(?:\{[-+]?\d+\}|\d)))(?P<gap>\s*)"
    r"(?P<unit>(?:[A-Za-zµ€£¥]|\\%)[A-Za-zµ /.·]*(?:\^\{?-?\d\}?)?(?:/[A-Za-zµ]+(?:\^\{?-?\d\}?)?)?)"
)
_LEADING_CURRENCY = re.compile(r"(?P<unit>[€£¥])\s*(?P<value>[\d.,]+)")
_DECIMAL_COMMA = re.compile(r"([-+]?\d+),(\d{2,})")
_ONE_DECIMAL_COMMA = re.compile(r"([-+]?\d+),(\d)")
_SPACED_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+|,\d\d?)?")
_OTHER_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:'\d{3})+(?:\.\d+)?|[-+]?\d{1,3}(?:_\d{3})+|[-+]?\d{1,3}(?:\.\d{3}){2,}")
_EUROPEAN = re.compile(r"([-+]?\d{1,3}(?:\.\d{3})+),(\d+)")
_CLOCK = re.compile(r"(?P<hour>\d{1,2})(?P<rest>(?::\d{2}){0,2}) ?(?P<half>[ap])\.? ?m\.?")
_TIME = re.compile(r"(?P<hour>\d{1,2})(?P<rest>(?::\d{2}){1,2})")
_BASED = re.compile(
    r"(?:\(\s*)?(?:\\(?:text|mathrm|mathtt)\{)?(?P<digits>[0-9A-Fa-f]{1,400})\}?\s*\)?\s*_\s*\{?\s*(?:\\(?:text|mathrm)\{)?"
    r"(?P<radix>\d{1,2}|two|three|four|five|six|seven|eight|nine|ten|twelve|sixteen)\}{0,2}"
)
_PREFIXED = re.compile(r"0(?:x(?P<hex>[0-9A-Fa-f]{1,400})|b(?P<bin>[01]{1,1600})|o(?P<oct>[0-7]{1,400}))")
# Units of one or two letters that may touch their number; others are letters of a product there: 3cd, 2hp.
_GLUED_UNITS = frozenset([
    *("€", "£", "¥", "\\%", "mm", "cm", "dm", "km", "nm", "kg", "mg", "ml", "mL", "cL", "dL", "ft", "in", "lb", "oz", "yd"),
    *("mi", "ms", "Hz", "kN", "kJ", "kW", "kV", "mA"),
])  # fmt: skip
_RADIX_WORDS = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12,
    "sixteen": 16,
}  # fmt: skip
_RATIO_IN_WORDS = re.compile(r"(\d+(?:\.\d+)?) to (\d+(?:\.\d+)?)")
_COUNT_WORD = re.compile(
    r"(?P<number>\d[\d,]*(?:\.\d{1,30})?)[\s~]*(?P<text>\\text\s*\{\s*)?\b(?P<word>dozen|hundred|thousand|million|billion|trillion)s?\b(?P<end>\s*\})?"
)
_TIMES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# What may stand before an answer and says nothing: "=", "therefore", "Total:", "The answer is". Nothing else: "Half of it is".
_LEAD_IN = re.compile(
    r"\A(?:(?:\\approx|=|\\(?:implies|therefore|Longrightarrow)(?![A-Za-z]))\s*"
    r"|\\text\s*\{\s*(?:therefore|thus|so|hence),?\s*\}\s*,?\s*(?=\S)"
    r"|\\text\s*\{\s*(?:(?:therefore|thus|so|hence),? )?"
    r"(?:(?:the|our|my) )?(?:(?:final|correct|required|desired|total|only|exact|new|average|expected|maximum|minimum|largest"
    r"|smallest|greatest|least|surface|possible) ){0,2}"
    r"(?:(?:answer|value|total|result|area|sum|number|count|solution|root|probability|volume|perimeter|circumference|length|width"
    r"|height|distance|radius|diameter|angle|product|difference|quotient|remainder|maximum|minimum|mean|median|mode|average|ratio"
    r"|price|cost|profit|time|speed|weight|mass|age|integer|limit|slope|equation|set|range|domain|interval|point)s?"
    r"(?: (?:of|for) (?!(?:\w+ ){0,4}(?:half|twice|double|not|never|less|more)\b)[A-Za-z ]{1,30}?)?|it|this|that|which)"
    r"\s*(?:\bis|\bare|=|:)(?:\s*:)?\s*\}\s*:?\s*(?=\S))",
    re.IGNORECASE,
)
# P(A | B) is no modulus, and not P(B | A): its name is text.
_GIVEN = re.compile(r"\AP\(([^()=]*(?:\||\\mid)[^()=]*)\)\s*=")
# f(x) = x for all x: what is true of every function
_FOR_ALL = re.compile(
    r",?\s*(?:\\(?:text|mathrm)\s*\{[\s,]*for (?:all|any|every|each)(?: real(?: numbers?)?| integers?)?\s*\}|\\forall)\s*[a-z]"
    r"(?:\s*\\in\s*\\mathbb\s*\{?[RZNQC]\}?(?:\^[+*])?)?\s*\Z"
)
_UNIT_IN_BRACKETS = re.compile(r"(.*\d)\s*\(([A-Za-z][A-Za-z/ ^\d]*)\)")  # 36 (km/h)
_NUMBER_IN_TEXT = re.compile(r"\{?\s*\\(?:text\w*|mbox|mathrm|bold|emph)\s*\{\s*([-+]?\d[^{}]*)\}\s*\}?")
_PART_OF_QUANTITY = r"(\d+(?:\.\d+)?) ?([a-z]+)"
_TWO_UNITS = re.compile(rf"{_PART_OF_QUANTITY},?(?: and)? {_PART_OF_QUANTITY}(?:,?(?: and)? {_PART_OF_QUANTITY})?")
_POINT = re.compile(r"([A-Z]'?(?:_\{?\d\}?)?)\s*(\([^()=<>]*,[^()=<>]*\))")  # P(3, 4)


@functools.lru_cache(maxsize=4096)
def readings(text: str) -> tuple[Tree, ...]:
    """The ways to read an answer, the likeliest first.

    Raises:
        Unreadable: there is none.
    """
    plain = _FOR_ALL.sub("", _LEAD_IN.sub("", normalized(text), count=1))
    plain = _GIVEN.sub(
        lambda given: f"\\text{{P({re.sub(r'[^A-Za-z0-9|<>,]', '', given[1].replace(chr(92) + 'mid', '|'))})}}=", plain
    )
    if plain.endswith(")") and (bracketed := _UNIT_IN_BRACKETS.fullmatch(plain)) and is_known(bracketed[2]):
        plain = f"{bracketed[1]} {bracketed[2]}"
    if inside := _NUMBER_IN_TEXT.fullmatch(plain):
        return readings(inside[1])
    if (date := date_of(plain)) is not None:
        return (date,)
    if plain[:1].isdigit() or plain[:1] in ("(", "\\", "-", "+"):
        if any(word in plain for word in ("illion", "thousand", "hundred", "dozen")):
            plain = _COUNT_WORD.sub(_counted, plain)
        if (special := _not_a_formula(plain, plain_words(plain))) is not None:
            return special
    if unit := _LEADING_CURRENCY.fullmatch(plain):
        return (("qty", read(unit["value"]), unit["unit"]),)
    if (based := _based(plain)) is not None:
        return based
    if (unit := _TRAILING_UNIT.fullmatch(plain)) and _is_unit(unit["unit"], bool(unit["gap"])):
        value = read(unit["value"].rstrip())
        if unit["unit"].strip().casefold().rstrip(".") in ("\\%", "percent", "percentage", "pct"):
            return (("pct", value),)
        name = named_unit(unit["unit"].strip())
        quantity: Tree = ("qty", value, name)
        is_product = name.isalpha() and len(name) <= (1 if unit["gap"] else 2)  # 5 M, 3ft; not 5 kg
        return (quantity, read(plain)) if is_product else (quantity,)
    point = _POINT.fullmatch(plain)
    as_point = (read(f"{point[1]}={point[2]}"),) if point else ()
    if (counted := with_binomials(plain)) == plain:
        return (read(plain), *as_point)
    try:
        return (read(counted), read(plain), *as_point)  # C_5^2: or a power of C_5
    except Unreadable:  # a bare _5C_2 is no other formula
        return (read(counted),)


def decimal_with_comma(text: str) -> Tree | None:
    """Read 1,5 as 1.5: only for an answer to a gold that is a decimal, because 1,5 is two numbers else."""
    comma = _ONE_DECIMAL_COMMA.fullmatch(normalized(text))
    return read(f"{comma[1]}.{comma[2]}") if comma else None


def _not_a_formula(plain: str, words: str) -> tuple[Tree, ...] | None:
    if clock := _CLOCK.fullmatch(words):
        return (("time", int(clock["hour"]), clock["rest"] or ":00", clock["half"]),)
    if clock := _TIME.fullmatch(plain.replace(" ", "")):
        return (read(plain), ("time", int(clock["hour"]), clock["rest"], ""))
    if _SPACED_THOUSANDS.fullmatch(plain):
        return (read(plain.replace(" ", "").replace(",", ".")),)
    if _OTHER_THOUSANDS.fullmatch(plain):
        marks = "'" if "'" in plain else "_" if "_" in plain else "."
        return (read(plain.replace(marks, "")),)
    if european := _EUROPEAN.fullmatch(plain):
        return (read(plain), read(f"{european[1].replace('.', '')}.{european[2]}"))
    if comma := _DECIMAL_COMMA.fullmatch(plain):
        decimal = read(f"{comma[1]}.{comma[2]}")
        return (decimal,) if comma[1] in ("0", "-0") else (read(plain), decimal) if len(comma[2]) != 3 else (read(plain),)
    if ratio := _RATIO_IN_WORDS.fullmatch(words):
        return (("ratio", read(ratio[1]), read(ratio[2])),)
    if (parts := _TWO_UNITS.fullmatch(words)) and (total := _sum_of_units(parts)) is not None:
        return (total,)
    return None


def _counted(match: re.Match[str]) -> str:
    """2.5 million becomes 2500000; of a text that goes on (``\\text{ million dollars}``) the rest stays."""
    number = Fraction(match["number"].replace(",", "")) * _TIMES[match["word"]]
    plain = str(number) if number.denominator == 1 else f"{number.numerator}/{number.denominator}"
    return plain + ("\\text{" if match["text"] and not match["end"] else "" if match["text"] else match["end"] or "")


def _based(plain: str) -> tuple[Tree, ...] | None:
    r"""Numbers in a base that the reader of formulas would take for letters: ``1A_{16}``, ``(1010)_2``, ``0xFF``."""
    negative, plain = plain.startswith("-"), plain.removeprefix("-")
    if prefixed := _PREFIXED.fullmatch(plain):
        digits, radix = next((prefixed[name], base) for name, base in (("hex", 16), ("bin", 2), ("oct", 8)) if prefixed[name])
    elif based := _BASED.fullmatch(plain):
        digits, radix = based["digits"], _RADIX_WORDS.get(based["radix"]) or int(based["radix"])
        if not digits.isdigit() and not (digits[0].isdigit() or (radix == 16 and len(digits) > 1)):  # A_1 is a name
            return None
    else:
        return None
    try:
        tree: Tree = ("num", Fraction(int(digits, radix or 1)))  # a base of 0 would be Python's own
    except ValueError as error:
        raise Refused(f"{digits} is no number in base {radix}") from error
    return (negated(tree) if negative else tree,)


def _sum_of_units(parts: re.Match[str]) -> Tree | None:
    """``1 hour 30 minutes`` in its last unit; None where the units are unknown, not of one kind, or not falling."""
    numbers, names = parts.groups()[0::2], parts.groups()[1::2]
    pairs = [(Fraction(number), name) for number, name in zip(numbers, names) if number is not None]
    units = [unit_of(name) for _, name in pairs]
    falling = all(one.factor > other.factor and one.dimension == other.dimension for one, other in pairwise(units))
    if not falling or not all(unit.known for unit in units):
        return None
    total = sum((number * unit.factor for (number, _), unit in zip(pairs, units)), Fraction(0))
    return ("qty", ("num", total / units[-1].factor), pairs[-1][1])


def _is_unit(text: str, spaced: bool) -> bool:
    words = text.replace(".", " ").replace("/", " ").split()
    if any(FORMULA_WORD.fullmatch(word.casefold()) and word != "min" for word in words):
        return False
    if is_known(text):
        return spaced or len(text) > 2 or text in _GLUED_UNITS
    return spaced and any(len(word) >= 3 for word in words)
