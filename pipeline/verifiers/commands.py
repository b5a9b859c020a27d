r"""Read what stands behind a LaTeX command: fractions, roots, functions, sums, matrices, accents."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from stillhouse.pipeline.verifiers.latex import Unreadable
from stillhouse.pipeline.verifiers.tree import BIG_OPERATORS, ENDS, Tree, negated, replaced

if TYPE_CHECKING:
    from stillhouse.pipeline.verifiers.expressions import Reader

_FUNCTIONS = {
    "\\sin", "\\cos", "\\tan", "\\cot", "\\sec", "\\csc", "\\arcsin", "\\arccos", "\\arctan", "\\sinh", "\\cosh", "\\tanh",
    "\\log", "\\ln", "\\lg", "\\exp", "\\abs", "\\gcd", "\\lcm", "\\max", "\\min", "\\sqrt", "\\cbrt", "\\floor",
    "\\ceil",
}  # fmt: skip
_I: Tree = ("const", "i")
_OF_MANY = {"gcd", "lcm", "max", "min"}
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_DECORATIONS = {
    "\\overline", "\\vec", "\\hat", "\\bar", "\\tilde", "\\dot", "\\overrightarrow", "\\widehat", "\\mathbb", "\\mathcal",
    "\\mathfrak", "\\underline",
}  # fmt: skip
_MATRICES = {"matrix", "pmatrix", "bmatrix", "Bmatrix", "vmatrix", "Vmatrix", "smallmatrix", "array"}


def environment(reader: Reader, opening: str) -> Tree:
    name = opening[opening.index("{") + 1 : -1].rstrip("*")
    if name == "array" and reader.value == "{":
        while reader.take().value != "}":
            if reader.kind == "end":
                raise Unreadable("an array without its columns")
    if name not in _MATRICES and name != "cases":
        raise Unreadable(f"environment {name}")
    rows: list[list[Tree]] = [[]]
    while not (reader.kind == "environment" and reader.value.startswith("\\end")):
        if reader.skip("\\\\"):
            rows.append([])
        elif reader.skip("&"):
            continue
        elif reader.kind == "end":
            raise Unreadable(f"{opening} without its end")
        else:
            start = reader.at
            rows[-1].append(reader.sequence())
            if reader.at == start:  # a bracket that closes nothing
                raise Unreadable(f"unexpected {reader.value!r}")
    reader.take()
    rows = [row for row in rows if row]
    if name == "cases":
        cells = [part for row in rows for cell in row for part in (cell[1:] if cell[0] == "list" else (cell,))]
        if all(len(row) == 1 and row[0][0] == "rel" and row[0][1] == ("=",) for row in rows):  # x = 1, y = 2
            return ("list", *cells)
        return ("opaque", "cases", *cells)
    if not rows or len({len(row) for row in rows}) != 1:
        raise Unreadable("a matrix with rows of different length")
    matrix = ("mat", *(tuple(row) for row in rows))
    return ("opaque", name, matrix) if name in ("vmatrix", "Vmatrix") else matrix


def command(reader: Reader, name: str) -> Tree:
    if name == "\\frac":
        top = reader.argument(one_digit=True)
        return ("div", top, reader.argument(one_digit=True))
    if name in _FUNCTIONS:
        return _function(reader, name[1:])
    if name in ("\\infty", "\\pi"):
        return ("const", {"\\infty": "inf", "\\pi": "pi"}[name])
    if name == "\\binom":
        top = reader.argument(one_digit=True)
        return ("fn", "binomial", top, reader.argument(one_digit=True))
    if name == "\\boxed":
        return reader.argument()
    if name in ("\\lfloor", "\\lceil"):
        inner = reader.sum()
        reader.need("\\r" + name[2:])
        return ("fn", {"\\lfloor": "floor", "\\lceil": "ceil"}[name], inner)
    if name in BIG_OPERATORS:
        return _big_operator(reader, name)
    if name in _DECORATIONS:
        start = reader.at
        reader.argument()
        inside = "".join(token.value for token in reader.tokens[start : reader.at]).strip("{}")
        return ("sym", f"{name}{{{inside}}}")
    if name in ("\\angle", "\\triangle"):
        points = ""
        while reader.kind == "letter" and reader.value.isupper() and len(points) < 3:
            points += reader.take().value
        same = "".join(sorted(points)) if name == "\\triangle" else min(points, points[::-1])  # angle ABC is angle CBA
        return ("sym", f"{name} {same}")
    if name == "\\emptyset":
        return ("set",)
    if name == "\\$":
        if reader.kind != "number":
            raise Unreadable("a currency sign without a number")
        return ("qty", reader.factor(), "$")
    if name in ENDS or not name[1:].isalpha():
        raise Unreadable(f"unexpected {name!r}")
    return ("sym", name)


def _big_operator(reader: Reader, name: str) -> Tree:
    bounds: dict[str, Tree] = {}
    while reader.value in ("_", "^"):
        which = reader.take().value
        if reader.skip("{"):
            bounds[which] = reader.sequence()
            reader.need("}")
        else:
            bounds[which] = reader.atom()
    empty = ("sym", "")
    lower, upper, summand = bounds.get("_", empty), bounds.get("^", empty), reader.product()
    if lower[0] == "rel" and lower[2][0] == _I:  # i counts here
        lower, upper, summand = (replaced(tree, _I, ("sym", "i")) for tree in (lower, upper, summand))
    return ("opaque", name, lower, upper, summand)


def _function(reader: Reader, name: str) -> Tree:
    if name in ("sqrt", "cbrt"):
        index: Tree = ("num", Fraction(2 if name == "sqrt" else 3))
        if name == "sqrt" and reader.skip("["):
            index = reader.sum()
            reader.need("]")
        return ("fn", "root", reader.argument(), index)
    base: Tree | None = None
    power: Tree | None = None
    while reader.value in ("_", "^") and reader.kind == "symbol":
        if reader.take().value == "_":
            base = reader.argument()
        else:
            power = reader.exponent()
    if power == ("num", Fraction(-1)) and name in _INVERSE:
        name, power = _INVERSE[name], None
    inner = _function_argument(reader)
    arguments = inner[1:] if inner[0] in ("list", "tuple") else (inner,)
    if not arguments or (len(arguments) > 1 and name not in _OF_MANY):
        raise Unreadable(f"{len(arguments)} arguments of {name}")
    if name == "log" and base is not None:
        tree: Tree = ("div", ("fn", "ln", *arguments), ("fn", "ln", base))
    elif name == "lg":
        tree = ("div", ("fn", "ln", *arguments), ("fn", "ln", ("num", Fraction(10))))
    elif base is not None:
        tree = ("opaque", name, base, *arguments)
    else:
        tree = ("fn", {"log": "ln"}.get(name, name), *arguments)
    return tree if power is None else ("pow", tree, power)


def _function_argument(reader: Reader) -> Tree:
    """``\\sin(a+b) c`` takes the bracket, ``\\sin 2x \\cos y`` the factors up to the next function."""
    if reader.value in ("(", "{", "[", "|"):
        return reader.atom()
    negative = reader.signs()
    factors = [reader.factor()]
    while reader.starts_factor() and reader.value not in _FUNCTIONS and reader.value not in ("(", "["):
        factors.append(reader.factor())
    while reader.value == "/" and reader.tokens[reader.at + 1].kind in ("number", "letter"):
        reader.take()
        factors = [("div", reader.joined(factors), reader.factor())]
    tree = factors[0] if len(factors) == 1 else ("mul", *factors)
    return negated(tree) if negative else tree
