"""Judge a multiple-choice letter, and text that has to be the same."""

from __future__ import annotations

import re

from stillhouse.pipeline.exact_numbers import plain_text
from stillhouse.pipeline.verifiers.judgement import Judgement

_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\]]?\s*[.:]?")


def letter_of(text: str) -> str | None:
    """Return the one letter that a text is, upper case: ``(b)``, ``B.``, ``\\text{B}``; None for all else."""
    match = _LETTER.fullmatch(_TEXT_COMMAND.sub(r"\1", plain_text(text)).strip("$ "))
    return match[1].upper() if match else None


def verify_choice(gold: str, answer: str) -> Judgement:
    """Judge a letter by the gold letter; a gold that is no letter gives undecided."""
    gold_letter, letter = letter_of(gold), letter_of(answer)
    if gold_letter is None:
        return Judgement("undecided", f"the gold {gold[:40]!r} is not one letter")
    if letter is None:
        return Judgement("wrong", "the answer is not one letter")
    return Judgement("correct" if letter == gold_letter else "wrong", f"letter {letter}, gold {gold_letter}")


def verify_exact(gold: str, answer: str) -> Judgement:
    """Judge by text: width and blanks are typing, letter case and words are the answer."""
    if plain_text(gold) == plain_text(answer):
        return Judgement("correct", "same text")
    return Judgement("wrong", "other text")
