"""Units of measurement: read one, and convert between those of the same kind, exactly.

A small table on purpose: SI and what school problems use beside it. A word that is not in it is a unit of its own kind
(apples), equal only to itself.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

from stillhouse.pipeline.verifiers.latex import with_powers

_PREFIXES = {
    "f": "1e-15", "p": "1e-12",
    "n": "1e-9", "µ": "1e-6", "u": "1e-6", "m": "1e-3", "c": "1e-2", "d": "1e-1", "da": "1e1", "h": "1e2", "k": "1e3",
    "M": "1e6", "G": "1e9", "T": "1e12",
}  # fmt: skip
_LONG_PREFIXES = {
    "pico": "1e-12", "nano": "1e-9", "micro": "1e-6", "milli": "1e-3", "centi": "1e-2", "deci": "1e-1", "kilo": "1e3",
    "mega": "1e6", "giga": "1e9",
}  # fmt: skip
# name -> (factor to the SI unit, dimension); a dimension names its base units and their powers.
_PREFIXABLE: dict[str, tuple[str, dict[str, int]]] = {
    "m": ("1", {"m": 1}), "g": ("1/1000", {"kg": 1}), "s": ("1", {"s": 1}), "A": ("1", {"A": 1}), "K": ("1", {"K": 1}),
    "mol": ("1", {"mol": 1}), "Hz": ("1", {"s": -1}), "N": ("1", {"kg": 1, "m": 1, "s": -2}),
    "Pa": ("1", {"kg": 1, "m": -1, "s": -2}), "J": ("1", {"kg": 1, "m": 2, "s": -2}), "W": ("1", {"kg": 1, "m": 2, "s": -3}),
    "V": ("1", {"kg": 1, "m": 2, "s": -3, "A": -1}), "C": ("1", {"A": 1, "s": 1}), "L": ("1/1000", {"m": 3}),
    "l": ("1/1000", {"m": 3}), "ohm": ("1", {"kg": 1, "m": 2, "s": -3, "A": -2}),
    "eV": ("1.602176634e-19", {"kg": 1, "m": 2, "s": -2}), "cal": ("4.184", {"kg": 1, "m": 2, "s": -2}),
    "F": ("1", {"kg": -1, "m": -2, "s": 4, "A": 2}), "T": ("1", {"kg": 1, "s": -2, "A": -1}),
    "H": ("1", {"kg": 1, "m": 2, "s": -2, "A": -2}), "Wb": ("1", {"kg": 1, "m": 2, "s": -2, "A": -1}),
    "M": ("1000", {"mol": 1, "m": -3}), "Wh": ("3600", {"kg": 1, "m": 2, "s": -2}), "Ah": ("3600", {"A": 1, "s": 1}),
    "bar": ("1e5", {"kg": 1, "m": -1, "s": -2}), "S": ("1", {"kg": -1, "m": -2, "s": 3, "A": 2}), "cd": ("1", {"cd": 1}),
    "Nm": ("1", {"kg": 1, "m": 2, "s": -2}), "Bq": ("1", {"s": -1}), "Gy": ("1", {"m": 2, "s": -2}),
    "Sv": ("1", {"m": 2, "s": -2}), "Da": ("1.66053906892e-27", {"kg": 1}),
}  # fmt: skip
_DEGREES_PER_RADIAN = "57.2957795130823208767981548141051703324054724665643"
_OTHERS: dict[str, tuple[str, dict[str, int]]] = {
    "min": ("60", {"s": 1}), "h": ("3600", {"s": 1}), "day": ("86400", {"s": 1}), "week": ("604800", {"s": 1}),
    "year": ("31557600", {"s": 1}), "t": ("1000", {"kg": 1}), "ha": ("10000", {"m": 2}), "in": ("0.0254", {"m": 1}),
    "ft": ("0.3048", {"m": 1}), "yd": ("0.9144", {"m": 1}), "mi": ("1609.344", {"m": 1}), "oz": ("0.028349523125", {"kg": 1}),
    "lb": ("0.45359237", {"kg": 1}), "gal": ("0.003785411784", {"m": 3}), "qt": ("0.000946352946", {"m": 3}),
    "pt": ("0.000473176473", {"m": 3}),
       "cup": ("0.0002365882365", {"m": 3}), "ac": ("4046.8564224", {"m": 2}), "mph": ("0.44704", {"m": 1, "s": -1}),
    "atm": ("101325", {"kg": 1, "m": -1, "s": -2}),
    "degree": ("1", {"degree": 1}), "dozen": ("12", {}), "%": ("1/100", {}), "$": ("1", {"$": 1}),
    "degC": ("1", {"K": 1}), "degF": ("5/9", {"K": 1}), "rad": (_DEGREES_PER_RADIAN, {"degree": 1}),
    "rpm": ("6", {"degree": 1, "s": -1}),
    "mmHg": ("133.322387415", {"kg": 1, "m": -1, "s": -2}), "psi": ("6894.757293168", {"kg": 1, "m": -1, "s": -2}),
    "knot": ("1852/3600", {"m": 1, "s": -1}), "ppm": ("1e-6", {}), "Å": ("1e-10", {"m": 1}), "month": ("2629800", {"s": 1}),
    "cent": ("1/100", {"$": 1}), "€": ("1", {"€": 1}), "£": ("1", {"£": 1}), "¥": ("1", {"¥": 1}), "₹": ("1", {"₹": 1}),
    "Torr": ("101325/760", {"kg": 1, "m": -1, "s": -2}), "cmHg": ("1333.22387415", {"kg": 1, "m": -1, "s": -2}),
    "inHg": ("3386.388640341", {"kg": 1, "m": -1, "s": -2}), "rev": ("360", {"degree": 1}),
    "dyn": ("1e-5", {"kg": 1, "m": 1, "s": -2}), "erg": ("1e-7", {"kg": 1, "m": 2, "s": -2}),
    "amu": ("1.66053906892e-27", {"kg": 1}), "lbf": ("4.4482216152605", {"kg": 1, "m": 1, "s": -2}),
    "hp": ("745.69987158227022", {"kg": 1, "m": 2, "s": -3}), "BTU": ("1055.05585262", {"kg": 1, "m": 2, "s": -2}),
    "AU": ("149597870700", {"m": 1}), "ly": ("9460730472580800", {"m": 1}), "nmi": ("1852", {"m": 1}),
    "slug": ("14.593902937206", {"kg": 1}), "dB": ("1", {"dB": 1}), "gauss": ("1e-4", {"kg": 1, "s": -2, "A": -1}),
}  # fmt: skip
_WORDS = {
    "meter": "m", "metre": "m", "gram": "g", "gramme": "g", "second": "s", "sec": "s", "liter": "L", "litre": "L",
    "ampere": "A", "amp": "A", "kelvin": "K", "mole": "mol", "hertz": "Hz", "newton": "N", "pascal": "Pa", "joule": "J",
    "ohm": "ohm",
    "watt": "W", "volt": "V", "coulomb": "C", "calorie": "cal", "minute": "min", "hour": "h", "hr": "h", "yr": "year",
    "tonne": "t", "hectare": "ha", "acre": "ac", "quart": "qt", "pint": "pt", "radian": "rad",
    "celsius": "degC", "centigrade": "degC",
    "fahrenheit": "degF", "farad": "F", "tesla": "T", "henry": "H", "weber": "Wb", "watthour": "Wh",
    "yen": "¥", "jpy": "¥", "gbp": "£",
    "molar": "M", "angstrom": "Å", "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi",
    "ounce": "oz", "pound": "lb", "lbs": "lb", "gallon": "gal", "dollar": "$", "usd": "$", "euro": "€", "eur": "€",
    "deg": "degree", "percent": "%", "percentage": "%", "pct": "%", "cc": "cm^3", "kph": "km/h", "kmh": "km/h",
    "rupee": "₹", "inr": "₹", "atmosphere": "atm", "torr": "Torr", "micron": "µm", "siemens": "S", "candela": "cd",
    "revolution": "rev", "btu": "BTU", "horsepower": "hp", "dyne": "dyn", "dalton": "Da", "lightyear": "ly",
    "electronvolt": "eV", "becquerel": "Bq", "sievert": "Sv",
}  # fmt: skip
_MAX_CHARS = 200
DEGREE = (("degree", 1),)
_OFFSETS = {"degC": Fraction("273.15"), "degF": Fraction("459.67") * Fraction(5, 9)}
_PART = re.compile(r"(?P<name>[^\W\d_]+|[%$€£¥₹])(?:\^?(?P<power>-?\d))?")
_DEGREES = re.compile(r"°\s*([CF])\b|\b(?:deg|degrees?)\.?\s*(c|f|celsius|fahrenheit|centigrade)\b", re.IGNORECASE)
_SIGNS = str.maketrans(
    {"μ": "µ", "Ω": "ohm", "\u2126": "ohm", "\u212b": "Å", "℃": "°C", "℉": "°F", "ℓ": "L", "−": "-", "\u00a0": " ", "º": "°"}
)
_BRACED = r"((?:[^{}]|\{[^{}]*\})*)"
_UPRIGHT = re.compile(rf"\\(?:text\w*|math(?:rm|bf|sf|it)|mbox|operatorname)\s*\{{{_BRACED}\}}")
_QUOTIENT = re.compile(rf"\\[dt]?frac\s*\{{{_BRACED}\}}\s*\{{{_BRACED}\}}")
_LATEX_SIGNS = (
    (re.compile(r"\\(?:text)?AA(?![A-Za-z])|\\mathring\s*(?:\{\s*A\s*\}|A)"), "Å"),
    (re.compile(r"\\(?:text|up)?mu(?![A-Za-z])"), "µ"),
    (re.compile(r"\\Omega(?![A-Za-z])"), "ohm"),
    (re.compile(r"(?:\^\s*)?(?:\{\s*)?\\(?:circ|degree)(?![A-Za-z])\s*\}?"), "°"),
    (re.compile(r"\\ell(?![A-Za-z])"), "L"),
    (re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])"), "·"),
    (re.compile(r"\\(?:left|right|q?quad|rm)(?![A-Za-z])|\\[,;:! ]|~"), " "),
)


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit: ``factor`` times the SI unit of its dimension, a sorted tuple of (base unit, power), after ``offset`` of them."""

    factor: Fraction
    dimension: tuple[tuple[str, int], ...]
    known: bool
    offset: Fraction = Fraction(0)


