"""Judge an answer: correct, wrong or undecided, with a reason. A time-out is undecided, never wrong.

Four kinds of problem are equals: ``reasoning_gym`` (the task's own scorer), ``math``, ``choice`` and ``exact``. What runs other
people's code on model text (reasoning-gym's scorers, some of which ``eval`` it, and math-verify) runs in a process of its
own with a deadline for each item and SIGKILL behind it, so that the verdict is the same from the main thread, another
thread and a Ray actor, and the item after a hang is fine. Nothing in this process evaluates what a model wrote.

Known false accepts of math-verify that are not caught here: units (5 cm = 5 m) and unordered products (abc = cab).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.exact_numbers import exact_number, plain_text, unwrapped
from stillhouse.pipeline.extraction import boxed_answer
from stillhouse.pipeline.judge_process import ask
from stillhouse.pipeline.records import Outcome, Problem

VERIFIER_VERSION = 1
"""Raised whenever a verdict could change; part of every Verdict and of the filter stage's fingerprint."""

KINDS = ("reasoning_gym", "math", "choice", "exact")
DEADLINE_S = 5.0
MAX_ANSWER_CHARS = 4_000


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a verifier said of one answer, and why."""

    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """How a verifier did on the user's own gold answers: each gold must be accepted, each mutated gold must not."""

    num_problems: int
    gold_accepted: int
    num_mutated: int
    mutated_rejected: int
    failures: list[str]


def verify(problem: Problem, answer: str | None, *, timeout_s: float = DEADLINE_S) -> Judgement:
    """Judge one answer to one problem.

    Args:
        problem: ``problem.kind`` chooses the verifier.
        answer: the extracted answer (content of the box), or None where none was found.
        timeout_s: seconds for the item; past it the checking process is killed and the outcome is undecided.

    Raises:
        RecipeError: the problem's kind is not one of ``KINDS``.
        StillhouseError: the checking process does not start on this machine.
    """
    require_known_kind(problem.kind, where=f"problem {problem.id[:12]}")
    if answer is None or not answer.strip():
        return Judgement("wrong", "no answer")
    if len(answer) > MAX_ANSWER_CHARS + len(problem.answer):
        return Judgement("undecided", f"the answer has {len(answer)} characters; not checked")
    if problem.kind == "reasoning_gym":
        return _verify_reasoning_gym(problem, answer, timeout_s)
    if problem.kind == "math":
        return _verify_math(problem.answer, answer, timeout_s)
    if problem.kind == "choice":
        return _verify_choice(problem.answer, answer)
    return _verify_exact(problem.answer, answer)


def require_known_kind(kind: str, *, where: str) -> None:
    """Raise RecipeError where a problem kind has no verifier."""
    if kind not in KINDS:
        raise RecipeError(f"{where}: no verifier for kind={kind!r}; the kinds are {', '.join(KINDS)}")


def _verify_exact(gold: str, answer: str) -> Judgement:
    if plain_text(gold) == plain_text(answer):
        return Judgement("correct", "same text")
    return Judgement("wrong", "other text")


_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\]]?\s*[.:]?")


def _letter(text: str) -> str | None:
    match = _LETTER.fullmatch(_TEXT_COMMAND.sub(r"\1", plain_text(text)).strip("$ "))
    return match[1].upper() if match else None


def _verify_choice(gold: str, answer: str) -> Judgement:
    gold_letter, letter = _letter(gold), _letter(answer)
    if gold_letter is None:
        return Judgement("undecided", f"the gold {gold[:40]!r} is not one letter")
    if letter is None:
        return Judgement("wrong", "the answer is not one letter")
    return Judgement("correct" if letter == gold_letter else "wrong", f"letter {letter}, gold {gold_letter}")


_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z]")
_FUNCTIONS = re.compile(r"(?:a|arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|sqrt|pi|infty|infinity")


def _words_only(text: str) -> str | None:
    """Return a gold that is words and no formula (``Even``, ``\\text{no solution}``) without its markup."""
    plain = plain_text(_TEXT_COMMAND.sub(r"\1", unwrapped(text)))
    longest = max((len(word) for word in plain.split()), default=0)
    marked = bool(_TEXT_COMMAND.fullmatch(unwrapped(text)))
    if not _WORDS.fullmatch(plain) or _FUNCTIONS.fullmatch(plain.lower()) or not (marked or longest >= 4):
        return None
    return plain.casefold()


def _verify_math(gold: str, answer: str, timeout_s: float) -> Judgement:
    gold_number, number = exact_number(gold), exact_number(answer)
    if gold_number is not None and number is not None:
        return Judgement("correct" if gold_number == number else "wrong", "exact arithmetic")
    gold_text, text = unwrapped(gold), unwrapped(answer)
    if gold_text and gold_text == text:
        return Judgement("correct", "same text")
    words = _words_only(gold)
    if words is not None:
        same = words == plain_text(_TEXT_COMMAND.sub(r"\1", text)).casefold()
        return Judgement("correct" if same else "wrong", "same words" if same else "other words")
    if not gold_text or not text:
        return Judgement("undecided", "nothing to compare")
    return Judgement(*ask({"op": "math", "what": "math", "gold": gold_text, "answer": text}, timeout_s))


# Several scorers hand the answer to eval or sympy.parse_expr; the worker refuses what it can, this keeps the rest out.
_CODE = re.compile(r"__|\blambda\b|\b(?:eval|exec|open|compile|getattr|setattr|globals|locals|vars|exit|quit|import\w*)\s*\(")
_TOKENS = re.compile(r"\w+")


def _verify_reasoning_gym(problem: Problem, answer: str, timeout_s: float) -> Judgement:
    stored = json.loads(problem.entry)
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


def mutated_golds(problem: Problem) -> list[str]:
    """Answers that differ from the gold by construction: a number plus and minus one, the next letter, other text."""
    gold = problem.answer
    number = exact_number(gold) if problem.kind != "choice" else None
    if number is not None:
        return [str(number + 1), str(number - 1)]
    if problem.kind == "choice" and (letter := _letter(gold)):
        return [chr((ord(letter) - ord("A") + 1) % 26 + ord("A"))]
    if problem.kind == "math" and _words_only(gold) is None:
        return [f"({unwrapped(gold)}) + 1", "\\text{no such answer}"]
    return [f"{gold} zzz", "zzz"]


def self_check(problems: Iterable[Problem]) -> SelfCheck:
    """Let the verifiers prove themselves on the user's own problems before a teacher token is spent.

    The gold is checked as a model would write it: boxed after ``</think>``, then extracted again. Mutated golds must not be
    accepted (wrong or undecided). ``failures`` names each gold not accepted and each mutated gold accepted.
    """
    num_problems = gold_accepted = num_mutated = mutated_rejected = 0
    failures = []
    for problem in problems:
        num_problems += 1
        extracted = boxed_answer(f"\\boxed{{{problem.answer}}}")
        judgement = verify(problem, extracted)
        name = f"{problem.source} problem {problem.id[:12]}"
        if judgement.outcome == "correct":
            gold_accepted += 1
        else:
            failures.append(f"{name}: its own answer {problem.answer[:80]!r} is {judgement.outcome} ({judgement.reason})")
        for mutated in mutated_golds(problem):
            num_mutated += 1
            judgement = verify(problem, mutated)
            if judgement.outcome == "correct":
                failures.append(f"{name}: {mutated[:80]!r} is accepted for {problem.answer[:80]!r} ({judgement.reason})")
            else:
                mutated_rejected += 1
    return SelfCheck(num_problems, gold_accepted, num_mutated, mutated_rejected, failures)
