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
    "bar": ("1e5", {"kg": 1, "m": -1, "s": -2}),
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
    "degC": ("1", {"K": 1}), "degF": ("5/9", {"K": 1}), "rad": (_DEGREES_PER_RADIAN, {"degree": 1}), "rpm": ("1/60", {"s": -1}),
    "mmHg": ("133.322387415", {"kg": 1, "m": -1, "s": -2}), "psi": ("6894.757293168", {"kg": 1, "m": -1, "s": -2}),
    "knot": ("1852/3600", {"m": 1, "s": -1}), "ppm": ("1e-6", {}), "Å": ("1e-10", {"m": 1}), "month": ("2629800", {"s": 1}),
    "cent": ("1/100", {"$": 1}), "€": ("1", {"€": 1}), "£": ("1", {"£": 1}), "¥": ("1", {"¥": 1}),
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
    "rupee": "rupee", "atmosphere": "atm",
}  # fmt: skip
DEGREE = (("degree", 1),)
_OFFSETS = {"degC": Fraction("273.15"), "degF": Fraction("459.67") * Fraction(5, 9)}
_PART = re.compile(r"(?P<name>[^\W\d_]+|[%$€£¥])(?:\^?(?P<power>-?\d))?")
_DEGREES = re.compile(r"°\s*([CF])\b|\b(?:deg|degrees?)\.?\s*(c|f|celsius|fahrenheit|centigrade)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit: ``factor`` times the SI unit of its dimension, a sorted tuple of (base unit, power), after ``offset`` of them."""

    factor: Fraction
    dimension: tuple[tuple[str, int], ...]
    known: bool
    offset: Fraction = Fraction(0)

    def in_si(self, number: Fraction) -> Fraction:
        """So many of this unit in the SI unit: 20 °C is 293.15 K. A temperature, not a difference of two."""
        return number * self.factor + self.offset


@functools.lru_cache(maxsize=4096)
def unit_of(text: str) -> Unit:
    """Read a unit: ``cm^2``, ``kilometers per hour``, ``$``, ``apples``; ``known`` is False for a word not in the table."""
    if not text.isascii():
        text = with_powers(text).replace("μ", "µ").replace("Ω", "ohm").replace("Ω", "ohm")
    text = _DEGREES.sub(lambda m: " deg" + (m[1] or m[2])[0].upper(), text)
    text = re.sub(r"\bsq(?:uare|\.)?\s+([a-zµ]+)", r"\1^2", re.sub(r"\bcu(?:bic|\.)?\s+([a-zµ]+)", r"\1^3", text.strip(" .")))
    text = re.sub(r"\bsquared\b", "^2", re.sub(r"\bcubed\b", "^3", re.sub(r"\s+per\s+|\s*/\s*", "/", text)))
    text = re.sub(r"\s*\^\s*\{?(-?\d)\}?", r"^\1", text)
    if text.startswith("1/"):
        text = text[1:]
    factor, dimension, known = Fraction(1), {}, True
    sign = 1
    for piece in re.split(r"([/*·⋅\s()]+)", text):
        if not piece.strip():
            continue
        if set(piece) <= set("/*·⋅ ()"):
            sign = -1 if "/" in piece else sign
            continue
        part = _PART.fullmatch(piece)
        found = _one(part["name"]) if part else None
        power = sign * int(part["power"] or 1) if part else sign
        if found is None:
            known = False
            name = (part["name"] if part else piece).casefold()
            # The question mark: "5 M" of unknown things is not "5 m".
            found = (Fraction(1), {"?" + (name[:-1] if name.endswith("s") and len(name) > 3 else name): 1})
        factor *= found[0] ** power
        for base, exponent in found[1].items():
            dimension[base] = dimension.get(base, 0) + exponent * power
    offset = _OFFSETS.get(_WORDS.get(text.strip().casefold(), text.strip()), Fraction(0))
    return Unit(factor, tuple(sorted((base, power) for base, power in dimension.items() if power)), known, offset)


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