@functools.lru_cache(maxsize=4096)
def unit_of(text: str) -> Unit:
    r"""Read a unit: ``cm^2``, ``kilometers per hour``, ``\mathrm{~kJ~mol^{-1}}``, ``$``, ``apples``.

    ``known`` is False for a word not in the table. After a slash all is below it, but for a later negative power:
    ``J/kg K`` is ``J/(kg K)``, and ``W/m^2 K^{-4}`` is ``W m^{-2} K^{-4}``.
    """
    if len(text) > _MAX_CHARS:
        return Unit(Fraction(1), (("?" + text.casefold(), 1),), known=False)
    text = plain_signs(text)
    if "\\" in text or "$" in text or "{" in text or "~" in text:
        text = _without_latex(text)
    text = _DEGREES.sub(lambda m: " deg" + (m[1] or m[2])[0].upper(), text).replace("°", " degree ")
    text = re.sub(r"\bsq(?:uare|\.)?\s+([a-zµ]+)", r"\1^2", re.sub(r"\bcu(?:bic|\.)?\s+([a-zµ]+)", r"\1^3", text.strip(" .")))
    text = re.sub(r"\bsquared\b", "^2", re.sub(r"\bcubed\b", "^3", re.sub(r"\s+per\s+|\s*/\s*", "/", text)))
    text = re.sub(r"\s*\^\s*\{?(-?\d)\}?(?=([^\W\d_])?)", lambda m: f"^{m[1]}" + (" " if m[2] else ""), text)
    text = re.sub(r"\b(mm|cm|in)\s+Hg\b", r"\1Hg", re.sub(r"\b(light|electron)[- ](year|volt)", r"\1\2", text))
    text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", "·", text)  # kilowatt-hour
    if text.startswith("1/"):
        text = text[1:]
    unit = _product(re.split(r"([/()]|[*·⋅\s]+)", text), 0)[0]
    offset = _OFFSETS.get(_WORDS.get(text.strip().casefold(), text.strip()), Fraction(0))
    return Unit(unit.factor, unit.dimension, unit.known, offset)


