"""Text as the words that decontamination compares: typography goes, numbers and the operators between them stay.

`to_words` is exact and knows where each word stood. `plain_text` is its quick shadow: the same runs of letters and of digits
in the same order, so that texts that have no run of them in common have no run of words in common either.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_SIGNS = {
    **{char: f"^{i}" for i, char in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
    **dict.fromkeys("×·⋅∙", "*"),
    "÷": "/",
}
_SIGN = re.compile(f"[{''.join(_SIGNS)}]")
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{\s*(-?[\w.]+)\s*\}\s*\{\s*(-?[\w.]+)\s*\}")
_STYLE = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname|emph)\s*\{([^{}]*)\}")
_TIMES = re.compile(r"\\(?:times|cdot|ast)(?![a-z])")
_DIVIDED = re.compile(r"\\div(?![a-z])")
_SPACING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad|thinspace|begin\{\w+\}|end\{\w+\})(?![a-z])|\\[,;:!> ]")
_THOUSANDS = re.compile(r",(?<=\d,)(?=\d{3}(?!\d))")
_WORD = re.compile(
    r"\d+(?:\.\d+)?"
    r"|[^\W\d_]+"
    r"|(?<=[\d)a-z])\s*[+/^]|(?<=[\d)])\s*\*(?=\s*[\d(-])|-(?=\s*[\d(])"  # operators, not bullets or bold
    r"|\((?=\s*[\d(-])|(?<=[\d)])\s*\)"
)
_TAG = re.compile(r"</?[a-z]{1,20}>")
_POINTS = re.compile(r"\(\s*\d+\s*(?:points?|pts?|marks?)\s*\)")
_DIGIT_OUTSIDE_ASCII = re.compile(r"[^\D0-9]")
_NO_WORD_OUTSIDE_ASCII = re.compile(r"[^\x00-\x7f\w]+")


@dataclass(frozen=True, slots=True)
class Words:
    """A text's words, and the normalized text that ``spans`` point into."""

    text: str
    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def numbers(self) -> tuple[str, ...]:
        return tuple(word for word in self.words if word[0].isdigit())

    @property
    def signs(self) -> tuple[str, ...]:
        """Numbers and operators: what makes two problems of one template different."""
        return tuple(word for word in self.words if not word[0].isalpha())

    def ngrams(self, n: int) -> list[tuple[str, ...]]:
        return [self.words[i : i + n] for i in range(len(self.words) - n + 1)]

    def excerpt(self, first: int, last: int) -> str:
        """The normalized text from word ``first`` to word ``last``, both included."""
        return self.text[self.spans[first][0] : self.spans[last][1]]


def to_words(text: str) -> Words:
    """Normalize a text (NFKC, case, LaTeX spacing and markup, thousands separators) and split it into words."""
    text = _normalized(text)
    words, spans = [], []
    for match in _WORD.finditer(text):
        words.append(match[0].strip())
        spans.append(match.span())
    return Words(text, tuple(words), tuple(spans))


def plain_text(text: str) -> str:
    """A text whose runs of letters and runs of digits are those of `to_words`; what stands between them is left as it is."""
    text = _normalized(text)
    return text if text.isascii() else _NO_WORD_OUTSIDE_ASCII.sub(" ", text)


def _normalized(text: str) -> str:
    if text.isascii():
        text = text.lower()
    else:
        text = _SIGN.sub(lambda sign: _SIGNS[sign[0]], text)
        text = unicodedata.normalize("NFKC", text).casefold()
        text = _DIGIT_OUTSIDE_ASCII.sub(lambda digit: str(int(digit[0])), text)
    text = text.replace("$", "").replace("~", " ")
    if "<" in text:
        text = _TAG.sub("\n", text)
    if "(" in text:
        text = _POINTS.sub("\n", text)
    text = _THOUSANDS.sub("", text.replace("{,}", ","))
    if "\\" in text:
        text = _FRACTION.sub(r" \1/\2 ", text)
        text = _STYLE.sub(r" \1 ", text)
        text = _TIMES.sub("*", text)
        text = _DIVIDED.sub("/", text)
        text = _SPACING.sub(" ", text)
    return text
