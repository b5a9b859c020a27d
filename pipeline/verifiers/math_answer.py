r"""Judge a mathematical answer: exact arithmetic first, our own reader and comparison next, math-verify as second opinion.

The first two run in this process, on trees that nothing evaluates but bounded arithmetic; they decide nearly everything.
A sum, an integral, or a gold that they cannot read, goes to math-verify in the judge process (``judge_process.py``), behind a
deadline; an answer that only it could read does not, nor do words and units, which it passes over. So its known false
accepts (1/2^99 = 1/2^98, 1 - 1/e = 1 + 1/e, 5 cm = 5 m) do not arise.
"""

from __future__ import annotations

import re

from stillhouse.pipeline.exact_numbers import exact_number, unwrapped
from stillhouse.pipeline.extraction import boxed_answer
from stillhouse.pipeline.judge_process import ask
from stillhouse.pipeline.verifiers.choice import option_of
from stillhouse.pipeline.verifiers.equality import same_answer
from stillhouse.pipeline.verifiers.exact_values import Unknown, is_constant
from stillhouse.pipeline.verifiers.judgement import Judgement
from stillhouse.pipeline.verifiers.latex import Refused, Unreadable, compact, normalized, plain_words, with_powers
from stillhouse.pipeline.verifiers.readings import FORMULA_WORD, decimal_with_comma, readings

_MARKED_TEXT = re.compile(r"\\(?:text\w*|mbox|mathrm|mathbf|operatorname|begin|end)\s*\{[^{}]*\}")
_WORDS = re.compile(r"[^\W\d_]+(?:[ '’-]+[^\W\d_]+)*")
_PROSE = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{3,}")
_PROSE_WORDS = 3
_POINTS = re.compile(r"[A-Z]{3,}")
_SHORT_WORDS = frozenset(["yes", "no", "odd", "dne"])
_ARTICLE = re.compile(r"(?:an|the) (?=\S)|a (?=[^\W\d_]{2})")
_SAME_WORDS = {"does not exist": "dne", "no solutions": "no solution"}
_FORMULA_OF_WORDS = {
    "all real numbers": r"\mathbb{R}", "all reals": r"\mathbb{R}", "empty set": r"\emptyset", "no solution": r"\emptyset",
    "infinity": r"\infty", "negative infinity": r"-\infty",
}  # fmt: skip
_OPERATOR_FIRST = re.compile(r"[*/^]|[-+]\s+(?![^\W\d_]{3})")
_LETTER = re.compile(r"(?:\\\w+\s*\{\s*)?([A-J])\s*\}?")


class _NoFormula(ValueError):
    """The answer cannot be read where the gold can: math-verify would read a part of it."""


def verify_math(gold: str, answer: str, timeout_s: float) -> Judgement:
    """Judge one answer; both may be bare, in dollars or in a box.

    Raises:
        StillhouseError: the judge process does not start on this machine.
    """
    gold = gold.rpartition("####")[2].strip() or gold  # GSM8K: a solution, then #### 72
    gold_number, number = exact_number(gold), exact_number(answer)
    if gold_number is not None and number is not None:
        if gold_number == number:
            return Judgement("correct", "exact arithmetic")
        if "." not in gold and "." not in answer:
            return Judgement("wrong", "exact arithmetic")
    gold, answer = _in_signs(_out_of_box(gold)), _in_signs(_out_of_box(answer))
    if not compact(answer):
        return Judgement("wrong", "no answer")
    if not gold:
        return Judgement("undecided", "the gold is empty")
    if (text := compact(gold)) and text == compact(answer):
        return Judgement("correct", "same text")
    if (option := _judged_as_option(gold, answer, timeout_s)) is not None:
        return option
    if _POINTS.fullmatch(normalized(gold)) and _POINTS.fullmatch(normalized(answer)):
        return Judgement("wrong", "other letters")  # ABC and ACB: an order, or points, hardly a product
    words = gold_words(gold)
    if words is not None:
        same = _bare_words(words) == _bare_words(plain_words(answer))
        return Judgement("correct" if same else "wrong", "same words" if same else "other words")
    if _num_prose_words(answer) >= _PROSE_WORDS:
        return Judgement("wrong", "the answer is prose, not mathematics")
    try:
        return _compared(gold, answer)
    except (Refused, _NoFormula) as error:
        return Judgement("undecided", str(error))
    except (Unreadable, Unknown) as error:
        why = str(error)
    except (ArithmeticError, RecursionError) as error:  # Undecidable is one, a float's overflow another
        return Judgement("undecided", str(error) or "nested too deeply")
    if _num_prose_words(answer) or any(_MARKED_TEXT.search(text) for text in (gold, answer)):
        return Judgement("undecided", why)  # math-verify passes over words and units
    outcome, reason = ask({"op": "math", "what": "math", "gold": unwrapped(gold), "answer": unwrapped(answer)}, timeout_s)
    return Judgement(outcome, f"{reason} ({why})")


