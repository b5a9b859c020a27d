r"""Cut an answer, in LaTeX or plain text, into tokens: the part that knows spellings and no mathematics.

Everything here is linear in the length of the text. Nothing is evaluated.
"""

from __future__ import annotations

import functools
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
    "°": r"^{\circ}", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "μ": r"\mu ", "φ": r"\phi ", "ω": r"\omega ", "Δ": r"\Delta ",
    "′": "'", "’": "'", "∶": ":", "，": ",", "；": ";", "。": ".", "．": ".", "（": "(", "）": ")", "％": "%",
    "∛": r"\cbrt ", "∧": r"\land ", "∨": r"\lor ", "Ω": r"\Omega ", "\u2126": r"\Omega ", "ⁿ": "^{n}",
    "…": r"\ldots ", "\u00a0": " ", "、": ",", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "≡": r"\equiv ", "⟨": r"\langle ", "⟩": r"\rangle ", "∠": r"\angle ", "△": r"\triangle ", "∣": "|", "∖": r"\setminus ",
    "⩽": r"\le ", "⩾": r"\ge ", "∑": r"\sum ", "∏": r"\prod ", "≦": r"\le ", "≧": r"\ge ", "⟹": r"\implies ", "⇒": r"\implies ",
}  # fmt: skip
_FRACTION_SIGNS = {sign: unicodedata.normalize("NFKC", sign).split("⁄") for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"}
# Before NFKC, which would make 21⁄5 of 2⅕.
_SPELLINGS |= {sign: f"\\frac{{{top}}}{{{bottom}}}" for sign, (top, bottom) in _FRACTION_SIGNS.items()}
_UNICODE = str.maketrans(_SPELLINGS)
_UNSEEN = re.compile(
    "[\u00ad\u200b-\u200f\u202a-\u202e\u2060\u2061\u2066-\u2069\ufe0f\ufeff]"
)  # joiners, directions, soft hyphens
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_SUBSCRIPTS = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_DIGIT_OF = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺₀₁₂₃₄₅₆₇₈₉", "0123456789-+0123456789")

_TEXT_NAMES = (
    r"text(?:bf|it|rm|sf|tt|sc|normal|up)?|mbox|hbox|mathrm|mathbf|mathit|mathsf|mathtt|boldsymbol|bold|pmb|emph|bm"
    r"|operatorname\*?|rm"
)
_TEXT = re.compile(rf"\\(?:{_TEXT_NAMES})\s*\{{([^{{}}]*)\}}")
_INVISIBLE = re.compile(
    r"(?<!\\)\\[,;:!> ()\[\]]|\\q?quad(?![b-z])"
    r"|\\(?:left|right|[bB]igg?[lrm]?|middle|displaystyle|textstyle|limits|nolimits|thinspace|mathstrut|allowbreak"
    r"|underline|bf|it|large|Large|huge|Huge)(?![A-Za-z])\.?|\\(?:text)?color\s*\{[^{}]*\}"
    r"|\\(?:hspace|vspace|phantom)\*?\{[^{}]*\}|\\(?:begin|end)\{(?:align|equation|gather|split)(?:ed)?\*?\}"
)
_REALS_BUT = re.compile(r"(?<=\\mathbb\{R\})\s*-\s*(?=\\\{)")
_OLD_FONT = re.compile(r"\{\\(?:rm|bf|it|sf|tt)\s+([^{}]*)\}")  # {\rm cm}
_BLACKBOARD = re.compile(r"\\(?:mathbf|Bbb|mathds)\s*\{?([RZQN])(?![A-Za-z])\}?")  # other fonts of the sets of numbers
_UNIT_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*\\(?:text|mathrm)\{([^{}]*)\}\s*\}\s*\{\s*\\(?:text|mathrm)\{([^{}]*)\}\s*\}")
_UNIT_POWERS = re.compile(r"\\(?:text|mathrm)\{(?:[^{}]|\^\{-?\d\})*\}")  # \mathrm{m\,s^{-1}}: a text has no braces in it
_MARKDOWN = re.compile(r"(\*\*|__|`|\")(.+)\1", re.DOTALL)
_FRENCH = re.compile(r"([\[\]])([^\[\],;]{1,80})([,;])([^\[\],;]{1,80})([\[\]])")  # ]0,1[ is open
_LONE_DOLLAR = re.compile(r"\s*\$\s*[\d.][^$\\]*$")
# 3e8, 1.5e-3, 2E-3; not 2e-3, which may be 2e minus 3
_SCIENTIFIC = re.compile(r"(?<![A-Za-z\d.\\{])(\d+\.\d+(?=[eE])|\d+(?=e\+?\d|E))[eE](?:\+?(\d{1,4})|(-\d{1,4}))(?![\w.])")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)")
_CUP = re.compile(r"(?<=[)\]])\s*(?:U|\\bigcup)\s*(?=[(\[])")
_MICRO = re.compile(r"(?<=[\d\s}])[µμ](?=[a-zA-Z]\b)")  # 5 µm, not the letter mu
_MU_UNIT = re.compile(r"\\mu\s*\\(text|mathrm)\{\s*")
_OHM = re.compile(r"(?<=[\d\s}])(?:\\(?:text|mathrm)\{)?([kM]?)\}?\s*\\Omega\s*$")
_DEGREES = re.compile(
    r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*(?:\\(?:text|mathrm)\s*\{\s*)?([CF])(?![A-Za-z])\s*\}?"
    r"|(?<=[\d\s{])degrees?\s+([CcFf])(?:elsius|entigrade|ahrenheit)?(?![A-Za-z])"
)
_BLANK_IN_NUMBER = re.compile(r"(?<=\d)\s+(?=\d)")
_DEGREES_AS_O = re.compile(r"(?<=[\d)}])\s*\^\s*(?:o(?![A-Za-z])|\{\s*o\s*\})")  # 60^o
_UNIT_IN_BRACKETS = re.compile(r"(?<=[\d}\s])\(\s*(\\(?:text|mathrm)\s*\{[^{}()]*\}(?:\s*\^\s*\{?\d\}?)?)\s*\)$")
_MOD = re.compile(r"\(\s*(?:\\(?:text|mathrm|operatorname)\s*\{\s*mod\s*\}|\\b?mod(?![a-z])|mod\b)\s*([^()]*)\)")
_ALIGNED = re.compile(
    r"\\begin\s*\{(?:align|gather|split)(?:ed)?\*?\}(.*)\\end\s*\{(?:align|gather|split)(?:ed)?\*?\}", re.DOTALL
)
_OPEN_CASES = re.compile(  # \left\{ \begin{array}{l} ... \right.
    r"\\left\s*\\\{\s*\\begin\s*\{(array|aligned|matrix)\}(?:\s*\{[lcr]*\})?(.*?)\\end\s*\{\1\}\s*(?:\\right\s*\.?)?", re.DOTALL
)
_DOUBLE_BACKSLASH = re.compile(r"\\\\(?=[A-Za-z{}])")
GLUED_CONJUNCTION = re.compile(r"(?<=[\d)\]}])(and|or)(?=[A-Z(\\\d-])")

