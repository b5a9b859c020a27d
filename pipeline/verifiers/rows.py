"""Judge rows of gold and prediction, one or many, in order: what ``stillhouse verify`` reads and prints.

A row's ``pred`` is a whole completion or a bare answer. *Strict* takes what is boxed (JSON: fenced) after the think block, or
the whole text where there is neither block nor box; *lenient* also the answer that prose announces, for scoring others'
outputs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.extraction import THINK_CLOSE, THINK_OPEN, boxed_answer, fenced_block, strict_answer_of
from stillhouse.pipeline.verification import (
    DEADLINE_S,
    ENTRY_FIELDS,
    NEEDED_FIELDS,
    NO_GOLD_NEEDED,
    is_entry_point,
    judge,
    require_known_kind,
)
from stillhouse.pipeline.verifiers.choice import letter_of, meant_letter, verify_choice
from stillhouse.pipeline.verifiers.dates import date_of
from stillhouse.pipeline.verifiers.in_order import in_order
from stillhouse.pipeline.verifiers.lenient import announces_letter, lenient_answer, lenient_words
from stillhouse.pipeline.verifiers.math_answer import gold_words
from stillhouse.pipeline.verifiers.quantity import with_unit
from stillhouse.pipeline.verifiers.reasoning_gym import stored_entry

Extraction = Literal["strict", "lenient"]
_CHUNK = 16

# A gold that is a choice: "C", "(D) Alina", "C Cecile", or prose whose last line says so.
_CHOICE_GOLD = re.compile(r"\(?([A-J])\)?\.?|(?:.*\n)?\(([A-J])\)\s+\S.*|(?:.*\n)?([A-J])[ .:)]+[A-Z]\w.*", re.DOTALL)

_MARKED_LETTER = re.compile(r"\(([A-J])\)")


def judge_row(
    kind: str, row: Mapping[str, Any], *, extract: Extraction = "strict", timeout_s: float = DEADLINE_S
) -> dict[str, str]:
    """Judge one row and return ``{"verdict": …, "reason": …}``.

    Args:
        kind: one of ``verification.KINDS``, or ``python:package.module:function``.
        row: ``gold`` and ``pred``, both text; ``pred`` may be null (no answer), a math gold a list of texts. What a kind needs
            beside them stands in the row too: ``rel_tol``, ``abs_tol``, ``unit`` (number), ``schema`` and ``equal`` (json;
            ``gold`` may then be missing), ``pattern`` (regex), ``tests``, ``entry_point``, ``setup`` (code), ``entry``
            (python: an object; reasoning_gym: see `stored_entry`). ``entry`` may hold the others as well.

    Raises:
        RecipeError: an unknown kind, or a row without its fields.
        StillhouseError: the checking process does not start.
    """
    require_known_kind(kind, where="row")
    if "pred" not in row or ("gold" not in row and kind not in NO_GOLD_NEEDED):
        raise RecipeError(f"a row of kind {kind} needs 'gold' and 'pred'; it has {', '.join(map(repr, row)) or 'nothing'}")
    gold, pred = _text(row.get("gold")), _text(row["pred"])
    if kind == "math" and isinstance(row.get("gold"), list) and all(isinstance(item, str) for item in row["gold"]):
        gold = ", ".join(row["gold"])  # OlympiadBench: ["$2$", "$3$"]
    entry = _entry(kind, row)
    if extract == "lenient" and kind in ("math", "choice"):
        return _judge_leniently(kind, gold, pred, entry, timeout_s)
    stored = stored_entry(row) if kind == "reasoning_gym" else ""
    said = judge(kind, _gold(gold, kind), extracted(kind, pred, extract), entry, stored_entry=stored, timeout_s=timeout_s)
    is_prose = extract == "lenient" and "\\boxed" not in pred and (THINK_OPEN not in pred or THINK_CLOSE in pred)
    if is_prose and kind in ("exact", "reasoning_gym") and said.outcome == "wrong":
        for words in lenient_words(pred):
            said = judge(kind, gold, words, entry, stored_entry=stored, timeout_s=timeout_s)
    return {"verdict": said.outcome, "reason": said.reason}


def judge_rows(
    kind: str,
    rows: Iterable[Mapping[str, Any]],
    *,
    extract: Extraction = "strict",
    timeout_s: float = DEADLINE_S,
    num_workers: int = 2,
) -> Iterator[dict[str, str]]:
    """Judge rows and yield one verdict each, in their order, lazily; a row that hangs holds up only its own worker."""
    source = iter(rows)
    chunks = iter(lambda: list(islice(source, _CHUNK)), [])
    return in_order(lambda row: judge_row(kind, row, extract=extract, timeout_s=timeout_s), chunks, num_workers=num_workers)


def extracted(kind: str, pred: str, extract: Extraction) -> str | None:
    """Return the answer in a completion or a bare answer; None where there is none."""
    if extract == "lenient" and kind == "number":
        found = lenient_answer(pred)
        return found if found is None or "\\boxed" in pred else with_unit(found, pred.rpartition(THINK_CLOSE)[2])
    if THINK_OPEN in pred or THINK_CLOSE in pred:
        if extract == "strict" or kind in ("json", "code"):
            return strict_answer_of(kind, pred)
        return lenient_answer(pred)
    if kind == "code":
        from stillhouse.pipeline.verifiers.code import program_of

        return program_of(pred)
    if kind == "json":
        whole = pred.strip()
        return fenced_block(pred, "json") or (boxed_answer(pred) if "\\boxed" in pred and whole[:1] not in "{[" else whole)
    if extract == "lenient" and kind == "math":
        return lenient_answer(pred)
    return boxed_answer(pred) if "\\boxed" in pred else pred.strip() or None


def _gold(gold: str, kind: str) -> str:
    if kind in ("math", "choice", "number") and "\\boxed" in gold:
        return boxed_answer(gold) or gold
    return gold


def _judge_leniently(kind: str, gold: str, pred: str, entry: dict[str, Any], timeout_s: float) -> dict[str, str]:
    if kind == "choice" and (bare := extracted(kind, pred, "strict")):
        said = verify_choice(gold, bare)
        names_several = said.outcome == "undecided" and len(set(_MARKED_LETTER.findall(gold))) > 1
        if said.outcome == "correct" or names_several:
            return {"verdict": said.outcome, "reason": said.reason}
    choice = _CHOICE_GOLD.fullmatch(gold.strip())
    answer = lenient_answer(pred)
    letter = next((group for group in choice.groups() if group), None) if choice else None
    if letter is None and kind == "choice":
        letter = letter_of(lenient_answer(gold) or gold)
    if letter is not None and (kind == "choice" or _is_letter_in_prose(gold, pred, answer)):
        found = meant_letter(pred)
        return {"verdict": "correct" if found == letter else "wrong", "reason": f"letter {found}, gold {letter}"}
    said = judge(kind, lenient_answer(gold) or gold, answer, entry, timeout_s=timeout_s)
    if said.outcome != "correct" and "\\boxed" not in pred and kind == "math" and _is_words(gold):
        for words in lenient_words(pred):
            said = judge(kind, gold, words, entry, timeout_s=timeout_s)
    return {"verdict": said.outcome, "reason": said.reason}


def _is_words(gold: str) -> bool:
    return gold_words(gold) is not None or date_of(gold) is not None


def _is_letter_in_prose(gold: str, pred: str, answer: str | None) -> bool:
    """Whether a math row is a multiple choice: the gold is an option, or the prediction is words around a letter."""
    if len(gold.strip()) > 3 or answer is None or ("\\boxed" not in pred and announces_letter(pred)):
        return True
    if answer == pred.strip() and not answer.isascii():
        return True
    return letter_of(answer) is None and " " in answer and not re.search(r"[\\$=*^]", answer)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _entry(kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a kind is judged by beside the gold, from the row's columns and, where the kind has such, its ``entry``."""
    names = ENTRY_FIELDS.get(kind, ())
    given = row.get("entry") if names or is_entry_point(kind) else None
    if isinstance(given, str) and given:
        try:
            given = json.loads(given)
        except ValueError as error:
            raise RecipeError(f"the row's 'entry' is not JSON ({error})") from error
    if given and not isinstance(given, Mapping):
        raise RecipeError(f"the row's 'entry' must be an object, got {given!r:.60}")
    entry = dict(given or {}) | {name: row[name] for name in names if name in row}
    needed = [*(["gold"] if kind != "code" else []), *NEEDED_FIELDS.get(kind, ())]
    if kind in NEEDED_FIELDS and not any(name in row or name in entry for name in needed):
        raise RecipeError(f"a row of kind {kind} needs {' or '.join(map(repr, needed))}; it has {', '.join(map(repr, row))}")
    return entry
