"""Text as the words that decontamination compares: typography goes, numbers and the operators between them stay.

`to_words` is exact and knows where each word stood. `plain_text` is its quick shadow: the same runs of letters and of digits
in the same order, so that texts that have no run of them in common have no run of words in common either.
"""

from __future__ import annotations

import html
import re
import unicodedata
from dataclasses import dataclass

import numpy as np

_SIGNS = {
    **{char: f"^{i}" for i, char in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
    **dict.fromkeys("×·⋅∙", "*"),
    "÷": "/",
    **dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff", ""),  # invisible
    "°": "^circ ",
}
# Signs by the names of their LaTeX commands.
_NAMED = (
    "α alpha β beta γ gamma δ delta ε epsilon ϵ epsilon ζ zeta η eta θ theta ι iota κ kappa λ lambda μ mu ν nu ξ xi π pi ρ rho "
    "σ sigma τ tau υ upsilon φ phi ϕ phi χ chi ψ psi ω omega Γ gamma Δ delta Θ theta Λ lambda Ξ xi Π pi Σ sigma Φ phi Ψ psi "
    "Ω omega ≤ le ≥ ge ≠ ne ∠ angle ∞ infty √ sqrt ∈ in ∉ notin ∪ cup ∩ cap ⊂ subset ⊆ subseteq ∅ emptyset ± pm → rightarrow "
    "⇒ rightarrow △ triangle ⊥ perp ∥ parallel ≡ equiv ≈ approx ≅ cong ∑ sum ∏ prod ∫ int ∂ partial ∀ forall ∃ exists ⌊ lfloor "
    "⌋ rfloor ⌈ lceil ⌉ rceil"
)
_SIGNS |= {sign: f" {name} " for sign, name in re.findall(r"(\S) (\w+)", _NAMED)}
# Chinese and Japanese set no blanks between words: there, a letter is a word.
_IDEOGRAM = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
_IDEOGRAMS = re.compile(f"([{_IDEOGRAM}])")
# Cells of boards, lines of circuits, operators of logic; no bullets.
_PICTURE = "\u2227\u2228\xac\u2295\u2194\u2500-\u259f\u2705\u274c\u2753-\u2755\u2b1b\u2b1c\U0001f300-\U0001faff"
# (what must be in the text for the pattern to be worth a search, pattern, replacement), in this order
_LATEX = (
    ("\\", re.compile(r"\\(?:(?=[*_#])|[()\[\]])"), " "),
    ("frac", re.compile(r"\\[dtc]?frac\s*\{\s*(-?\\?[\w.]+)\s*\}\s*\{\s*(-?\\?[\w.]+)\s*\}"), r" \1/\2 "),
    ("frac", re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    ("frac", re.compile(r"\\frac\s*(\d)\s*(\d)"), r" \1/\2 "),
    ("eq", re.compile(r"\\(le|ge|ne)q(?![a-z])"), r"\\\1"),
    ("{", re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathbb|boldsymbol|operatorname|emph)\s*\{([^{}]*)\}"), r" \1 "),
    ("sqrt", re.compile(r"sqrt\s*\{\s*([\w.]+)\s*\}"), r"sqrt \1 "),
    ("\\var", re.compile(r"\\var(?=epsilon|phi|theta|rho)"), r"\\"),
    ("\\degree", re.compile(r"\\degree(?![a-z])"), "^circ"),
    ("\\to", re.compile(r"\\to(?![a-z])"), r"\\rightarrow"),
    ("\\implies", re.compile(r"\\implies(?![a-z])"), r"\\rightarrow"),
    ("\\", re.compile(r"\\(?:times|cdot|ast)(?![a-z])"), "*"),
    ("\\div", re.compile(r"\\div(?![a-z])"), "/"),
    (
        "\\",
        re.compile(
            r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|quad|qquad|thinspace"
            r"|mid|[lr]?vert|[lcv]?dots|begin\{\w+\}|end\{\w+\})(?![a-z])|\\[,;:!> ]"
        ),
        " ",
    ),
)
# A text in JSON, or as Python prints it: \\n is a line's end, unless it begins a command.
_ESCAPED_LINE = re.compile(
    r"\\[nr](?!(?:e|eq|u|abla|ot|otin|eg|i|mid|exists|olimits|ewline|earrow|atural|leq|geq|sim|parallel|subseteq"
    r"|m|ho|ight|angle|floor|ceil|vert|brace|brack|ightarrow|ule)(?![a-z]))"
)
_ESCAPED_LETTERS = re.compile(r"(?:\\u[0-9a-fA-F]{4})+")
_RAISED = re.compile(r"\^ ?\{([^{}]*)\}")
_LOWERED = re.compile(r"_ ?\{([^{}]*)\}")
_QUOTED_LINE = re.compile(r"\n[ \t]*>")
_THOUSANDS = re.compile(r",(?<=\d,)(?=\d{3}(?!\d))")
_WORD = re.compile(
    r"\d+(?:\.\d+)?"
    rf"|[{_IDEOGRAM}]|[^\W\d_{_IDEOGRAM}]+"
    r"|(?<=[\d)a-z])\s*[+/^]|(?<=[\d)])\s*\*(?=\s*[\d(-])|-(?=\s*[\d(])"  # operators, not bullets or bold
    r"|\((?=\s*[\d(-])|(?<=[\d)])\s*\)"
    r"|(?<![^\s|*])(?:_+(?![^\s|*])|__+(?![^\s?.,;:!]))|(?<=\|\s)\.(?=\s+\|)"  # empty cells and blanks to fill in
    rf"|[{_PICTURE}]"
)
_TAG = re.compile(r"</?[a-z]{1,20}>")
_POINTS = re.compile(r"[(\[]\s*\d+\s*(?:points?|pts?|marks?)\s*[)\]]")


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

    def gap(self, at: int) -> str:
        """What stands between word ``at - 1`` and word ``at``; a line break at both ends of the text."""
        if at in (0, len(self.words)):
            return "\n"
        return self.text[self.spans[at - 1][1] : self.spans[at][0]]

    def excerpt(self, first: int, last: int) -> str:
        """The normalized text from word ``first`` to word ``last``, both included."""
        return self.text[self.spans[first][0] : self.spans[last][1]]


def to_words(text: str) -> Words:
    """Normalize a text (NFKC, case, LaTeX spacing and markup, thousands separators) and split it into words."""
    text = _normalized(text)
    words, spans = [], []
    for match in _WORD.finditer(text):
        word = match[0].strip()
        words.append("_" if word[0] == "_" else word)
        spans.append(match.span())
    return Words(text, tuple(words), tuple(spans))


def plain_text(text: str) -> str:
    """A text whose runs of letters and runs of digits are those of `to_words`; what stands between them is left as it is."""
    text = _normalized(text)
    if text.isascii():
        return text
    letters = _letters(text)
    for letter in letters:
        if not letter.isalnum():
            text = text.replace(letter, " ")
    return _IDEOGRAMS.sub(r" \1 ", text) if _IDEOGRAMS.search(letters) else text


def _letters(text: str) -> str:
    """The different letters of a text that are not ASCII; what is rare is looked for there, ten times as fast."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return "".join(map(chr, np.unique(codes[codes > 127]).tolist()))


def _may_compose(letter: str) -> bool:
    """Whether NFKC may change a letter, or the one before it: a mark, or a part of a Hangul syllable."""
    mark = unicodedata.category(letter)[0] == "M" or "\u1100" <= letter <= "\u11ff"
    return mark or not unicodedata.is_normalized("NFKC", letter)


def _normalized(text: str) -> str:
    if "\r" in text:
        text = text.replace("\r\n", "\n")
    if "&" in text:
        text = html.unescape(text)
    if "\\u" in text:
        text = _ESCAPED_LETTERS.sub(lambda m: bytes.fromhex(m[0].replace("\\u", "")).decode("utf-16-be", "replace"), text)
    if "\\" in text:
        text = _ESCAPED_LINE.sub("\n", text.replace("\\\\", "\0")).replace("\0", "\\")
    if text.isascii():
        text = text.lower()
    else:
        letters = _letters(text)
        for letter in letters:
            if letter in _SIGNS:
                text = text.replace(letter, _SIGNS[letter])
        if any(map(_may_compose, letters)):
            text = unicodedata.normalize("NFKC", text)
            letters = _letters(text)
        text = text.casefold()
        for letter in letters:
            if letter.isdecimal():
                text = text.replace(letter, str(int(letter)))
    text = text.replace("$", "").replace("~", " ")
    if ">" in text:
        text = _QUOTED_LINE.sub("\n", f"\n{text}")[1:]
    if "<" in text:
        text = _TAG.sub("\n", text)
    if any(word in text for word in ("mark", "points", "point)", "point]", "pts", "pt)")):
        text = _POINTS.sub("\n", text)
    text = _THOUSANDS.sub("", text.replace("{,}", ","))
    if "\\" in text:
        for command, pattern, new in _LATEX:
            if command in text:
                text = pattern.sub(new, text)
    if "{" in text:
        text = _LOWERED.sub(r"_\1", _RAISED.sub(r"^\1", text))
    for sign, name in (("<=", " le "), (">=", " ge "), ("!=", " ne ")):
        if sign in text:
            text = text.replace(sign, name)
    return text