def plain_signs(text: str) -> str:
    """Superscripts as powers, and each sign of a unit that Unicode has more than once as the one of the table."""
    return text if text.isascii() else with_powers(text).translate(_SIGNS)


def _without_latex(text: str) -> str:
    """``\\mathrm{~m}\\,\\mathrm{s}^{-2}`` as ``m s^-2``; what is no unit keeps its backslash."""
    text = text.replace("\\%", "%").replace("\\$", "\0")
    text = (text.replace("$", " ") if text.count("$") > 1 else text).replace("\0", "$")
    for sign, plain in _LATEX_SIGNS:
        text = sign.sub(plain, text)
    for _ in range(3):  # \frac of \mathrm of \text
        text = _QUOTIENT.sub(r" (\1)/(\2) ", _UPRIGHT.sub(r" \1 ", text))
    text = re.sub(r"\^\s*\{\s*([^{}]*?)\s*\}", r"^\1", text).replace("{", " ").replace("}", " ")
    return re.sub(r"µ\s+(?=[A-Za-z])|(?<![^\W\d_])([kMGm])\s+(?=ohm)", lambda m: m[1] or "µ", text)


def _product(pieces: list[str], at: int) -> tuple[Unit, int]:
    """Multiply the units from a piece on, up to the bracket that closes them; return where that is."""
    factor, known = Fraction(1), True
    dimension: dict[str, int] = {}
    sign, after_slash = 1, False
    while at < len(pieces):
        piece = pieces[at]
        at += 1
        if piece == ")":
            break
        if piece == "/":
            sign, after_slash = -1, True
        if not piece.strip(" /*·⋅\t\n"):
            continue
        if piece == "(":
            group, at = _product(pieces, at)
            raised = re.fullmatch(r"\^(-?\d)", pieces[at]) if at < len(pieces) else None
            at += bool(raised)
            power = int(raised[1]) if raised else 1
            found, known = (group.factor, dict(group.dimension)), known and group.known
        else:
            part = _PART.fullmatch(piece)
            named = _one(part["name"]) if part else None
            power = int(part["power"] or 1) if part else 1
            if named is None:
                known = False
                name = (part["name"] if part else piece).casefold()
                # The question mark: "5 M" of unknown things is not "5 m".
                named = (Fraction(1), {"?" + (name[:-1] if name.endswith("s") and len(name) > 3 else name): 1})
            found = named
        power *= sign if power > 0 or after_slash else 1
        after_slash = False
        factor *= found[0] ** power
        for base, exponent in found[1].items():
            dimension[base] = dimension.get(base, 0) + exponent * power
    return Unit(factor, tuple(sorted((base, power) for base, power in dimension.items() if power)), known), at


