"""Judge an answer: correct, wrong or undecided, with a reason. A time-out is undecided, never wrong.

All kinds of problem are equals; each has its module in ``verifiers/``. What runs other people's code on model text
(reasoning-gym's scorers, some of which ``eval`` it, math-verify, a user's own function) or can take for ever (regular
expressions, JSON schemas) runs in processes of its own with a deadline for each item and SIGKILL behind it, so that the
verdict is the same from the main thread, another thread and a Ray actor, and the item after a hang is fine. Nothing in this
process evaluates what a model wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.exact_numbers import exact_number, unwrapped
from stillhouse.pipeline.extraction import boxed_answer
from stillhouse.pipeline.records import Problem
from stillhouse.pipeline.verifiers.choice import letter_of, option_of, verify_choice, verify_exact
from stillhouse.pipeline.verifiers.judgement import Judgement
from stillhouse.pipeline.verifiers.math_answer import gold_words, verify_math
from stillhouse.pipeline.verifiers.quantity import verify_number
from stillhouse.pipeline.verifiers.reasoning_gym import verify_reasoning_gym
from stillhouse.pipeline.verifiers.structured import PYTHON_PREFIX, verify_by_function, verify_json, verify_regex

VERIFIER_VERSION = 4
"""Raised whenever a verdict could change; part of every Verdict and of the filter stage's fingerprint."""

KINDS = ("reasoning_gym", "math", "choice", "exact", "number", "json", "regex", "code")
"""Beside them ``python:package.module:function``, a user's own."""

ENTRY_FIELDS: dict[str, tuple[str, ...]] = {
    "number": ("rel_tol", "abs_tol", "unit"),
    "json": ("schema", "equal"),
    "regex": ("pattern",),
    "code": ("tests", "entry_point", "setup"),
}
"""What a kind is judged by beside the answer: columns of a problem file that go into ``Problem.entry``."""
NEEDED_FIELDS: dict[str, tuple[str, ...]] = {"json": ("schema",), "regex": ("pattern",), "code": ("tests",)}
"""What judges a problem of these kinds that has no gold answer."""
NO_GOLD_NEEDED = frozenset({"json", "regex", "code", "reasoning_gym"})
"""Kinds whose problems may have no gold answer: schema, pattern, tests or the task's own scorer say what is right."""

DEADLINE_S = 5.0
MAX_ANSWER_CHARS = 4_000
_KINDS_OF_SHORT_ANSWERS = ("math", "number", "choice", "reasoning_gym")
"""What is longer than the limit is not read by them; the others take linear time, or run behind a deadline."""
_BRACE = re.compile(r"[{}]")
_ANY_ANSWER = {"json": "{}", "regex": "x"}
"""What tells whether a schema or a pattern without a gold can judge anything."""
_DECIMAL = re.compile(r"-?\d+(\.\d+(e[-+]\d+)?|e[-+]\d+)")


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """How a verifier did on the user's own problems: each gold must be accepted, each altered one must not.

    ``num_golds`` is below ``num_problems`` where a problem has none (a schema, a pattern or tests judge it); a schema or
    pattern that can judge nothing counts as a gold that is not accepted. ``unsound`` are the ids of such problems.
    """

    num_problems: int
    num_golds: int
    gold_accepted: int
    num_mutated: int
    mutated_rejected: int
    failures: list[str]
    unsound: frozenset[str] = frozenset()

    @property
    def sound(self) -> bool:
        """Every gold was accepted and no altered one."""
        return self.gold_accepted == self.num_golds and self.mutated_rejected == self.num_mutated

    def as_json(self, *, max_failures: int | None = None) -> dict[str, Any]:
        """The counts and the first failures, for reports."""
        counts = ("num_problems", "num_golds", "gold_accepted", "num_mutated", "mutated_rejected")
        return {name: getattr(self, name) for name in counts} | {"failures": self.failures[:max_failures]}

    def line(self) -> str:
        """The rates in words."""
        golds = f"{self.gold_accepted:,} of {self.num_golds:,} golds accepted" if self.num_golds else "no golds to accept"
        return f"{golds}, {self.mutated_rejected:,} of {self.num_mutated:,} altered ones refused"


def verify(problem: Problem, answer: str | None, *, timeout_s: float = DEADLINE_S) -> Judgement:
    """Judge one answer to one problem.

    Args:
        problem: ``problem.kind`` chooses the verifier.
        answer: the extracted answer (content of the box; of a fenced block for code), or None where none was found.
        timeout_s: seconds for the item; past it the checking process is killed and the outcome is undecided.

    Raises:
        RecipeError: the problem's kind is not one of ``KINDS``, or its entry is not a JSON object.
        StillhouseError: the checking process does not start on this machine.
    """
    where = f"problem {problem.id[:12]}"
    require_known_kind(problem.kind, where=where)
    if problem.kind == "reasoning_gym":
        entry: dict[str, Any] = {}
    else:
        entry = _entry(problem.entry, where)
    return judge(problem.kind, problem.answer, answer, entry, stored_entry=problem.entry, timeout_s=timeout_s)


