r"""Values that are given by name: ``x=1, y=2``, ``(x, y) = (1, 2)``; compared by their names, else by their order.

``x=1, x=2`` gives two values to one name, as ``x = 1 or 2`` does: no assignment, and no answer to one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from stillhouse.pipeline.verifiers.evaluate import same_value
from stillhouse.pipeline.verifiers.exact_values import is_constant
from stillhouse.pipeline.verifiers.matrices import is_matrix
from stillhouse.pipeline.verifiers.tree import Tree

SEQUENCES = ("list", "set", "tuple")
_BOUND = re.compile(r"\([a-z](?:,[a-z])*\)\Z")


def named(tree: Tree) -> tuple[str, Tree] | None:
    """Split ``name = value`` or ``name in set``; None for an equation that only holds, as 7 = 11a + c, or 2x in a set.

    Of a chain ``x = 2 + 3 = 5`` the last member is the value, if those before it are no other numbers.
    """
    if tree[0] != "rel" or set(tree[1]) - {"=", "in"}:
        return None
    operators, sides, names = tree[1:]
    last = sides[-1]
    if operators[-1] == "in":
        return None if names[-2] is None else (names[-2], last)
    if len(sides) == 2 and names[0] is None and names[1] is not None and is_constant(sides[0]):
        return names[1], sides[0]  # 5 = x
    if is_constant(last) and any(is_constant(side) and not same_value(side, last) for side in sides[:-1]):
        return None
    if names[0] is not None:
        return None if len(sides) > 2 and last[0] == "sym" else (names[0], last)  # a = b = c
    if len(sides) == 2:
        return ("", last) if is_constant(sides[0]) and is_constant(last) else None
    return ("", last) if is_constant(last) else None


def head(name: str) -> str:
    """``W`` of ``W(n)``, whose letter is bound; ``f(1)`` and ``P(A)`` are names as they are."""
    return _BOUND.sub("", name) if not name.startswith("(") else name


def same_name(one: str, other: str) -> bool:
    """Whether two names are one; ``P`` may be ``P(A)``, but ``P(B)`` is not."""
    one, other = head(one), head(other)
    bare = {name.partition("(")[0] for name in (one, other)}
    return one == other or (len(bare) == 1 and bool(bare & {one, other}))


def stem(name: str) -> str:
    """``x`` of ``x_1`` and of ``x(t)``."""
    return head(name).partition("_")[0]


def items_of(tree: Tree) -> Sequence[Tree]:
    return tree[1:] if tree[0] in SEQUENCES else (tree,)


def names_and_values(tree: Tree) -> tuple[list[str | None], list[Tree]]:
    """The names of a sequence's items, None for one without, and their values."""
    pairs = [(named(item), item) for item in items_of(tree)]
    return [pair[0] if pair else None for pair, _ in pairs], [pair[1] if pair else item for pair, item in pairs]


def grouped(tree: Tree) -> Tree:
    """``p=5, q=2, p=7, q=2`` names its pairs in turn: make it a list of pairs; ``x \\ne 1, 2`` is x \\ne 1, x \\ne 2."""
    if tree[0] != "list":
        return tree
    if tree[1:] and tree[1][:2] == ("rel", ("!=",)) and all(is_constant(item) and item[0] != "rel" for item in tree[2:]):
        return ("list", tree[1], *(("rel", ("!=",), (tree[1][2][0], item), (tree[1][3][0], None)) for item in tree[2:]))
    names = [pair[0] for pair in map(named, tree[1:]) if pair]
    if len(names) != len(tree) - 1:
        return tree
    period = len(set(names))
    if 1 < period < len(names) and len(names) % period == 0 and names == names[:period] * (len(names) // period):
        return ("list", *(("tuple", *tree[at : at + period]) for at in range(1, len(tree), period)))
    return tree


def same_assignment(gold: Tree, answer: Tree, same: Callable[[Tree, Tree], bool]) -> bool | None:
    """Compare where one of both gives values to different names; None where neither does, or the other is a matrix."""
    gold_values, values = _assignment(gold), _assignment(answer)
    if gold_values and values:
        return gold_values.keys() == values.keys() and all(same(gold_values[name], values[name]) for name in values)
    if not gold_values and not values:
        return None
    other = answer if gold_values else gold
    if other[0] in ("set", "list") and len(other) == 2:  # {(1, 2)}
        other = other[1]
    if other[0] == "rel" and (pair := named(other)) is not None and pair[1][0] == "tuple":
        if pair[0].startswith("("):
            return False
        other = pair[1]  # P = (1, 2)
    if other[0] not in SEQUENCES:
        return None if other[0] == "rel" or is_matrix(other) else False  # a=5, b=5 is not 5
    if other[0] == "set" or any(named(item) for item in items_of(other)):
        return False  # no order; one name for all, or names for some
    orders = _orders(gold_values or values or {}, alphabet_only=other[0] == "tuple")
    pairs = [list(zip(order, items_of(other), strict=False)) for order in orders if len(order) == len(items_of(other))]
    return any(all(same(*(pair if gold_values else pair[::-1])) for pair in of_order) for of_order in pairs)


def _assignment(tree: Tree) -> dict[str, Tree] | None:
    """The values by name, where there are at least two names with different stems and one value each."""
    if tree[0] == "rel":
        pair = named(tree)
        if pair is None or not pair[0].startswith("(") or pair[1][0] != "tuple":
            return None
        names, values = pair[0].strip("()").split(","), list(pair[1][1:])
    elif tree[0] in SEQUENCES:
        found, values = names_and_values(tree)
        names = [head(name) for name in found if name]
    else:
        return None
    if len(names) != len(values) or len(names) < 2 or len({stem(name) for name in names}) != len(names):
        return None
    return dict(zip(names, values))


def _orders(values: dict[str, Tree], *, alphabet_only: bool) -> list[list[Tree]]:
    """The orders in which the values may stand without names: as written; letters that are neighbours (x, y) have one order."""
    written = list(values.values())
    letters = sorted(values)
    neighbours = all(len(name) == 1 for name in letters) and ord(letters[-1]) - ord(letters[0]) == len(letters) - 1
    if not neighbours:
        return [written]
    alphabetic = [values[name] for name in letters]
    return [alphabetic] if alphabet_only else [alphabetic, written]