def is_known(text: str) -> bool:
    """Whether every part of a unit is in the table."""
    return bool(text.strip()) and unit_of(text).known


def _one(name: str) -> tuple[Fraction, dict[str, int]] | None:
    for table in (_OTHERS, _PREFIXABLE):
        if name in table:
            return Fraction(table[name][0]), table[name][1]
    for length in (2, 1):
        prefix, rest = name[:length], name[length:]
        if prefix in _PREFIXES and rest in _PREFIXABLE:
            factor, dimension = _PREFIXABLE[rest]
            return Fraction(_PREFIXES[prefix]) * Fraction(factor), dimension
    word = name.casefold()
    for ending in ("s", "es", ""):
        stem = word.removesuffix(ending) if ending else word
        if word.endswith(ending) and (found := _word(stem)):
            return found
    return None


def _word(word: str) -> tuple[Fraction, dict[str, int]] | None:
    if word in _OTHERS and len(word) > 2:
        return Fraction(_OTHERS[word][0]), _OTHERS[word][1]
    if word in _WORDS:
        if "^" in _WORDS[word] or "/" in _WORDS[word]:
            unit = unit_of(_WORDS[word])
            return unit.factor, dict(unit.dimension)
        return _one(_WORDS[word])
    for prefix, factor in _LONG_PREFIXES.items():
        rest = word.removeprefix(prefix)
        if rest != word and rest in _WORDS and _WORDS[rest] in _PREFIXABLE:
            base, dimension = _PREFIXABLE[_WORDS[rest]]
            return Fraction(factor) * Fraction(base), dimension
    return None
