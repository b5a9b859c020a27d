"""Judge a multiple-choice letter, and text that has to be the same."""

from __future__ import annotations

import re

from stillhouse.pipeline.exact_numbers import plain_text
from stillhouse.pipeline.extraction import THINK_CLOSE, THINK_OPEN
from stillhouse.pipeline.verifiers.judgement import Judgement
from stillhouse.pipeline.verifiers.latex import compact, normalized, plain_words
from stillhouse.pipeline.verifiers.lenient import announces_letter, last_boxes, lenient_letter, lenient_words

_TEXT_COMMAND = re.compile(r"\\(?:text\w*|math(?:rm|bf|sf|tt|it)|boldsymbol|bm|operatorname|underline|mbox)\s*\{([^{}]*)\}")
_FONT = re.compile(r"\\(?:rm|bf|it|sf|tt)(?![A-Za-z])\s*")
_LETTER = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\]]?\s*[.:]?")
_BOLD_LABEL = re.compile(r"(\*\*|__|\*|_)([(\[]?[A-J][)\].:]?)\1(?=\W|$)")  # **B** Paris
# Options of a multiple choice: (C), \textbf{(C)}\ 5, C) Paris, C - Paris, Option C.
_OPTION = re.compile(
    r"(?:(?:option|choice|answer)\s*(?::\s*)?[(\[]?([A-J])[)\]]?(?:\s*[.:]|(?=\s*$))"
    r"|[(\[]([A-J])[)\]]|([A-J])(?:[).:](?=\s|$)|\s+(?:—|-(?-i:(?=\s*[A-Z][a-z]{2})))))\s*(.*)",
    re.DOTALL | re.IGNORECASE,
)
_OTHER_LABEL = re.compile(r"(?<![\w\\])[(\[]([A-J])[)\]]|(?<![\w\\(\[])([A-J])\)(?=\W|$)")
# 5, B. 6; but not J. P. Morgan and E. coli. A name behind it (F. Engels) makes it a label beside the option's own only.
_DOTTED_LABEL = re.compile(
    r"(?:[,;/&\n]\s*|\\\\\s*|\b(?:and|or)\s+|(?<=\s\s))([A-J])(?::|\.(?!\s*[A-Z](?:\.|$)|\s+[a-z]{3}))\s+([A-Z][a-z])?"
)
# (D) Both (A) and (B), D. A and B
_ABOUT_OPTIONS = re.compile(r"(?:both|neither|all|none|either|only)\b|(?-i:[A-J] (?:and|or|&) [A-J]\Z)", re.IGNORECASE)
_SECOND_THOUGHT = re.compile(
    r"(?:and|or|nor|not|no|but|then|actually|wait|rather|instead|maybe|i mean|sorry)\b|[,/&;+]", re.IGNORECASE
)
_LONE_LETTER = re.compile(r"(?<![\w'’])[A-J](?![\w'’])")
_LETTERS_ALONE = re.compile(
    r"(?:[\W_]|\b(?:and|or|nor|then|vs|versus|plus|to|rightarrow|options?|choices?|answers?|both|(?-i:[A-J]))\b)*",
    re.IGNORECASE,
)
_MAX_LETTERS_CHARS = 200
_TAKEN_BACK = re.compile(r"(?:is )?(?:wrong|incorrect|not (?:right|correct))\W*")
# Prose that begins with a letter that is no choice: A dog is …, I think …, A is wrong …, Not B.
_NO_LETTER_FIRST = re.compile(
    r"\A\W*(?:I(?:\s+(?=[a-z])|['’])|A\s+(?!(?:is|was|because|since|as|for|and|or|due|given|by|seems|would|looks)\b)(?=[a-z])"
    r"|[A-J]\)?\s+is\s+(?:wrong|incorrect|not)\b|[Nn]ot\s\W*[A-J]\b)"
)
_DENIED_LETTER = re.compile(
    r"(?:\b(?:[Nn]ot|[Nn]or|[Nn]ever|[Cc]annot)|n['’]t|\\(?:lnot|neg|ne)|¬|≠)\W{1,9}(?:be\W{1,3})?(?:[Oo]ption\W{1,3})?[A-J](?![\w'’])"
)
# B Paris, 5 (B), it is option B
_LABEL_IN_BOX = re.compile(
    r"([A-J])[\s,]\s*(?![=<>+^*-])(.*)|(.*)(?:\s\(\s*([A-J])\s*\)|\b(?:[Oo]ption|[Cc]hoice|is)\s+([A-J])\W?)", re.DOTALL
)
_SEVERAL_ANSWERS = re.compile(r"\banswers are\b|\b(?:could|may|might) be (?:either )?[A-J] or [A-J]\b", re.IGNORECASE)
_HEDGED = re.compile(
    r"\W*(?:(?:not|either|neither|between|both)\b"
    r"|(?:option\s+)?[A-J]\W*(?:(?:and|or|&|/)\W*(?:also\s+)?(?:option\s+)?[A-J](?![\w'’])|,\W*[A-J]\W*(?:$|(?:and|or)\b|,)))"
)
_ESCAPED = re.compile(r"\\([%$#&_{} ])")


def letter_of(text: str) -> str | None:
    """Return the one letter that a text is, upper case: ``(b)``, ``B.``, ``\\text{B}``, ``*B*``; None for all else."""
    match = _LETTER.fullmatch(_TEXT_COMMAND.sub(r"\1", plain_text(text)).strip("$ ").strip("*`{} "))
    return match[1].upper() if match else None


