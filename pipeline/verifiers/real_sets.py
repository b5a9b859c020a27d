"""Sets of real numbers that are intervals, points and unions of them; read from trees, compared piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from stillhouse.pipeline.verifiers.evaluate import decimal_value, exact_value
from stillhouse.pipeline.verifiers.exact_values import Undecidable, is_constant
from stillhouse.pipeline.verifiers.tree import Tree, symbols

_INFINITY: Tree = ("const", "inf")
_MINUS_INFINITY: Tree = ("neg", _INFINITY)
_ALL: Tree = ("tuple", _MINUS_INFINITY, _INFINITY)
REALS: Tree = ("sym", "\\mathbb{R}")


class Piece(NamedTuple):
    """One interval; a point has both ends equal and closed."""

    low: Tree
    high: Tree
    low_closed: bool
    high_closed: bool


def as_real_set(tree: Tree) -> list[Piece] | None:
    """Read an interval, a pair as open interval, a union, a set of points, or an inequality in one name; None for all else.

    An inequality may be linear, or of the modulus of what is linear: ``|2x - 1| < 5``.
    """
    if tree[0] == "interval":
        return [_piece(*tree[1:])]
    if tree[0] == "tuple" and len(tree) == 3:
        return [_piece(tree[1], tree[2], False, False)]
    if tree[0] == "set":
        return [Piece(point, point, True, True) for point in tree[1:]]
    if tree == REALS:
        return [Piece(_MINUS_INFINITY, _INFINITY, False, False)]
    if tree[:2] == ("opaque", "\\setminus") and tree[2] in (REALS, _ALL) and tree[3][0] in ("set", "list"):
        return _without_points(tree[3][1:])
    if tree[0] == "union":
        pieces = [as_real_set(part) for part in tree[1:]]
        return None if any(p is None for p in pieces) else [piece for part in pieces for piece in part or ()]
    if tree[0] == "rel":
        return _of_inequality(tree)
    if tree[0] in ("either", "both") and len(unknowns(tree)) == 1:
        pieces = [_of_inequality(part) for part in tree[1:]]
        if all(pieces):
            return [piece for part in pieces for piece in part or ()] if tree[0] == "either" else _common(pieces)
    return None


def _common(parts: Sequence[list[Piece] | None]) -> list[Piece] | None:
    """What lies in all of the parts, of one interval each; None for more pieces, or for nothing in common."""
    if any(part is None or len(part) != 1 for part in parts):
        return None
    pieces = [part[0] for part in parts if part]
    low = max(pieces, key=lambda piece: (_position(piece.low), not piece.low_closed))
    high = min(pieces, key=lambda piece: (_position(piece.high), piece.high_closed))
    if _position(low.low) >= _position(high.high):
        return None
    return [Piece(low.low, high.high, low.low_closed, high.high_closed)]


def _without_points(points: Sequence[Tree]) -> list[Piece]:
    """All real numbers but these."""
    ends = [_MINUS_INFINITY, *sorted(points, key=_position), _INFINITY]
    return [Piece(low, high, False, False) for low, high in pairwise(ends)]


def _piece(low: Tree, high: Tree, low_closed: bool, high_closed: bool) -> Piece:
    """An end at infinity is open, however it is written."""
    if {low[0], high[0]} & {"interval", "tuple", "list", "set"}:
        raise Undecidable("an interval between intervals")
    return Piece(low, high, low_closed and low != _MINUS_INFINITY, high_closed and high != _INFINITY)


def _of_inequality(tree: Tree) -> list[Piece] | None:
    operators, sides, names = tree[1], tree[2], tree[3]
    if all(operator in (">", ">=") for operator in operators):
        operators = tuple("<" if operator == ">" else "<=" for operator in reversed(operators))
        sides, names = tuple(reversed(sides)), tuple(reversed(names))
    if not set(operators) <= {"<", "<="}:
        if operators == ("!=",) and names[0] is not None and is_constant(sides[1]):
            if not names[0].startswith("|"):
                return [Piece(_MINUS_INFINITY, sides[1], False, False), Piece(sides[1], _INFINITY, False, False)]
            return _without_points([_minus(sides[1]), sides[1]]) if _position(sides[1]) > 0 else None
        return None
    closed = [operator == "<=" for operator in operators]
    constant = [is_constant(side) for side in sides]
    if constant not in ([False, True], [True, False], [True, False, True]):
        return None
    middle = constant.index(False)
    low, high = (sides[0] if middle else None), (sides[-1] if constant[-1] else None)
    scale, shift = Fraction(1), Fraction(0)
    inner, modulus = (sides[middle][2], True) if sides[middle][:2] == ("fn", "abs") else (sides[middle], False)
    if names[middle] is None:
        line = _line(inner)
        if line is None or not line[1]:
            return None
        _, scale, shift = line
    high_closed = closed[-1] if high is not None else False
    low_closed = closed[0] if low is not None else False
    pieces = [_piece(low or _MINUS_INFINITY, high or _INFINITY, low_closed, high_closed)]
    if modulus:
        if any(end is not None and _position(end) < 0 for end in (low, high)):
            return None
        if high is None:
            pieces = [
                _piece(_MINUS_INFINITY, _minus(low), False, low_closed),
                _piece(low, _INFINITY, low_closed, False),
            ]
        elif low is None:
            pieces = [_piece(_minus(high), high, high_closed, high_closed)]
        else:
            pieces.insert(0, _piece(_minus(high), _minus(low), high_closed, low_closed))
    return [_solved(piece, scale, shift) for piece in pieces]


def _line(tree: Tree) -> tuple[str, Fraction, Fraction] | None:
    """Read ``2x - 1`` as (x, 2, -1); a constant as ("", 0, value); None for what is not linear in one symbol."""
    if is_constant(tree):
        value = exact_value(tree)
        return None if value is None else ("", Fraction(0), value)
    if tree[0] == "sym":
        return tree[1], Fraction(1), Fraction(0)
    if tree[0] not in ("add", "neg", "mul", "div"):
        return None
    parts = [_line(part) for part in tree[1:]]
    lines = [part for part in parts if part is not None]
    symbols = {name for name, _, _ in lines if name}
    if len(lines) != len(parts) or len(symbols) != 1:
        return None
    symbol, scale, shift = symbols.pop(), lines[0][1], lines[0][2]
    if tree[0] == "neg":
        return symbol, -scale, -shift
    for name, other_scale, other_shift in lines[1:]:
        if tree[0] == "add":
            scale, shift = scale + other_scale, shift + other_shift
        elif scale and name:  # a square
            return None
        elif tree[0] == "mul":
            scale, shift = scale * other_shift + shift * other_scale, shift * other_shift
        elif name or not other_shift:  # one over a symbol, or over nothing
            return None
        else:
            scale, shift = scale / other_shift, shift / other_shift
    return symbol, scale, shift


def _solved(piece: Piece, scale: Fraction, shift: Fraction) -> Piece:
    """The piece of x for a piece of ``scale * x + shift``."""
    if (scale, shift) == (1, 0):
        return piece

    def end(tree: Tree) -> Tree:
        if tree in (_INFINITY, _MINUS_INFINITY):
            return tree if scale > 0 else _INFINITY if tree == _MINUS_INFINITY else _MINUS_INFINITY
        value = exact_value(tree)
        if value is not None:
            return ("num", (value - shift) / scale)
        return ("div", ("add", tree, ("num", -shift)), ("num", scale))

    low, high, low_closed, high_closed = piece
    if scale > 0:
        return Piece(end(low), end(high), low_closed, high_closed)
    return Piece(end(high), end(low), high_closed, low_closed)


def unknowns(tree: Tree) -> set[str]:
    """The names that inequalities are about: the named side's name, else the symbols in it."""
    parts = tree[1:] if tree[0] in ("either", "both") else (tree,)
    found: set[str] = set()
    for part in parts:
        if part[0] == "rel":
            for side, name in zip(part[2], part[3]):
                found |= {name.strip("|")} if name is not None else symbols(side)
    return found


