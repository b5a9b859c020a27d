"""Read the small parts of an answer: numbers, units, subscripts, what stands in brackets."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from stillhouse.pipeline.verifiers.latex import Refused, Unreadable
from stillhouse.pipeline.verifiers.tree import Tree

if TYPE_CHECKING:
    from stillhouse.pipeline.verifiers.expressions import Reader

MAX_DIGITS = 4_000
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
            return " ".join(parts)


def subscript(reader: Reader, base: Tree) -> Tree:
    reader.take()
    if base[0] == "num" and base[1].denominator == 1:
        digits = reader.tokens[reader.at - 2].value
        braced = reader.skip("{")
        if reader.kind != "number":
            raise Unreadable("a number base that is no number")
        radix = reader.take().value
        if braced:
            reader.need("}")
        if not digits.isdigit() or not radix.isdigit() or not 2 <= int(radix[:3]) <= 36 or len(digits) > MAX_DIGITS:
            raise Unreadable("not a number in a base")
        try:
            return ("num", Fraction(int(digits, int(radix))))
        except ValueError as error:
            raise Unreadable(f"{digits} is no number in base {radix}") from error
    start = reader.at
    index = reader.argument()
    name = "".join(token.value for token in reader.tokens[start : reader.at]).strip("{}")
    if base[0] == "sym" and name.isalnum():
        return ("sym", f"{base[1]}_{name}")
    return ("opaque", "_", base, index)


def number(reader: Reader, text: str) -> Tree:
    if len(text) > MAX_DIGITS:
        raise Refused(f"a number of {len(text)} digits")
    if "." not in text:
        return ("num", Fraction(int(text)))
    number, places = Fraction(text), len(text) - text.index(".") - 1
    if reader.value == "\\overline":  # 0.1\overline{6}
        reader.take()
        digits = reader.argument()
        if digits[0] != "num":
            raise Unreadable("a repeating part that is no number")
        length = sum(c.isdigit() for c in reader.tokens[reader.at - 2].value)
        return ("num", number + digits[1] / (10**places * (10**length - 1)))
    return ("dec", number, places)


def bracketed(reader: Reader, opening: str) -> Tree:
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
