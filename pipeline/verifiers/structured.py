"""Judge what machines read, and by a user's own function: JSON, regular expressions, ``python:package.module:function``.

All three run in the judge process behind its deadline: a schema's ``pattern`` and a regular expression can take for ever, and a
user's function can do anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse.pipeline.judge_process import ask, module_path
from stillhouse.pipeline.verifiers.judgement import Judgement

PYTHON_PREFIX = "python:"


def verify_json(gold: str, answer: str, entry: Mapping[str, Any], timeout_s: float) -> Judgement:
    """Judge JSON by a schema, by an expected value, or by both.

    Args:
        gold: the expected value as JSON text, "" for none; objects have no order, 1 equals 1.0, true does not equal 1.
        answer: JSON text and nothing else; a fenced block is taken out by ``extraction.answer_of``.
        entry: ``schema`` (JSON schema, or its text; draft 2020-12 unless it names another); ``equal`` false where the gold is
            one valid example among many and only the schema counts.
    """
    equal = entry.get("equal", True)
    if not isinstance(equal, bool):
        return Judgement("undecided", f"equal must be true or false, got {equal!r:.40}")
    request = {"op": "json", "what": "json", "answer": answer, "schema": entry.get("schema"), "gold": None}
    if equal and gold.strip():
        request["gold"] = gold
    elif request["schema"] is None:
        return Judgement("undecided", "neither a schema nor a value to compare with")
    return Judgement(*ask(request, timeout_s))


def verify_regex(gold: str, answer: str, entry: Mapping[str, Any], timeout_s: float) -> Judgement:
    """Judge by a regular expression (Python's ``re``) that has to match the whole answer.

    The pattern is ``entry["pattern"]``, and the gold one answer that it matches; without an entry the gold is the pattern.
    """
    pattern = entry.get("pattern", gold)
    if not isinstance(pattern, str) or not pattern:
        return Judgement("undecided", f"the pattern must be text, got {pattern!r:.60}")
    request = {"op": "regex", "what": "regex", "pattern": pattern, "answer": answer}
    return Judgement(*ask(request, timeout_s))


def verify_by_function(kind: str, gold: str, answer: str, entry: Mapping[str, Any], timeout_s: float) -> Judgement:
    """Judge by a user's own function, ``function(answer, gold, entry)``, named ``python:package.module:function``.

    It has to be importable: installed, on PYTHONPATH, in the working folder, or beside the recipe. It returns True, False or
    None (undecided), one of the three words, or a pair of such a word and a reason. While it judges, it may not write files,
    start processes or open sockets.

    Raises:
        StillhouseError: it cannot be imported.
    """
    target = kind.removeprefix(PYTHON_PREFIX)
    request = {"op": "python", "what": "python", "target": target, "path": module_path()}
    request |= {"answer": answer, "gold": gold, "entry": dict(entry)}
    return Judgement(*ask(request, timeout_s))
