r"""The signs that stand between the sides of a relation, and what a side may be that only names the value."""

from __future__ import annotations

import re

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
