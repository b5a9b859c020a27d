r"""The many writings of "n choose k" and of permutations, rewritten as ``\binom`` and as a quotient of factorials.

``C(5,2)``, ``5C2``, ``5 choose 2``, ``_5C_2``, ``{}^5C_2`` and ``C_5^2`` (5 below, as in Chinese and Russian schools) are 10;
the same with P, and ``A_5^2``, are 20. ``C(2,5)`` and ``P(3,4)`` count nothing: they are points.
"""

from __future__ import annotations

import re

_ARGUMENT = r"(?:\{{\s*(?P<{0}>[\da-z+*-]{{1,8}})\s*\}}|(?P<{0}1>\d{{1,4}}|[a-z]))"
_LETTER = r"(?:\\(?:text|mathrm|mathbf|operatorname)\s*\{\s*)?(?P<letter>[CPA])\s*\}?"
_N, _K = _ARGUMENT.format("n"), _ARGUMENT.format("k")
_BEFORE = r"(?<![A-Za-z\d)}_^\\])"
_WRITINGS = [
    re.compile(pattern)
    for pattern in (
        rf"(?:\{{\s*\}}\s*)?[_^]\s*{_N}\s*{_LETTER}\s*_\s*{_K}",
        rf"{_BEFORE}{_LETTER}\s*_\s*{_N}\s*\^\s*{_K}",
        rf"{_BEFORE}{_LETTER}\s*\^\s*{_K}\s*_\s*{_N}",
        rf"{_BEFORE}(?P<letter>[CP])\s*\(\s*(?P<n>[\da-z+*-]{{1,8}})\s*,\s*(?P<k>[\da-z+*-]{{1,8}})\s*\)",
        rf"{_BEFORE}(?P<n>\d{{1,4}})\s?(?P<letter>[CP])\s?(?P<k>\d{{1,4}})(?![\d.])",
        rf"{_BEFORE}(?:binom|binomial|nCr)\(\s*(?P<n>[\da-z+*-]{{1,8}})\s*,\s*(?P<k>[\da-z+*-]{{1,8}})\s*\)",
        rf"{_BEFORE}(?P<n>\d{{1,4}}|[a-z])\s+choose\s+(?P<k>\d{{1,4}}|[a-z])(?![\w.])",
    )
]
_HAS_LETTER = re.compile(r"[CPA](?![a-zA-Z])|[CPA]\(|nCr|\bbinom|choose")


def with_binomials(text: str) -> str:
    """Rewrite every such writing in a text; the text itself where there is none."""
    if not _HAS_LETTER.search(text):
        return text
    for writing in _WRITINGS:
        text = writing.sub(_rewritten, text)
    return text


def _rewritten(match: re.Match[str]) -> str:
    found = {name: value for name, value in match.groupdict().items() if value is not None}
    n, k = (found.get(name) or found[f"{name}1"] for name in ("n", "k"))
    if n.isdigit() and k.isdigit() and int(k) > int(n):
        return match[0]
    if found.get("letter", "C") == "C":
        return f"\\binom{{{n}}}{{{k}}}"
    return f"\\frac{{({n})!}}{{({n}-({k}))!}}" if n.isdigit() and k.isdigit() else match[0]
