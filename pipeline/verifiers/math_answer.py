r"""Judge a mathematical answer: exact arithmetic first, our own reader and comparison next, math-verify as second opinion.

The first two run in this process, on trees that nothing evaluates but bounded arithmetic; they decide nearly everything.
What they cannot read or compute goes to math-verify in the judge process (``judge_process.py``), behind a deadline. Its word
is asked only there, so its known false accepts (1/2^99 = 1/2^98, 1 - 1/e = 1 + 1/e, 5 cm = 5 m) do not arise.
"""

from __future__ import annotations

import functools
import re

from stillhouse.pipeline.exact_numbers import exact_number, unwrapped
from stillhouse.pipeline.extraction import boxed_answer
from stillhouse.pipeline.judge_process import ask
from stillhouse.pipeline.verifiers.equality import same_answer
from stillhouse.pipeline.verifiers.exact_values import Unknown
from stillhouse.pipeline.verifiers.expressions import read
from stillhouse.pipeline.verifiers.judgement import Judgement
from stillhouse.pipeline.verifiers.latex import Refused, Unreadable, compact, normalized, plain_words
from stillhouse.pipeline.verifiers.tree import Tree
from stillhouse.pipeline.verifiers.units import is_known

_MARKED_TEXT = re.compile(r"\\(?:text\w*|mbox|mathrm|mathbf|operatorname|begin|end)\s*\{[^{}]*\}")
_WORDS = re.compile(r"[^\W\d_]+(?:[ '’-]+[^\W\d_]+)*")
_FORMULA_WORD = re.compile(
    r"(?:a|arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|sqrt|pi|inf|infty|infinity|lg|max|min|gcd|lcm|and|or"
)
_PROSE = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{3,}")
# A plain number or formula without letters of its own, then a blank and a unit in plain letters: 125 miles, 35 cm, 28 percent.
_TRAILING_UNIT = re.compile(
    r"(?P<value>[-+]?(?:[\d.,/ ()+*-]|\\(?:d|t)?frac\s*\{[\d.,]+\}\s*\{[\d.,]+\})*[\d)}])(?P<gap>\s*)"
    r"(?P<unit>(?:[A-Za-zµ€£¥]|\\%)[A-Za-zµ /.·]*(?:\^\{?-?\d\}?)?(?:/[A-Za-zµ]+(?:\^\{?-?\d\}?)?)?)"
)
_LEADING_CURRENCY = re.compile(r"(?P<unit>[€£¥])\s*(?P<value>[\d.,]+)")
_DECIMAL_COMMA = re.compile(r"([-+]?\d+),(\d{2,})")
_SPACED_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_CLOCK = re.compile(r"\d{1,2}(?::\d{2}){1,2} ?[ap]\.?m\.?")
_PROSE_WORDS = 3


def verify_math(gold: str, answer: str, timeout_s: float) -> Judgement:
    """Judge one answer; both may be bare, in dollars or in a box.

    Raises:
        StillhouseError: the judge process does not start on this machine.
    """
    gold_number, number = exact_number(gold), exact_number(answer)
    if gold_number is not None and number is not None:
        if gold_number == number:
            return Judgement("correct", "exact arithmetic")
        if "." not in gold and "." not in answer:
            return Judgement("wrong", "exact arithmetic")
    gold, answer = _out_of_box(gold), _out_of_box(answer)
    if not compact(answer):
        return Judgement("wrong", "no answer")
    if not gold:
        return Judgement("undecided", "the gold is empty")
    if (text := compact(gold)) and text == compact(answer):
        return Judgement("correct", "same text")
    words = gold_words(gold)
    if words is not None:
        same = words == plain_words(answer)
        return Judgement("correct" if same else "wrong", "same words" if same else "other words")
    if _num_prose_words(answer) >= _PROSE_WORDS:
        return Judgement("wrong", "the answer is prose, not mathematics")
    try:
        return _compared(gold, answer)
    except Refused as error:
        return Judgement("undecided", str(error))
    except (Unreadable, Unknown) as error:
        why = str(error)
    except (ArithmeticError, RecursionError) as error:  # Undecidable is one, a float's overflow another
        return Judgement("undecided", str(error) or "nested too deeply")
    if _num_prose_words(answer):
        return Judgement("undecided", why)
    outcome, reason = ask({"op": "math", "what": "math", "gold": unwrapped(gold), "answer": unwrapped(answer)}, timeout_s)
    return Judgement(outcome, f"{reason} ({why})")


def gold_words(text: str) -> str | None:
    r"""Return a gold that is words and no formula (``Even``, ``\text{no solution}``) without its markup; None for a formula."""
    plain = plain_words(text)
    longest = max((len(word) for word in plain.split()), default=0)
    marked = bool(_MARKED_TEXT.fullmatch(normalized(text)))
    if not _WORDS.fullmatch(plain) or _FORMULA_WORD.fullmatch(plain) or (marked and longest < 2):
        return None
    return plain if marked or longest >= 4 else None


def _said(same: bool, how: str) -> Judgement:
    return Judgement("correct" if same else "wrong", how)


def _out_of_box(text: str) -> str:
    text = text.strip()
    return (boxed_answer(text) or "") if text.startswith("\\boxed") else text


def _num_prose_words(text: str) -> int:
    """Count the words that are no part of a formula: a sentence with a number in it is no number."""
    return sum(not _FORMULA_WORD.fullmatch(word) for word in _PROSE.findall(_MARKED_TEXT.sub(" ", text)))


def _compared(gold: str, answer: str) -> Judgement:
    for gold_tree in readings(gold):
        for tree in readings(answer):
            if same_answer(gold_tree, tree):
                return Judgement("correct", "same value")
    return Judgement("wrong", "other value")


@functools.lru_cache(maxsize=4096)
def readings(text: str) -> tuple[Tree, ...]:
    """The ways to read an answer, the likeliest first: 1,22 is a pair or a decimal; 35 cm a quantity or a product.

    Raises:
        Unreadable: there is none.
    """
    plain = normalized(text)
    if _CLOCK.fullmatch(words := plain_words(text)):
        return (("text", words.replace(".", "")),)
    if _SPACED_THOUSANDS.fullmatch(plain):
        return (read(plain.replace(" ", "")),)
    if comma := _DECIMAL_COMMA.fullmatch(plain):
        decimal = read(f"{comma[1]}.{comma[2]}")
        return (decimal,) if comma[1] in ("0", "-0") else (read(plain), decimal) if len(comma[2]) != 3 else (read(plain),)
    if unit := _LEADING_CURRENCY.fullmatch(plain):
        return (("qty", read(unit["value"]), unit["unit"]),)
    if (unit := _TRAILING_UNIT.fullmatch(plain)) and _is_unit(unit["unit"], bool(unit["gap"])):
        value = read(unit["value"].rstrip())
        if unit["unit"].strip().casefold().rstrip(".") in ("percent", "percentage", "pct"):
            return (("pct", value),)
        return (("qty", value, unit["unit"].strip()),)
    return (read(plain),)


def _is_unit(text: str, spaced: bool) -> bool:
    words = text.replace(".", " ").replace("/", " ").split()
    if any(_FORMULA_WORD.fullmatch(word.casefold()) for word in words):
        return False
    if is_known(text):
        return spaced or len(text) > 1 or text in "€£¥"
    return spaced and any(len(word) >= 3 for word in words)