def gold_words(text: str) -> str | None:
    r"""Return a gold that is words and no formula (``Even``, ``\text{no solution}``) without its markup; None for a formula."""
    plain = plain_words(text).rstrip(".")
    longest = max((len(word) for word in plain.split()), default=0)
    marked = bool(_MARKED_TEXT.fullmatch(normalized(text)))
    if plain in _SHORT_WORDS:
        return plain
    if not _WORDS.fullmatch(plain) or FORMULA_WORD.fullmatch(plain) or (marked and longest < 2):
        return None
    return plain if marked or longest >= 4 else None


def _bare_words(words: str) -> str:
    words = _ARTICLE.sub("", words.rstrip("."), count=1) if _ARTICLE.match(words) else words.rstrip(".")
    return _SAME_WORDS.get(words, words)


def _in_signs(text: str) -> str:
    """Superscripts as powers, and the few words that are mathematics as their signs."""
    text = text if text.isascii() else with_powers(text)
    if len(text) < 60 and any(c.isalpha() for c in text):
        words = _bare_words(plain_words(text))
        return _FORMULA_OF_WORDS.get(words, text)
    return text


def _judged_as_option(gold: str, answer: str, timeout_s: float) -> Judgement | None:
    """Judge by letter where the gold is an option or a lone letter, and the answer an option; None where they are not.

    A gold with letter and value takes the value alone as well.
    """
    option, answer_option = option_of(gold), option_of(answer)
    if answer_option and _OPERATOR_FIRST.match(answer_option[1]):  # (A) + 1
        answer_option = None
    lone, answer_lone = _LETTER.fullmatch(normalized(gold)), _LETTER.fullmatch(normalized(answer))
    letter = lone[1] if lone else option[0] if option else None
    if letter is None:
        return None
    if answer_option or (answer_lone and option):
        found = answer_option[0] if answer_option else answer_lone[1]
        return _said(found == letter, f"letter {found}, gold {letter}")
    if option and option[1] and option_of(option[1]) is None:
        return verify_math(option[1], answer, timeout_s)
    return None


def _said(same: bool, how: str) -> Judgement:
    return Judgement("correct" if same else "wrong", how)


def _out_of_box(text: str) -> str:
    text = text.strip()
    return (boxed_answer(text) or "") if text.startswith("\\boxed") else text


def _num_prose_words(text: str) -> int:
    """Count the words that are no part of a formula: a sentence with a number in it is no number."""
    return sum(not FORMULA_WORD.fullmatch(word) for word in _PROSE.findall(_MARKED_TEXT.sub(" ", text)))


def _compared(gold: str, answer: str) -> Judgement:
    gold_trees = readings(gold)
    try:
        trees = readings(answer)
    except Refused:
        raise
    except Unreadable as error:
        raise _NoFormula(f"the answer is not mathematics: {error}") from error
    for gold_tree in gold_trees:
        # P(5, 2) is 20, or P = (5, 2); never the bare pair.
        is_point = gold_tree is not gold_trees[0] and gold_tree[0] == "rel" and is_constant(gold_trees[0])
        for tree in trees:
            if is_point and tree[0] != "rel":
                continue
            if same_answer(gold_tree, tree):
                return Judgement("correct", "same value")
        if gold_tree[0] == "dec" and (decimal := decimal_with_comma(answer)) is not None and same_answer(gold_tree, decimal):
            return Judgement("correct", "same value")
    return Judgement("wrong", "other value")