def judge(
    kind: str,
    gold: str,
    answer: str | None,
    entry: dict[str, Any],
    *,
    stored_entry: str = "",
    timeout_s: float = DEADLINE_S,
) -> Judgement:
    """Judge one extracted answer by its parts; ``stored_entry`` is a reasoning-gym problem's entry as it is stored."""
    if answer is None or not answer.strip():
        return Judgement("wrong", "no answer")
    if len(answer) > MAX_ANSWER_CHARS + len(gold) and kind in _KINDS_OF_SHORT_ANSWERS:
        return Judgement("undecided", f"the answer has {len(answer)} characters; not checked")
    if kind == "reasoning_gym":
        return verify_reasoning_gym(stored_entry, answer, timeout_s)
    if kind == "math":
        return verify_math(gold, answer, timeout_s)
    if kind == "choice":
        return verify_choice(gold, answer)
    if kind == "number":
        return verify_number(gold, answer, entry)
    if kind == "json":
        return verify_json(gold, answer, entry, timeout_s)
    if kind == "regex":
        return verify_regex(gold, answer, entry, timeout_s)
    if kind == "code":
        from stillhouse.pipeline.verifiers.code import verify_program

        return verify_program(entry, answer, timeout_s=timeout_s)
    if kind.startswith(PYTHON_PREFIX):
        return verify_by_function(kind, gold, answer, entry, timeout_s)
    return verify_exact(gold, answer)


def require_known_kind(kind: str, *, where: str) -> None:
    """Raise RecipeError where a problem kind has no verifier."""
    if kind in KINDS or is_entry_point(kind):
        return
    raise RecipeError(
        f"{where}: no verifier for kind={kind!r}; the kinds are {', '.join(KINDS)}, and {PYTHON_PREFIX}package.module:function"
    )


def is_entry_point(kind: str) -> bool:
    """Whether a kind is written ``python:package.module:function``."""
    module, _, function = kind.removeprefix(PYTHON_PREFIX).partition(":")
    names = [*module.split("."), function]
    return kind.startswith(PYTHON_PREFIX) and all(name.isidentifier() for name in names)


def _entry(text: str, where: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where}: its entry is not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise RecipeError(f"{where}: its entry must be a JSON object, got {type(entry).__name__}")
    return entry


def mutated_golds(problem: Problem) -> list[str]:
    """Answers that differ from the gold by construction: a number plus and minus one, the next letter, other text."""
    gold = problem.answer
    if problem.kind == "number":
        return [f"1{gold}" if gold[:1].isdigit() else f"3 {gold}", "no number"]
    if problem.kind == "json" and (not gold or not _entry(problem.entry, problem.source).get("equal", True)):
        return ["{", "no JSON"]  # what else does not fit the schema is not known
    if problem.kind == "json":
        return [json.dumps({"no such key": gold}), "{", "no JSON"]
    if problem.kind == "regex":
        return ["Zz, 0!\n\x07"]  # a little of everything that a pattern may exclude
    if problem.kind == "code":
        return ["pass", f"raise SystemExit(0)\n{gold}"]
    if problem.kind == "reasoning_gym" and _DECIMAL.fullmatch(gold):  # scorers allow for rounding: one more may not be enough
        return [re.sub(r"\d", lambda first: f"1{first[0]}", gold, count=1)]
    number = exact_number(gold) if problem.kind != "choice" else None
    if number is not None:
        return [str(number + 1), str(number - 1)]
    if problem.kind in ("choice", "math") and (letter := letter_of(gold) or (option_of(gold) or ("",))[0]):
        return [chr((ord(letter) - ord("A") + 1) % 26 + ord("A"))]
    if problem.kind == "math" and gold_words(gold) is None:
        return [f"({unwrapped(gold)}) + 1", "\\text{no such answer}"]
    return [f"{gold} zzz", "zzz"]


def gold_as_answer(problem: Problem) -> str | None:
    """The gold as it would be extracted from a completion: from a box, or as it is for code and JSON, whose braces need not
    balance. In a text they are escaped, as a model has to.
    """
    gold = problem.answer
    if problem.kind in ("code", "json"):
        return gold
    boxed = boxed_answer(f"\\boxed{{{gold}}}")
    if problem.kind == "exact" and boxed != gold.strip():
        boxed = boxed_answer(f"\\boxed{{{_BRACE.sub(lambda brace: chr(92) + brace[0], gold)}}}")
    return boxed


def self_check(problems: Sequence[Problem], *, max_mutated: int | None = None) -> SelfCheck:
    """Let the verifiers prove themselves on the user's own problems before a teacher token is spent.

    The gold is checked as a model would write it: boxed after ``</think>``, then extracted again. Altered golds must not be
    accepted (wrong or undecided). ``failures`` names each gold not accepted and each altered one accepted.

    Args:
        max_mutated: alter the golds of about so many problems, spread evenly over them; None alters all.
    """
    num_golds = gold_accepted = num_mutated = mutated_rejected = 0
    failures, unsound = [], set()
    step = 1 if max_mutated is None else max(1, len(problems) // max_mutated)
    for place, problem in enumerate(problems):
        name = f"{problem.source} problem {problem.id[:12]}"
        if problem.answer or problem.kind not in NO_GOLD_NEEDED:
            num_golds += 1
            judgement = verify(problem, gold_as_answer(problem))
            if judgement.outcome == "correct":
                gold_accepted += 1
            else:
                unsound.add(problem.id)
                failures.append(f"{name}: its own answer {problem.answer[:80]!r} is {judgement.outcome} ({judgement.reason})")
        elif problem.kind in _ANY_ANSWER and (said := verify(problem, _ANY_ANSWER[problem.kind])).outcome == "undecided":
            num_golds += 1
            unsound.add(problem.id)
            failures.append(f"{name}: it can judge no answer ({said.reason})")
        if place % step:
            continue
        for mutated in mutated_golds(problem):
            num_mutated += 1
            judgement = verify(problem, mutated)
            if judgement.outcome == "correct":
                failures.append(f"{name}: {mutated[:80]!r} is accepted for {problem.answer[:80]!r} ({judgement.reason})")
            else:
                mutated_rejected += 1
    return SelfCheck(len(problems), num_golds, gold_accepted, num_mutated, mutated_rejected, failures, frozenset(unsound))