def _minus(tree: Tree | None) -> Tree:
    return ("neg", tree or ("num", Fraction(0)))


def _position(tree: Tree) -> float:
    if tree == _INFINITY:
        return float("inf")
    if tree == _MINUS_INFINITY:
        return float("-inf")
    if not is_constant(tree):
        raise Undecidable("an interval between expressions")
    exact = exact_value(tree)
    if exact is not None:
        return float(exact)
    value = decimal_value(tree)
    if value.imag:
        raise Undecidable("an interval between complex numbers")
    return float(value)


def same_real_set(gold: list[Piece], answer: list[Piece], same: Callable[[Tree, Tree], bool]) -> bool:
    """Whether two sets have the same pieces, in any order; touching pieces are joined first."""
    if len(gold) == len(answer) == 1:
        pairs = list(zip(gold, answer))
    else:
        gold, answer = _joined(gold), _joined(answer)
        if len(gold) != len(answer):
            return False
        pairs = list(zip(gold, answer))
    return all(
        (g.low_closed, g.high_closed) == (a.low_closed, a.high_closed) and same(g.low, a.low) and same(g.high, a.high)
        for g, a in pairs
    )


def _joined(pieces: list[Piece]) -> list[Piece]:
    ordered = sorted(pieces, key=lambda piece: (_position(piece.low), not piece.low_closed))
    joined: list[Piece] = []
    for piece in ordered:
        if joined:
            last = joined[-1]
            gap = _position(piece.low) - _position(last.high)
            if gap < 0 or (gap == 0 and (piece.low_closed or last.high_closed)):
                further = (_position(piece.high), piece.high_closed) > (_position(last.high), last.high_closed)
                end = piece if further else last
                joined[-1] = Piece(last.low, end.high, last.low_closed, end.high_closed)
                continue
        joined.append(piece)
    return joined
