"""Read the small parts of an answer: numbers, units, subscripts, what stands in brackets."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from stillhouse.pipeline.verifiers.latex import Refused, Unreadable
from stillhouse.pipeline.verifiers.real_sets import unknowns
from stillhouse.pipeline.verifiers.tree import Tree

if TYPE_CHECKING:
    from stillhouse.pipeline.verifiers.expressions import Reader

MAX_DIGITS = 4_000
_REPEATS = re.compile(r"(?:(\d)\1\1+|(\d{2,12}?)\2+)$")
_LOOK_BACK = 60
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
_CONDITIONS = frozenset(
    [*("or", "nor", "not", "than", "if", "unless", "except", "without", "minus", "plus", "least", "most", "few", "too"),
     *("factorial", "doubled", "tripled", "halved", "halves", "thirds", "fourths", "fifths", "sixths", "sevenths", "eighths"),
     *("ninths", "tenths", "hundredths", "thousandths")]
)  # fmt: skip
_OF_NO_UNIT = re.compile(
    r"\W*(?:(?:squared|cubed)\b|(?:wrong|incorrect)\W*\Z)|.*\ba half\b|.*\bpercent(?:age points?)? (?:more|less|off)\b",
    re.IGNORECASE,
)
_CLOSING = {"(": ")]", "[": "])", "\\{": ("\\}",), "\\langle": ("\\rangle",)}


def unit(reader: Reader) -> str:
    parts = []
    while True:
        if reader.kind == "text" or (reader.value == "/" and reader.tokens[reader.at + 1].kind == "text"):
            parts.append(reader.take().value)
        elif reader.value == "^" and parts:
            reader.take()
            braced = reader.skip("{")
            sign = "-" if reader.skip("-") else ""
            if reader.kind != "number":
                raise Unreadable("a unit to a power that is no number")
            parts[-1] += "^" + sign + reader.take().value
            if braced:
                reader.need("}")
        elif reader.value == "*" and reader.tokens[reader.at + 1].kind == "text":
            reader.take()
        else:
            return named_unit(" ".join(parts))


def named_unit(words: str) -> str:
    """The words behind a number, as they are.

    Raises:
        Refused: they say that it is not the number: 10 or more, at least, 3 less than, 5 squared (5 cm squared is).
    """
    if _CONDITIONS & set(_WORD.findall(words.casefold())) or _OF_NO_UNIT.match(words):
        raise Refused(f"a number and a condition: {words[:40]!r}")
    return words


def modulo(reader: Reader, left: Tree) -> Tree:
    r"""``10 \bmod 7`` is 3; ``10 \pmod 7`` all that leave 3."""
    how = reader.take().value
    modulus = reader.signed_factor() if how != "\\pmod" else reader.argument()
    if how != "\\pmod":
        return ("fn", "mod", left, modulus)
    if left[0] == modulus[0] == "num" and modulus[1] > 0:
        left = ("num", left[1] % modulus[1])
    return ("opaque", how, left, modulus)


def subscript(reader: Reader, base: Tree) -> Tree:
    reader.take()
    if base[0] == "num" and base[1].denominator == 1:
        digits = reader.tokens[reader.at - 2].value
        braced = reader.skip("{")
        if reader.kind != "number":
            raise Refused("a number base that is no number")
        radix = reader.take().value
        if braced:
            reader.need("}")
        if not digits.isdigit() or not radix.isdigit() or not 2 <= int(radix[:3]) <= 36 or len(digits) > MAX_DIGITS:
            raise Refused("not a number in a base")
        try:
            return ("num", Fraction(int(digits, int(radix))))
        except ValueError as error:
            raise Refused(f"{digits} is no number in base {radix}") from error
    start = reader.at
    outer, reader.in_index = reader.in_index, True
    index = reader.argument()
    reader.in_index = outer
    name = "".join(token.value for token in reader.tokens[start : reader.at]).strip("{}")
    if base[0] == "sym" and name.isalnum():
        return ("sym", f"{base[1]}_{name}")
    return ("opaque", "_", base, index)


def number(reader: Reader, text: str) -> Tree:
    if len(text) > MAX_DIGITS:
        raise Refused(f"a number of {len(text)} digits")
    if "." not in text:
        return ("num", Fraction(int(text)))
    decimal, places = Fraction(text), len(text) - text.index(".") - 1
    repeating = _repeating(reader, text)
    if repeating is None:
        return ("dec", decimal, places)
    if not repeating.isdigit():
        raise Unreadable("a repeating part that is no number")
    return ("num", decimal + Fraction(int(repeating), 10**places * (10 ** len(repeating) - 1)))


def _repeating(reader: Reader, decimal: str) -> str | None:
    r"""Read what repeats for ever: ``0.1\overline{6}``, ``0.1\bar6``, ``0.\dot{1}4\dot{2}``, ``0.1(6)``, ``0.166...``."""
    if reader.value in ("\\overline", "\\bar", "\\dot"):
        digits, dotted = "", reader.value == "\\dot"
        while reader.value in ("\\overline", "\\bar", "\\dot") or (dotted and digits and reader.kind == "number"):
            if reader.kind == "number":
                digits += reader.take().value
                continue
            reader.take()
            braced = reader.skip("{")
            digits += reader.take().value if reader.kind == "number" else "?"
            if braced:
                reader.need("}")
        return digits
    opening, *following = reader.tokens[reader.at : reader.at + 3]
    if decimal.startswith("0.") and opening.value == "(" and not opening.spaced and len(following) == 2:
        digits, closing = following
        if digits.kind == "number" and closing.value == ")":
            reader.at += 3
            return digits.value
    if reader.skip("\\ldots"):
        repeats = _REPEATS.search(decimal.partition(".")[2][-_LOOK_BACK:])
        if repeats is None:
            raise Refused("a decimal that goes on, nobody knows how")
        return repeats[1] or repeats[2]
    return None


def _set_builder(reader: Reader) -> Tree | None:
    r"""Read ``x \mid 0 < x < 1 \}`` or ``x \in \mathbb{R} : x < 1 \}`` as a union; None for another set."""
    start = reader.at
    if reader.kind != "letter":
        return None
    letter = reader.take().value
    if reader.skip("\\in") and not (reader.skip("\\mathbb") and reader.argument() == ("sym", "R")):
        reader.at = start
        return None
    if not (reader.skip("|") or reader.skip(":")):
        reader.at = start
        return None
    inner_bars, reader.num_bars = reader.num_bars, 0
    condition = reader.sequence()
    reader.num_bars = inner_bars
    reader.need("\\}")
    if condition[0] in ("rel", "both", "either") and unknowns(condition) not in ({letter}, {f"\\{letter}"}):
        raise Unreadable(f"a set of {letter} and a condition on something else")
    return ("union", condition)


def bracketed(reader: Reader, opening: str) -> Tree:
    if opening == "\\{" and (condition := _set_builder(reader)) is not None:
        return condition
    inner_bars, reader.num_bars = reader.num_bars, 0
    inner = reader.sequence()
    reader.num_bars = inner_bars
    closing = reader.need(*_CLOSING[opening])
    items = inner[1:] if inner[0] == "list" else (inner,)
    if opening == "\\{":
        return ("set", *items)
    if len(items) == 2 and (opening == "[" or closing == "]"):
        return ("interval", items[0], items[1], opening == "[", closing == "]")
    if (opening, closing) in (("(", "]"), ("[", ")")):
        raise Unreadable("brackets that do not match")
    if len(items) == 1 and inner[0] != "list":
        return inner
    return ("tuple", *items)
