"""Judge an answer by a reasoning-gym task's own scorer, in the judge process; only full marks are correct.

Some scorers of reasoning-gym 0.1.25 give full marks to what is plainly wrong. Those tasks have a rule here that is asked first
and can only refuse:

- ``game_of_life_halting`` takes any text for right.
- ``coin_flip`` takes any beginning of the number's digits (``0`` for ``0.9375``), and 0 for a small probability.
- ``number_sorting`` takes numbers that are up to 1 away.
- ``gsm_symbolic`` takes -5 for 5, and the first number of any prose.
- ``puzzle24`` takes any four numbers that make 24, not only those of the question.
- ``complex_arithmetic`` and ``number_sorting`` take ``nan``.
- ``time_intervals`` and ``word_sorting`` take whatever follows the answer.
- ``countdown``, ``puzzle24``, ``polynomial_multiplication`` and the integrations read "this or that" as this.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.exact_numbers import exact_number
from stillhouse.pipeline.judge_process import ask
from stillhouse.pipeline.verifiers.judgement import Judgement

# Several scorers hand the answer to eval or sympy.parse_expr; the worker refuses what it can, this keeps the rest out.
_CODE = re.compile(r"__|\blambda\b|\b(?:eval|exec|open|compile|getattr|setattr|globals|locals|vars|exit|quit|import\w*)\s*\(")
_TOKENS = re.compile(r"\w+")
_NO_NUMBER = re.compile(r"\b(?:nan|inf|infinity)\b", re.IGNORECASE)
_PYTHON_WORD = re.compile(r"\b(?:or|and|not|if|else|in|is|for)\b")
_FORMS = {
    "kakurasu": re.compile(r"[01\s]+"),
    "quantum_lock": re.compile(r"[A-Z](?:\s*→\s*[A-Z])*"),
    "rush_hour": re.compile(r"[A-Z][-+]\d+(?:[\s,]+[A-Z][-+]\d+)*"),
    "sokoban": re.compile(r"[UDLR]+", re.IGNORECASE),
    "survo": re.compile(r"[\d\s]+"),
}
"""How an answer looks that is nothing else, for tasks with many right ones whose scorers overlook prose around them."""
_MARKED = re.compile(r"\\(?:text\w*|math(?:rm|bf|tt)|mbox)\s*\{([^{}]*)\}")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?")
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def stored_entry(row: Mapping[str, Any]) -> str:
    """The entry of a row as `verify_reasoning_gym` takes it: as a problem stores it, or an item as reasoning-gym makes it.

    Of an item the task is the one that its metadata names, and ``task`` and ``options`` of the row say otherwise.

    Raises:
        RecipeError: the row has neither, or there is no such task or option.
    """
    entry = row.get("entry")
    try:
        entry = json.loads(entry) if isinstance(entry, str) else entry
    except ValueError as error:
        raise RecipeError(f"the row's 'entry' is not JSON ({error})") from error
    if isinstance(entry, Mapping) and "entry" not in entry and isinstance(entry.get("metadata"), Mapping):
        task = row.get("task") or entry["metadata"].get("source_dataset")
        entry = {"task": task, "options": row.get("options") or {}, "entry": entry}
    item = entry.get("entry") if isinstance(entry, Mapping) else None
    is_item = isinstance(item, Mapping) and isinstance(item.get("answer"), str | None) and "answer" in item
    if not is_item or not isinstance(entry.get("task"), str) or not isinstance(entry.get("options"), Mapping):
        raise RecipeError(
            "a row of kind reasoning_gym needs 'entry': an item of reasoning-gym (question, answer, metadata with its "
            f"source_dataset), or what a problem of stillhouse stores; got {entry!r:.60}"
        )
    from reasoning_gym.factory import DATASETS

    if entry["task"] not in DATASETS:
        raise RecipeError(f"reasoning-gym has no task {entry['task']!r}")
    if unknown := entry["options"].keys() - DATASETS[entry["task"]][1].__dataclass_fields__.keys():
        raise RecipeError(f"reasoning-gym task {entry['task']!r} has no option {min(unknown)!r}")
    return json.dumps(entry)


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
    if "\\" not in gold and (marked := _MARKED.fullmatch(answer)):
        answer = marked[1].strip()
    if "," not in gold and _THOUSANDS.fullmatch(answer) and exact_number(answer) == exact_number(gold):
        answer = gold
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


def _longer(answer: str, entry: Mapping[str, Any]) -> str:
    """Refuse what goes on behind the gold: more words between commas, or more numbers."""
    for parts in (re.compile(r"[^,\s][^,]*"), _NUMBER):
        if len(parts.findall(answer)) > len(parts.findall(entry["answer"])):
            return "it goes on behind the answer (the task's own scorer reads its beginning alone)"
    return ""


def _with_words(answer: str, entry: Mapping[str, Any]) -> str:
    word = _PYTHON_WORD.search(answer)
    return f"{word[0]!r} belongs to no formula (the task's own scorer reads Python, where it takes one side)" if word else ""


def _not_its_numbers(answer: str, entry: Mapping[str, Any]) -> str:
    if why := _with_words(answer, entry):
        return why
    used, given = Counter(re.findall(r"\d+", answer)), Counter(map(str, entry["metadata"]["numbers"]))
    numbers = ", ".join(given.elements())
    return "" if used == given else f"it does not use {numbers}, each once (the task's own scorer does not ask)"


_RULES: dict[str, Callable[[str, Mapping[str, Any]], str]] = {
    "coin_flip": _far_in_proportion,
    "countdown": _with_words,
    "game_of_life_halting": _other_word,
    "gsm_symbolic": _other_number,
    "intermediate_integration": _with_words,
    "number_sorting": _other_numbers,
    "polynomial_multiplication": _with_words,
    "puzzle24": _not_its_numbers,
    "simple_integration": _with_words,
    "time_intervals": _longer,
    "word_sorting": _longer,
}
"""By task: why an answer is wrong, whatever the task's own scorer says; "" leaves it to the scorer."""
