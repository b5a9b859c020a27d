r"""Cut an answer, in LaTeX or plain text, into tokens: the part that knows spellings and no mathematics.

Everything here is linear in the length of the text. Nothing is evaluated.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple


class Unreadable(ValueError):
    """The text is not mathematics that this reader knows; another opinion is needed."""


class Refused(Unreadable):
    """The text is too long or too deep, or has no one meaning; nobody else should try either."""


class Token(NamedTuple):
    """One token: ``kind`` is number, letter, command, environment, text, separator or symbol; ``spaced``: a blank before it."""

    kind: str
    value: str
    spaced: bool


_PLAIN_COMMANDS = {
    "infinity": "\\infty", "inf": "\\infty", "infty": "\\infty", "asin": "\\arcsin", "acos": "\\arccos", "atan": "\\arctan",
}  # fmt: skip

_SPELLINGS = {
    "−": "-", "–": "-", "‐": "-", "‑": "-", "＋": "+", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": "/",
    "⁄": "/", "∕": "/", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "≃": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ",
    "°": r"^{\circ}", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "μ": r"\mu ", "φ": r"\phi ", "ω": r"\omega ", "Δ": r"\Delta ",
    "′": "'", "’": "'", "∶": ":", "，": ",", "；": ";", "。": ".", "．": ".", "（": "(", "）": ")", "％": "%",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "\u200b": "",
    "\ufeff": "", "\u00a0": " ",
}  # fmt: skip
_UNICODE = str.maketrans(_SPELLINGS)
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_SUBSCRIPTS = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_DIGIT_OF = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺₀₁₂₃₄₅₆₇₈₉", "0123456789-+0123456789")

_TEXT_NAMES = (
    r"text(?:bf|it|rm|sf|tt|sc|normal|up)?|mbox|hbox|mathrm|mathbf|mathit|mathsf|mathtt|boldsymbol|bm|operatorname\*?|rm"
)
_TEXT = re.compile(rf"\\(?:{_TEXT_NAMES})\s*\{{([^{{}}]*)\}}")
_INVISIBLE = re.compile(
    r"(?<!\\)\\[,;:!> ()\[\]]|\\q?quad(?![b-z])"
    r"|\\(?:left|right|[bB]igg?[lrm]?|middle|displaystyle|textstyle|limits|nolimits|thinspace|mathstrut|allowbreak)(?![A-Za-z])\.?"
    r"|\\(?:hspace|vspace|phantom)\*?\{[^{}]*\}|\\(?:begin|end)\{(?:align|equation|gather|split)(?:ed)?\*?\}"
)
_BLANK_IN_NUMBER = re.compile(r"(?<=\d)\s+(?=\d)")
_DOUBLE_BACKSLASH = re.compile(r"\\\\(?=[A-Za-z{}])")
GLUED_CONJUNCTION = re.compile(r"(?<=[\d)\]}])(and|or)(?=[A-Z(\\\d-])")

_TOKENS = re.compile(
    rf"""(?P<space>[\s~]+)
    |(?P<number>\d{{1,3}}(?:,\d{{3}})+(?!\d)(?:\.\d+)?|\d+\.\d+|\d+\.(?![.\d])|\d+|\.\d+)
    |\\(?:{_TEXT_NAMES})\s*\{{(?P<text>[^{{}}]*)\}}
    |(?P<environment>\\(?:begin|end)\s*\{{\w+\*?\}})
    |(?P<command>\\(?:[A-Za-z]+|.))
    |(?P<word>(?<![A-Za-z])(?:a(?:rc)?(?:sin|cos|tan)|(?:sin|cos|tan|cot|sec|csc)h?|log|ln|lg|exp|sqrt|cbrt|abs|gcd|lcm|max|min|pi
        |infinity|infty|inf|and|or)(?![A-Za-z]))
    |(?P<letter>[^\W\d_])
    |(?P<symbol><=|>=|!=|==|\*\*|<|>|[-=+*/^_'!%|:;,.&()\[\]{{}}?])""",
    re.VERBOSE | re.DOTALL,
)
_GREEK_LETTERS = {"\\varepsilon": "\\epsilon", "\\varphi": "\\phi", "\\vartheta": "\\theta"}
_SAME = {
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\leq": "\\le", "\\geq": "\\ge", "\\neq": "\\ne",
    "\\leqslant": "\\le", "\\geqslant": "\\ge", "\\lt": "<", "\\gt": ">", "\\cdot": "*", "\\times": "*", "\\ast": "*",
    "\\div": "/", "**": "^", "<=": "\\le", ">=": "\\ge", "!=": "\\ne", "==": "=", "\\lbrace": "\\{", "\\rbrace": "\\}",
    "\\lvert": "|", "\\rvert": "|", "\\vert": "|", "\\mid": "|", "\\lbrack": "[", "\\rbrack": "]", "\\dbinom": "\\binom",
    "\\tbinom": "\\binom", "\\simeq": "\\approx", "\\cong": "\\approx", "\\varnothing": "\\emptyset", "\\colon": ":",
    "\\percent": "%", "\\%": "%", "\\prime": "'", "\\land": "and", "\\lor": "or", "\\equiv": "=", "\\degree": "\\degree",
    "\\&": "and", "\\coloneqq": "=", "\\Rightarrow": "\\implies",
} | _GREEK_LETTERS  # fmt: skip
_LETTER_UNITS = frozenset("mgsLlhNJWVKCAt")
_SEPARATORS = {"and": "and", "or": "or", ",and": "and", ",or": "or", "and,": "and"}


def normalized(text: str) -> str:
    r"""Rewrite what is only spelling: Unicode signs as commands, doubled backslashes, spacing, dollars, a closing full stop."""
    if not text.isascii():
        text = _SUPERSCRIPTS.sub(lambda m: "^{" + m[0].translate(_DIGIT_OF) + "}", text)
        text = _SUBSCRIPTS.sub(lambda m: "_{" + m[0].translate(_DIGIT_OF) + "}", text)
        text = unicodedata.normalize("NFKC", text.translate(_UNICODE)).translate(_UNICODE)
    if "\\" in text:
        if "\\\\" in text and "\\begin" not in text:
            text = _DOUBLE_BACKSLASH.sub(r"\\", text)
        text = re.sub(r",\\!\s*", ",", text)
        text = re.sub(r"(?<=\\\\)\s*\[\d*\.?\d+\s*(?:pt|em|ex|mm|cm)\]", "", text)  # \\[2pt]: a wider row
        text = _INVISIBLE.sub(" ", text)
    if text.startswith("$") and text.rstrip().endswith("\\$"):  # $185\$: the dollar closes
        text = text.rstrip()[:-2]
    if text.endswith("\\}") and "\\{" not in text:
        text = text[:-2]
    text = re.sub(r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d)", ",", text) if "{" in text else text
    text = re.sub(r"(?<!\\)\$", " ", text) if "$" in text else text
    if "and" in text or "or" in text:
        text = GLUED_CONJUNCTION.sub(r" \1 ", text)
    text = text.strip().rstrip("\\").strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    return text


def plain_words(text: str) -> str:
    r"""Return a text without markup, for comparing words: ``\text{No solution}.`` becomes ``no solution``."""
    text = _TEXT.sub(r" \1 ", normalized(text))
    text = _TEXT.sub(r" \1 ", text) if "\\" in text else text
    return " ".join(text.casefold().split())


def compact(text: str) -> str:
    """Return a text without markup and blanks (but between digits), letter case kept: equal ones are the same answer."""
    text = _TEXT.sub(r"\1", normalized(text))
    for name, other in (("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\cfrac", "\\frac")):
        text = text.replace(name, other)
    return "".join(_BLANK_IN_NUMBER.sub("␣", text).split())


def tokens_of(text: str) -> list[Token]:
    """Cut a normalized text into tokens.

    Raises:
        Unreadable: a character that no formula has.
    """
    found = []
    at, spaced, num_brackets = 0, False, 0
    match = _TOKENS.match
    while at < len(text):
        token = match(text, at)
        if token is None:
            raise Unreadable(f"unexpected {text[at]!r}")
        kind, value = token.lastgroup, token[0]
        at = token.end()
        if kind == "space":
            spaced = True
            continue
        if kind == "number" and "," in value:
            if num_brackets:  # in a tuple the comma parts: (3,125) is a point
                at -= len(value) - value.index(",")
                value = value[: value.index(",")]
            else:
                value = value.replace(",", "")
        elif kind == "text":
            value = " ".join(token["text"].split())
            value = value[1:-1] if len(value) == 3 and value[0] + value[2] == "()" else value
            bare = value.strip(" ,.").casefold()
            if bare in _SEPARATORS or not bare:
                kind, value = "separator", _SEPARATORS.get(bare, "")
                if not value:
                    continue
            elif len(value) == 1 and value.isalpha() and not (value in _LETTER_UNITS and found and found[-1].kind == "number"):
                kind = "letter"
        elif kind == "word":
            if value in ("and", "or"):
                kind = "separator"
            else:
                kind, value = "command", _PLAIN_COMMANDS.get(value, "\\" + value)
        elif kind in ("command", "symbol"):
            value = _SAME.get(value, value)
            if kind == "command" and value.startswith("\\quad"):
                value = value.removeprefix("\\quad")  # \quadx: a blank, then x
                at -= len(value)
                spaced = True
                continue
            kind = "separator" if value in ("and", "or") else "command" if value.startswith("\\") else "symbol"
        if value in ("(", "[", "\\{"):
            num_brackets += 1
        elif value in (")", "]", "\\}"):
            num_brackets -= 1
        found.append(Token(kind, value, spaced))
        spaced = False
    return found
