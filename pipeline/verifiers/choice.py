"""Judge a multiple-choice letter, and text that has to be the same."""

from __future__ import annotations

import re

from stillhouse.pipeline.exact_numbers import plain_text
from stillhouse.pipeline.verifiers.judgement import Judgement
from stillhouse.pipeline.verifiers.latex import normalized, plain_words

_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
# Options of a multiple choice: (C), \textbf{(C)}\ 5, C) Paris, Option C.
_OPTION = re.compile(
    r"(?:\\\w+\s*\{\s*)?(?:(?:option|choice|answer)\s+([A-J])\b[).:]?|\(([A-J])\)|([A-J])[).:](?=\s|$))\s*\}?\s*(.*)",
    re.DOTALL | re.IGNORECASE,
)
_LETTER = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\]]?\s*[.:]?")


def letter_of(text: str) -> str | None:
    """Return the one letter that a text is, upper case: ``(b)``, ``B.``, ``\\text{B}``; None for all else."""
    match = _LETTER.fullmatch(_TEXT_COMMAND.sub(r"\1", plain_text(text)).strip("$ "))
    return match[1].upper() if match else None


def option_of(text: str) -> tuple[str, str] | None:
    """Split an option into letter and text: ``(C) Paris``, ``\\textbf{(C)}\\ 5``, ``C. Paris``; None for all else."""
    option = _OPTION.fullmatch(normalized(text))
    letter = next((group for group in option.groups()[:3] if group), "") if option else ""
    return (letter, option[4].rstrip("} ")) if option and letter.isupper() else None


def verify_choice(gold: str, answer: str) -> Judgement:
    """Judge a letter by the gold letter; the text of the option may follow both.

    The text alone is right where the gold has it too. A gold that is no letter and no option gives undecided.
    """
    gold_option, option = option_of(gold), option_of(answer)
    gold_letter = letter_of(gold) or (gold_option[0] if gold_option else None)
    letter = letter_of(normalized(answer)) or (option[0] if option else None)
    if gold_letter is None:
        return Judgement("undecided", f"the gold {gold[:40]!r} is not one letter")
    if letter is None:
        if gold_option and gold_option[1] and plain_words(gold_option[1]) == plain_words(answer):
            return Judgement("correct", f"the text of option {gold_letter}")
        return Judgement("wrong", "the answer is not one letter")
    return Judgement("correct" if letter == gold_letter else "wrong", f"letter {letter}, gold {gold_letter}")


def verify_exact(gold: str, answer: str) -> Judgement:
    r"""Judge by text: width (NFKC), blanks and a ``\text{}`` around it all are typing; letter case and signs count."""
    marked = _TEXT_COMMAND.fullmatch(answer.strip())
    if plain_text(gold) in (plain_text(answer), plain_text(marked[1]) if marked else None):
        return Judgement("correct", "same text")
    return Judgement("wrong", "other text")
