"""Read a number that a model or a data set wrote, exactly and without sympy; anything else is left to slower means."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from stillhouse.pipeline.extraction import boxed_answer

_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SPACING = re.compile(r"\\\$|\\[,;:!>]|\\(?:quad|qquad|left|right|displaystyle|thinspace)(?![A-Za-z])|~")
_LINE_BREAKS_BACKWARDS = re.compile(r"(?:\\\\\s*)*")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_SCIENTIFIC = re.compile(
    r"([+-]?(?:\d+\.?\d*|\.\d+))(?:e([+-]?\d{1,3})|(?:\*|×|\\times|\\cdot)10\^(?:\{([+-]?\d{1,3})\}|(\d)))", re.IGNORECASE
)
_SLASH = re.compile(r"([+-]?[\d.,]+)/([+-]?[\d.,]+)")
_FRAC = re.compile(r"([+-]?)(\d*)\\[dtc]?frac(?:\{([^{}]+)\}|\s*(\d))(?:\{([^{}]+)\}|\s*(\d))")
_MIXED = re.compile(r"([+-]?)(\d+) (\d+)/(\d+)")
_MAX_NUMBER_CHARS = 400


def plain_text(text: str) -> str:
    """Normalize text for comparison: NFKC, Unicode minus as ``-``, whitespace collapsed; letter case is kept.

    Superscripts become powers first (``10³`` is ``10^3``): NFKC alone would make them plain digits.
    """
    if not text.isascii():
        text = _SUPERSCRIPTS.sub(lambda m: "^" + m[0].translate(_RAISED), text)
    return " ".join(unicodedata.normalize("NFKC", text).replace("−", "-").split())


def exact_number(text: str) -> Fraction | None:
    r"""Read a number exactly: integer, decimal, scientific, ``a/b``, ``\frac{a}{b}``, mixed number; None for all else.

    Commas are read as thousands separators where they stand at every third digit (``1,234``), Unicode minus as minus; per
    cent signs and units are left to others. No power is ever computed but of ten, to three digits of exponent.
    """
    text = unwrapped(text)
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    if mixed := _MIXED.fullmatch(text):
        sign, whole, numerator, denominator = mixed.groups()
        proper = int(numerator) < int(denominator)
        return _signed(sign, int(whole), Fraction(int(numerator), int(denominator))) if proper else None
    text = text.replace(" ", "") if not re.search(r"[\d,] \d", text) else text
    if (plain := _simple_number(text)) is not None:
        return plain
    if scientific := _SCIENTIFIC.fullmatch(text):
        mantissa, *exponents = scientific.groups()
        return Fraction(mantissa) * Fraction(10) ** int(next(e for e in exponents if e is not None))
    if slash := _SLASH.fullmatch(text):
        return _quotient(slash[1], slash[2])
    if frac := _FRAC.fullmatch(text):
        sign, whole, *parts = frac.groups()
        quotient = _quotient(parts[0] or parts[1], parts[2] or parts[3])
        return None if quotient is None else _signed(sign, int(whole or 0), quotient)
    return None


def _signed(sign: str, whole: int, part: Fraction) -> Fraction | None:
    if whole and not 0 <= part < 1:
        return None
    return -(whole + part) if sign == "-" else whole + part


def _simple_number(text: str) -> Fraction | None:
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    return Fraction(text) if text.isascii() and _DECIMAL.fullmatch(text) else None


def _quotient(numerator: str, denominator: str) -> Fraction | None:
    top, bottom = _simple_number(numerator.strip()), _simple_number(denominator.strip())
    return top / bottom if top is not None and bottom else None


def unwrapped(text: str) -> str:
    """Strip what does not change the value: dollars, a box, spacing commands, a closing full stop."""
    text = text.strip()
    if text.startswith("\\boxed"):
        text = boxed_answer(text) or text
    text = re.sub(r",\\!\s*", ",", plain_text(text).replace("{,}", ","))
    for start, end in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(start) and text.endswith(end) and len(text) > len(start) + len(end):
            text = text[len(start) : len(text) - len(end)].strip()
    text = _SPACING.sub("", text).replace("$", " ").strip()
    text = text[: len(text) - _LINE_BREAKS_BACKWARDS.match(text[::-1]).end()]  # backwards in linear time
    return re.sub(r"(?<=[\w)}])\.$", "", text)
