"""Judge an answer by a reasoning-gym task's own scorer, in the judge process; only full marks are correct."""

from __future__ import annotations

import json
import re

from stillhouse.pipeline.exact_numbers import exact_number
from stillhouse.pipeline.judge_process import ask
from stillhouse.pipeline.verifiers.judgement import Judgement

# Several scorers hand the answer to eval or sympy.parse_expr; the worker refuses what it can, this keeps the rest out.
_CODE = re.compile(r"__|\blambda\b|\b(?:eval|exec|open|compile|getattr|setattr|globals|locals|vars|exit|quit|import\w*)\s*\(")
_TOKENS = re.compile(r"\w+")


def verify_reasoning_gym(entry: str, answer: str, timeout_s: float) -> Judgement:
    """Judge one answer; ``entry`` is the JSON text that ``reasoning_gym_problems`` stored.

    Raises:
        StillhouseError: the judge process does not start, or there is no such task.
    """
    stored = json.loads(entry)
    gold = stored["entry"]["answer"]
    answer = answer.strip().replace("−", "-")
    if len(answer) > 2 and answer.startswith("$") and answer.endswith("$") and not gold.startswith("$"):
        answer = answer.strip("$").strip()
    if answer == gold.strip():
        answer = gold
    elif (code := _CODE.search(answer)) and not _CODE.search(gold):
        return Judgement("wrong", f"the answer holds program text ({code[0]!r})")
    gold_words, words = (_TOKENS.findall(text.casefold()) for text in (gold, answer))
    number = exact_number(answer)
    of_gold = len(words) <= len(gold_words) and set(words) <= set(gold_words)
    of_gold = of_gold or (number is not None and number == exact_number(gold))
    request = {"op": "reasoning_gym", "what": "reasoning_gym", "answer": answer, "must_be_plain": not of_gold, **stored}
    return Judgement(*ask(request, timeout_s))
