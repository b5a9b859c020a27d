r"""The signs that stand between the sides of a relation, and what a side may be that only names the value."""

from __future__ import annotations

import re

from stillhouse.pipeline.verifiers.tree import Tree

RELATIONS = {"=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\approx": "~", "\\in": "in"}
RELATIONS |= {
    name: name
    for name in (
        *("\\subset", "\\subseteq", "\\supset", "\\supseteq", "\\perp", "\\parallel", "\\nmid", "\\notin", "\\sim", "\\propto"),
        *("\\to", "\\mapsto", "\\implies", "\\iff", "\\Leftrightarrow", "\\rightarrow", "\\ll", "\\gg"),
    )
}  # never a factor: A \subset B is not B \subset A

# What stands left of an equals sign and only names the value: x, x_1, f(x), AB, |AB|, V_1:V_2, \frac{NO}{BO}, (p,q).
_ONE_NAME = (
    r"(?:(?:\\(?:angle|triangle|overline|overrightarrow|vec))?(?:[A-Za-z]|\\[A-Za-z]+|[A-Z]{2,}|\{(?:[A-Z]{2,}|[a-z])\})'*"
    r"(?:_(?:\w|\{(?:\\[a-z]+)?[\w,+-]+\}))?(?:\([\w,]+\))?)"
)
NAME = re.compile(
    rf"{_ONE_NAME}|\|{_ONE_NAME}\||{_ONE_NAME}(?:[:/]{_ONE_NAME})+|\\frac\{{{_ONE_NAME}\}}\{{{_ONE_NAME}\}}|\((?:{_ONE_NAME},)+{_ONE_NAME}\)"
)


def is_order(tree: Tree) -> bool:
    """Whether a tree is an inequality or a chain of them."""
    return tree[0] == "rel" and set(tree[1]) <= {"<", ">", "<=", ">=", "!="}


def are_of_different_names(items: list[Tree]) -> bool:
    """``x = 1 or y = 2``; the roots x_1 = 1 or x_2 = 2 are of one name."""
    names = [item[3][0] if item[0] == "rel" and item[1] == ("=",) else None for item in items]
    return None not in names and len({str(name).partition("_")[0] for name in names}) == len(names)
