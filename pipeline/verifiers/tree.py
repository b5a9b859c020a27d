r"""The tree that an answer is read into, and the tokens that end an expression.

A tree is nested tuples, the first element the kind of node:

    ("num", Fraction)  ("dec", Fraction, places)  ("sym", name)  ("const", "pi" | "e" | "i" | "inf")
    ("add", a, b, …)  ("neg", a)  ("mul", a, b, …)  ("div", a, b)  ("pow", a, b)  ("fn", name, a, …)  ("opaque", name, a, …)
    ("pct", a)  ("deg", a)  ("qty", a, unit)  ("text", words)  ("mat", row, …)
    ("list", item, …)  ("tuple", item, …)  ("set", item, …)  ("interval", low, high, low closed, high closed)
    ("either", relation, …)  ("both", relation, …): inequalities with "or", with "and" between them, x = 1 or y = 2
    ("approx", exact, rounded)  ("union", a, b, …)  ("ratio", a, b, …)  ("time", hour, ":30", "a" | "p" | None)
    ("date", month, day, year or "")
    ("rel", (operator, …), (side, …), (name or None, …))
"""

from __future__ import annotations

from typing import Any

Tree = tuple[Any, ...]

TEXT_NAME = "'"
"""How a name begins that is words: of ``\\text{Area} = 27``."""

BIG_OPERATORS = frozenset(["\\sum", "\\prod", "\\int", "\\lim", "\\iint", "\\oint", "\\bigcup", "\\bigcap"])
ENDS = frozenset(
    [*(")", "]", "}", "\\}", ",", ";", ":", "&", "\\\\", "\\rangle", "\\rfloor", "\\rceil"),
     *("\\cup", "\\cap", "\\setminus", "\\over", "\\choose")]
)  # fmt: skip


def negated(tree: Tree) -> Tree:
    """Minus a tree; of a lone number the number itself."""
    if tree[0] == "num":
        return ("num", -tree[1])
    if tree[0] == "dec":
        return ("dec", -tree[1], tree[2])
    if tree[0] == "qty":
        return ("qty", negated(tree[1]), tree[2])
    return ("neg", tree)


def replaced(tree: Tree, old: Tree, new: Tree) -> Tree:
    """The tree with another one in each place of ``old``."""
    if tree == old:
        return new
    return tuple(replaced(part, old, new) if isinstance(part, tuple) else part for part in tree)


def both_signs(upper: Tree, lower: Tree) -> Tree:
    """Merge the readings of ``\\pm`` as plus and as minus: both values where they differ, one where they do not."""
    if upper == lower:
        return upper
    if upper[0] == lower[0] in ("list", "set") and len(upper) == len(lower):
        items: list[Tree] = []
        for one, other in zip(upper[1:], lower[1:]):
            both = both_signs(one, other)
            items += both[1:] if both[0] == "list" and one[0] != "list" else [both]
        return (upper[0], *items)
    return ("list", upper, lower)


def symbols(tree: Tree) -> set[str]:
    """The names of the symbols in a tree."""
    if tree[0] == "sym":
        return {tree[1]}
    parts = [part for part in tree[1:] if isinstance(part, tuple) and part and isinstance(part[0], str)]
    return set().union(*map(symbols, parts))


def contains(tree: Tree, kind: str, names: frozenset[str]) -> bool:
    """Whether a node of this kind with one of these names is in a tree."""
    return (tree[0] == kind and tree[1] in names) or any(
        contains(part, kind, names) for part in tree[1:] if isinstance(part, tuple) and part and isinstance(part[0], str)
    )