def option_of(text: str) -> tuple[str, str] | None:
    """Split an option into letter and text: ``(C) Paris``, ``\\textbf{(C)}\\ 5``, ``C. Paris``; None for all else.

    What names another option as well (``(B) and (C)``, ``B. Actually C``) is none.
    """
    plain = normalized(text)
    if opening := _TEXT_COMMAND.match(plain):
        plain = opening[1].lstrip() + plain[opening.end() :] if opening.end() < len(plain) else normalized(opening[1])
    option = _OPTION.fullmatch(_BOLD_LABEL.sub(r"\2", plain, count=1))
    letter = next((group for group in option.groups()[:3] if group), "") if option else ""
    return (letter, option[4].strip()) if option and letter.isupper() and not _goes_on(letter, option[4]) else None


def _goes_on(letter: str, rest: str) -> bool:
    """Whether what follows an option's letter names another option, or takes the letter back."""
    rest = _TEXT_COMMAND.sub(r" \1 ", rest).strip()
    if _ABOUT_OPTIONS.match(rest):
        return False
    if _TAKEN_BACK.fullmatch(rest) or _names_two(f"{letter} {rest}"):
        return True
    if _SECOND_THOUGHT.match(rest) and set(_LONE_LETTER.findall(rest)) - {letter}:
        return True
    labels = {group for label in _OTHER_LABEL.finditer(rest) for group in label.groups() if group}
    dotted = ((label[1], label[2]) for label in _DOTTED_LABEL.finditer(rest))
    labels |= {label for label, name in dotted if not name or abs(ord(label) - ord(letter)) == 1}
    return bool(labels - {letter})


def _names_two(text: str) -> bool:
    """Whether a text is two or more letters and what may stand between them, and nothing else."""
    return bool(_LETTERS_ALONE.fullmatch(text)) and len(set(_LONE_LETTER.findall(text))) > 1


def meant_letter(completion: str) -> str | None:
    """Return the letter that prose means, as `lenient_letter`; None where it names two, or only says which it is not."""
    text = completion.rpartition(THINK_CLOSE)[2].strip()
    boxed, _ = last_boxes(text)
    if boxed is not None:
        boxed = _FONT.sub("", boxed)
        if letter := letter_of(boxed) or (option_of(boxed) or ("",))[0]:
            return letter
        text = normalized(_TEXT_COMMAND.sub(r" \1 ", boxed))
        if label := _LABEL_IN_BOX.fullmatch(text):
            first, behind, before, in_brackets, last = (group or "" for group in label.groups())
            letter = first or in_brackets or last
            return None if _DENIED_LETTER.search(text) or _goes_on(letter, behind or before) else letter
        if _DENIED_LETTER.search(text) or not announces_letter(text):
            return None
        meant = [boxed]
    else:
        text = _DENIED_LETTER.sub(" ", text)
        text = _NO_LETTER_FIRST.sub("", text, count=1)
        announced = lenient_words(text)
        is_hedged = _SEVERAL_ANSWERS.search(text) or any(_HEDGED.match(words[:_MAX_LETTERS_CHARS]) for words in announced)
        if is_hedged or THINK_OPEN in text:  # or cut off in the middle of a thought
            return None
        meant = [text, *announced]
    if any(len(each) < _MAX_LETTERS_CHARS and _names_two(_TEXT_COMMAND.sub(r" \1 ", normalized(each))) for each in meant):
        return None
    return lenient_letter(text)


def verify_choice(gold: str, answer: str) -> Judgement:
    """Judge a letter by the gold letter; the text of the option may follow both.

    The text alone is right where the gold has it too. A gold that is no letter and no option gives undecided.
    """
    gold_option, option = option_of(gold), option_of(answer)
    gold_letter = letter_of(gold) or (gold_option[0] if gold_option else None)
    letter = letter_of(normalized(answer)) or (option[0] if option else None)
    if gold_letter is None:
        return Judgement("undecided", f"the gold {gold[:40]!r} is not one letter, alone or before its option's text")
    if letter is None:
        if gold_option and gold_option[1] and _same_text(gold_option[1], answer):
            return Judgement("correct", f"the text of option {gold_letter}")
        return Judgement("wrong", "the answer is not one letter")
    return Judgement("correct" if letter == gold_letter else "wrong", f"letter {letter}, gold {gold_letter}")


def _same_text(gold: str, answer: str) -> bool:
    """Whether two texts of options differ in typing only; in formulas and units letter case counts (5 mW is not 5 MW)."""
    if compact(gold) == compact(answer):
        return True
    is_formula = any(c.isdigit() for c in gold) or not re.search(r"[^\W\d_]{3}", gold)
    return not is_formula and plain_words(gold) == plain_words(answer)


def verify_exact(gold: str, answer: str) -> Judgement:
    r"""Judge by text: width (NFKC), blanks, ``\%`` for ``%``, dollars and a ``\text{}`` around it all are typing; letter case
    and signs count.
    """
    wanted = plain_text(gold)
    if not wanted:
        return Judgement("undecided", "the gold is empty")
    text = answer.strip()
    written = [text]
    if len(text) > 2 and text[0] == text[-1] == "$":
        written.append(text := text[1:-1].strip())
    if marked := _TEXT_COMMAND.fullmatch(text):
        written.append(text := marked[1])
    written.append(_ESCAPED.sub(r"\1", text))
    if wanted in map(plain_text, written):
        return Judgement("correct", "same text")
    return Judgement("wrong", "other text")
