"""Judge an answer by a reasoning-gym task's own scorer, in the judge process; only full marks are correct.

Some scorers of reasoning-gym 0.1.25 give full marks to what is plainly wrong. Those tasks have a rule here that is asked first
and can only refuse:

- ``game_of_life_halting`` takes any text for right.
- ``coin_flip`` takes any beginning of the number's digits (``0`` for ``0.9375``), and 0 for a small probability.
- ``number_sorting`` takes numbers that are up to 1 away.
- ``gsm_symbolic`` takes -5 for 5, and the first number of any prose.
- ``puzzle24`` takes any four numbers that make 24, not only those of the question.
- ``complex_arithmetic`` and ``number_sorting`` take ``nan``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from stillhouse.pipeline.exact_numbers import exact_number
from stillhouse.pipeline.judge_process import ask
from stillhouse.pipeline.verifiers.judgement import Judgement

# Several scorers hand the answer to eval or sympy.parse_expr; the worker refuses what it can, this keeps the rest out.
_CODE = re.compile(r"__|\blambda\b|\b(?:eval|exec|open|compile|getattr|setattr|globals|locals|vars|exit|quit|import\w*)\s*\(")
_TOKENS = re.compile(r"\w+")
_NO_NUMBER = re.compile(r"\b(?:nan|inf|infinity)\b", re.IGNORECASE)
_FORMS = {
    "kakurasu": re.compile(r"[01\s]+"),
    "quantum_lock": re.compile(r"[A-Z](?:\s*→\s*[A-Z])*"),
    "rush_hour": re.compile(r"[A-Z][-+]\d+(?:[\s,]+[A-Z][-+]\d+)*"),
    "sokoban": re.compile(r"[UDLR]+", re.IGNORECASE),
    "survo": re.compile(r"[\d\s]+"),
}
"""How an answer looks that is nothing else, for tasks with many right ones whose scorers overlook prose around them."""
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def verify_reasoning_gym(entry: str, answer: str, timeout_s: float) -> Judgement:
    """Judge one answer; ``entry`` is the JSON text that ``reasoning_gym_problems`` stored.

    Raises:
        StillhouseError: the judge process does not start, or there is no such task.
    """
    stored = json.loads(entry)
    task, gold = stored["task"], stored["entry"]["answer"] or ""
    answer = answer.strip().replace("−", "-")
    if len(answer) > 2 and answer.startswith("$") and answer.endswith("$") and not gold.startswith("$"):
        answer = answer.strip("$").strip()
    if answer == gold.strip():
        answer = gold
    elif (code := _CODE.search(answer)) and not _CODE.search(gold):
        return Judgement("wrong", f"the answer holds program text ({code[0]!r})")
    elif (word := _NO_NUMBER.search(answer)) and _NUMBER.search(gold) and not _NO_NUMBER.search(gold):
        return Judgement("wrong", f"{word[0]!r} is no number")
    elif task in _RULES and (why := _RULES[task](answer, stored["entry"])):
        return Judgement("wrong", why)
    plain = _FORMS[task].fullmatch(answer) if task in _FORMS else _of_gold(answer, gold)
    request = {"op": "reasoning_gym", "what": "reasoning_gym", "answer": answer, "must_be_plain": not plain}
    return Judgement(*ask({**request, **stored}, timeout_s))


def _of_gold(answer: str, gold: str) -> bool:
    """Whether an answer is made of the gold's own words, or is the same number: then no prose can hide in it."""
    if (number := exact_number(gold)) is not None:
        return exact_number(answer) == number
    gold_words, words = (_TOKENS.findall(text.casefold()) for text in (gold, answer))
    return len(words) <= len(gold_words) and set(words) <= set(gold_words)


def _other_word(answer: str, entry: Mapping[str, Any]) -> str:
    if answer.casefold().strip(" .") == entry["answer"].casefold():
        return ""
    return f"not the word {entry['answer']} (the task's own scorer takes any text)"


def _far_in_proportion(answer: str, entry: Mapping[str, Any]) -> str:
    """Refuse what differs by more than 0.0001, or by half a percent of a probability that is smaller than that allows for."""
    gold, number = Fraction(entry["answer"].replace(",", "")), exact_number(answer)
    if number is not None and abs(number - gold) <= min(Fraction(1, 10_000), gold / 200):
        return ""
    return "another number than the gold's (the task's own scorer takes any beginning of its digits)"


def _other_number(answer: str, entry: Mapping[str, Any]) -> str:
    gold, number = exact_number(entry["answer"]), exact_number(answer)
    return "another number than the gold" if None not in (gold, number) and gold != number else ""


def _other_numbers(answer: str, entry: Mapping[str, Any]) -> str:
    ours, theirs = ([Fraction(number) for number in _NUMBER.findall(text)] for text in (entry["answer"], answer))
    return "" if ours == theirs else "other numbers than the gold's (the task's own scorer takes what is up to 1 away)"


def _not_its_numbers(answer: str, entry: Mapping[str, Any]) -> str:
    used, given = Counter(re.findall(r"\d+", answer)), Counter(map(str, entry["metadata"]["numbers"]))
    numbers = ", ".join(given.elements())
    return "" if used == given else f"it does not use {numbers}, each once (the task's own scorer does not ask)"


_RULES: dict[str, Callable[[str, Mapping[str, Any]], str]] = {
    "coin_flip": _far_in_proportion,
    "game_of_life_halting": _other_word,
    "gsm_symbolic": _other_number,
    "number_sorting": _other_numbers,
    "puzzle24": _not_its_numbers,
}
"""By task: why an answer is wrong, whatever the task's own scorer says; "" leaves it to the scorer."""