_TOKENS = re.compile(
    rf"""(?P<space>[\s~]+)
    |(?P<number>\d{{1,3}}(?:,\d{{3}})+(?!\d)(?:\.\d+)?|\d+\.\d+|\d+\.(?![.\d])|\d+|\.\d+)
    |\\(?:{_TEXT_NAMES})\s*\{{(?P<text>[^{{}}]*)\}}
    |(?P<environment>\\(?:begin|end)\s*\{{\w+\*?\}})
    |(?P<command>\\(?:[A-Za-z]+|.))
    |(?P<word>(?<![A-Za-z])(?:a(?:rc)?(?:sin|cos|tan)|(?:sin|cos|tan|cot|sec|csc)h?|log|ln|lg|exp|sqrt|cbrt|abs|floor|ceil|gcd|lcm|max|min|pi
        |infinity|infty|inf|and|or)(?![A-Za-z]))
    |(?P<han>[\u3400-\u9fff]+)
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
    "\\percent": "%", "\\%": "%", "\\prime": "'", "\\wedge": "\\land", "\\vee": "\\lor", "\\equiv": "=", "\\degree": "\\degree",
    "\\&": "and", "\\coloneqq": "=",
    "\\backslash": "\\setminus", "\\smallsetminus": "\\setminus", "\\sfrac": "\\frac", "\\nicefrac": "\\frac",
    "\\dots": "\\ldots", "\\cdots": "\\ldots", "\\Rightarrow": "\\implies",
} | _GREEK_LETTERS  # fmt: skip
_LETTER_UNITS = frozenset("mgsLlhNJWVKCAt")
_IN_NUMBERS = frozenset(["\\frac", "\\sqrt", "\\pi", "{", "}", "-", "+", "*", "/", "^", "(", ")"])
_HAN_SEPARATORS = {"和": "and", "与": "and", "及": "and", "且": "and", "或": "or", "或者": "or"}
_SEPARATORS = {"and": "and", "or": "or", ",and": "and", ",or": "or", "and,": "and"}


def with_powers(text: str) -> str:
    """Write superscript digits as powers: to a regular expression they are letters."""
    return _SUPERSCRIPTS.sub(lambda m: "^{" + m[0].translate(_DIGIT_OF) + "}", text)


@functools.lru_cache(maxsize=512)
def normalized(text: str) -> str:
    r"""Rewrite what is only spelling: Unicode signs as commands, doubled backslashes, spacing, dollars, a closing full stop."""
    if not text.isascii():
        text = _MICRO.sub("u", with_powers(_UNSEEN.sub("", text)))
        text = _SUBSCRIPTS.sub(lambda m: "_{" + m[0].translate(_DIGIT_OF) + "}", text)
        text = unicodedata.normalize("NFKC", text.translate(_UNICODE)).translate(_UNICODE)
    if "mod" in text:
        text = _MOD.sub(r"\\pmod{\1}", text)
    if "~" in text or "{:}" in text:
        text = text.replace("~", " ").replace("{:}", ":")
    if "\\" in text:
        if "\\left" in text and "\\begin" in text:
            text = _OPEN_CASES.sub(r"\\begin{cases}\2\\end{cases}", text)
        if (lines := _ALIGNED.fullmatch(text.strip("$ \n"))) and "\\begin" not in lines[1]:
            text = re.sub(r"\\\\(?:\[\w.]*\])?", " , ", lines[1]).replace("&", " ")
        if "\\\\" in text and "\\begin" not in text:
            text = _DOUBLE_BACKSLASH.sub(r"\\", text)
        text = re.sub(r",\\!\s*", ",", text)
        if "mod" in text:
            text = text.replace("\\bmod", "\\pmod").replace("\\mod", "\\pmod") if "\\equiv" in text else text
        text = _OLD_FONT.sub(r"\\text{\1}", text)
        text = _BLACKBOARD.sub(r"\\mathbb{\1}", text)
        text = _REALS_BUT.sub(r"\\setminus ", text)
        text = _UNIT_FRACTION.sub(r"\\text{\1/\2}", text)
        text = _UNIT_POWERS.sub(lambda m: re.sub(r"\^\{(-?\d)\}", r"^\1", m[0]), text) if "^" in text else text
        text = re.sub(r"(?<=\\\\)\s*\[\d*\.?\d+\s*(?:pt|em|ex|mm|cm)\]", "", text)  # \\[2pt]: a wider row
        text = _INVISIBLE.sub(" ", text)
        text = _UNIT_IN_BRACKETS.sub(r"\1", text.rstrip()) if text.rstrip().endswith(")") else text
        text = _OHM.sub(r"\\text{ \1ohm}", _MU_UNIT.sub(r"\\\1{u", text)) if "\\mu" in text or "Omega" in text else text
    if text.startswith("$") and text.rstrip().endswith("\\$"):  # $185\$: the dollar closes
        text = text.rstrip()[:-2]
    if text.endswith("\\}") and "\\{" not in text:
        text = text[:-2]
    text = re.sub(r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d)", ",", text) if "{" in text else text
    if "$" in text:
        text = "\\" + text.lstrip() if _LONE_DOLLAR.match(text) else text  # $5: the dollar opens no formula
        text = re.sub(r"(?<!\\)\$", " ", text)
    if "e" in text or "E" in text:
        text = _SCIENTIFIC.sub(r"\1\\times 10^{\2\3}", text)
    text = text.replace("...", "\\ldots ")
    if "^" in text and "o" in text:
        text = _DEGREES_AS_O.sub(r"^{\\circ}", text)
    if "\\circ" in text or "degree" in text:
        text = _DEGREES.sub(lambda m: f"\\text{{ deg{m[1]}}}" if m[1] else f"deg{m[2].upper()}", text)
    if "and" in text or "or" in text:
        text = GLUED_CONJUNCTION.sub(r" \1 ", text)
    text = text.strip().rstrip("\\").strip()
    if (marked := _MARKDOWN.fullmatch(text)) and marked[1] not in marked[2]:
        text = marked[2].strip()
    if "^" in text and "10" in text:
        text = _TIMES_TEN.sub(r"\\times ", text)
    if text.count("]") + text.count("[") > 1 and "\\sqrt" not in text and "\\begin" not in text:
        text = _FRENCH.sub(_plain_brackets, text)
        text = _CUP.sub(r"\\cup ", text)
    elif "(" in text:
        text = _CUP.sub(r"\\cup ", text)
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    return text


def _plain_brackets(interval: re.Match[str]) -> str:
    opening, low, comma, high, closing = interval.groups()
    return f"{opening.replace(']', '(')}{low}{comma}{high}{closing.replace('[', ')')}"


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


def _takes_unit(tokens: list[Token]) -> bool:
    """Whether a unit may follow: tokens are a number, or end in one or in another unit, as that of m before s in m / s."""
    if not tokens:
        return False
    if all(token.kind == "number" or token.value in _IN_NUMBERS for token in tokens[-40:]):
        return True
    before = next((token for token in reversed(tokens[-6:]) if token.value not in "/*^{}-" and token.kind != "number"), None)
    return tokens[-1].kind == "number" or (before is not None and before.kind == "text")


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
            if bare in ("infinity", "infty"):
                kind, value = "command", "\\infty"
            elif bare in _SEPARATORS or not bare:
                kind, value = "separator", _SEPARATORS.get(bare, "")
                if not value:
                    continue
            elif (
                len(value) == 1 and value.isalpha() and value < "\u3400" and not (value in _LETTER_UNITS and _takes_unit(found))
            ):
                kind = "letter"
        elif kind == "han":
            kind, value = ("separator", _HAN_SEPARATORS[value]) if value in _HAN_SEPARATORS else ("text", value)
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
            kind = (
                "separator" if value in ("and", "or", "\\land", "\\lor") else "command" if value.startswith("\\") else "symbol"
            )
        if value in ("(", "[", "\\{"):
            num_brackets += 1
        elif value in (")", "]", "\\}"):
            num_brackets -= 1
        found.append(Token(kind, value, spaced))
        spaced = False
    return found
