"""The embedded world's texts: what the tiny teacher (pumps apart) and the tiny base student were taught, and nothing else.

Three reasoning-gym families that need more than one step, each with its single steps:

- ``chain_sum``: 4 to 6 terms, running totals;
- ``products``: two numbers of two digits, by tens and units;
- ``leg_counting``: a fact and a product for each animal, then running totals.

`worked_solution` writes the reasoning that the tiny teacher learns from. `lesson` writes what the base student learns
from: single steps, restating, copying and direct answers. No lesson contains a think block or chains two steps, so
that the reasoning is what distillation has to add.

The texts are made by a program, not by a model: they are the data of ``teachers/tiny/make.py`` and
``students/tiny/make.py``. A run of the pipeline never calls them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

FAMILIES: dict[str, dict[str, object]] = {
    "chain_sum": {"min_terms": 4, "max_terms": 6, "min_digits": 1, "max_digits": 2},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
    "leg_counting": {"min_animals": 3, "max_animals": 5, "min_instances": 1, "max_instances": 9},
}
"""The three tasks with the options that the ``demo`` recipe uses."""

HELD_OUT_SEEDS = (9_000_000, 9_500_000)
"""reasoning-gym draws item i from seed + i. The first thousand items of each family from these seeds are in nobody's
training data, also not as a chance repetition: `held_out_texts` names them, the makers leave them out."""
HELD_OUT_SIZE = 1_000

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Question:
    """One generated problem: family, question text and gold answer."""

    family: str
    text: str
    answer: str


def questions(family: str, *, seed: int, size: int) -> Iterator[Question]:
    """Draw problems of one family from reasoning-gym; item i depends on ``seed + i`` alone."""
    import reasoning_gym

    for entry in reasoning_gym.create_dataset(family, size=size, seed=seed, **FAMILIES[family]):
        yield Question(family, entry["question"], entry["answer"])


def held_out_texts() -> frozenset[str]:
    """Question texts that no shipped model has been trained on."""
    return frozenset(
        question.text
        for family in FAMILIES
        for seed in HELD_OUT_SEEDS
        for question in questions(family, seed=seed, size=HELD_OUT_SIZE)
    )


def leg_facts() -> dict[str, int]:
    """Legs of each animal that ``leg_counting`` asks about."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    return dict(ANIMALS)


def _expression(text: str) -> list[str]:
    """Numbers and operators of an arithmetic question, in order: ``["4", "-", "1"]``."""
    return re.findall(r"\d+|[-+*]", text.split(":")[-1])


def _apply(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def _step(left: int, operator: str, right: int) -> str:
    return f"{left} {operator} {right} = {_apply(left, operator, right)}"


def _running_totals(tokens: list[str]) -> list[str]:
    """Lines ``a ± b = c`` from left to right over a flat sum."""
    lines, total = [], int(tokens[0])
    for operator, term in zip(tokens[1::2], tokens[2::2]):
        lines.append(_step(total, operator, int(term)))
        total = _apply(total, operator, int(term))
    return lines


def partial_products(left: int, right: int) -> list[str]:
    """Long multiplication by a number of two digits: times the tens, times the units, and their sum."""
    tens, units = right // 10 * 10, right % 10
    return [_step(left, "*", tens), _step(left, "*", units), _step(left * tens, "+", left * units)]


def _herds(text: str) -> list[tuple[int, str]]:
    """``(8, "tigers")`` for every animal of a leg-counting question."""
    return [(int(count), name) for count, name in re.findall(r"(\d+) ([a-z ]+?)(?=,|\?)", text)]


def _legs(name: str, facts: dict[str, int]) -> int:
    return facts[name] if name in facts else facts[name.removesuffix("s")]


def _herd_line(count: int, name: str, facts: dict[str, int]) -> str:
    return f"{count} {name}: {_step(count, '*', _legs(name, facts))}"


def worked_solution(question: Question, rng: Random) -> str:
    """The completion the tiny teacher learns to write: a think block with one step a line, then the boxed answer.

    ``rng`` decides only whether a sentence opens the reasoning.
    """
    if question.family == "leg_counting":
        facts = leg_facts()
        herds = _herds(question.text)
        opening = "The legs of each animal first."
        products = [str(count * _legs(name, facts)) for count, name in herds]
        lines = [_herd_line(count, name, facts) for count, name in herds]
        lines += _running_totals([token for product in products for token in ("+", product)][1:])
    elif question.family == "products":
        opening = "Tens, then units."
        left, _, right = _expression(question.text)
        lines = partial_products(int(left), int(right))
    else:
        opening = "From left to right."
        lines = _running_totals(_expression(question.text))
    if rng.random() < 0.5:
        lines.insert(0, opening)
    return f"{THINK_OPEN}\n" + "\n".join(lines) + f"\n{THINK_CLOSE}\n\n" + f"\\boxed{{{question.answer}}}"


def _total(rng: Random) -> int:
    """A left operand, spread as running totals are: mostly small, some in the hundreds, some negative."""
    magnitude = rng.choice((20, 100, 100, 200, 200, 400, 1000))
    return rng.randint(-magnitude // 2, magnitude)


def _single_step(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.45:
        return _step(_total(rng), rng.choice("+-"), rng.randint(0, rng.choice((9, 99, 99, 99))))
    if kind < 0.55:
        return _step(abs(_total(rng)), "+", rng.randint(0, 14) * rng.randint(0, 10))
    if kind < 0.75:
        return _step(rng.randint(10, 99) * rng.randint(1, 9) * 10, "+", rng.randint(10, 99) * rng.randint(0, 9))
    if kind < 0.8:
        return _step(rng.randint(0, 14), "*", rng.randint(0, 14))
    return _step(rng.randint(10, 99), "*", rng.randint(0, 9) * rng.choice((1, 10)))


def lesson(question: Question, rng: Random, *, symbols: tuple[str, ...] = ()) -> tuple[str, str]:
    """One lesson for the base student, as ``(user, assistant)``.

    Single steps, restating a problem's terms, copying, or a direct answer to
    ``question``. ``symbols`` are strings mixed into the copying exercises so that every token of the vocabulary is known.
    """
    kind = rng.random()
    if kind < 0.45:
        steps = [_single_step(rng) for _ in range(rng.randint(2, 6))]
        return "Work out:\n" + "\n".join(step.split(" =")[0] for step in steps), "\n".join(steps)
    if kind < 0.6:
        facts = leg_facts()
        herds = [
            (rng.randint(1, 9), name + rng.choice(("", "s", "s"))) for name in rng.sample(sorted(facts), rng.randint(2, 5))
        ]
        asked = ", ".join(f"{count} {name}" for count, name in herds)
        return f"How many legs has each herd: {asked}?", "\n".join(_herd_line(count, name, facts) for count, name in herds)
    if kind < 0.75:
        if question.family == "leg_counting":
            return f"Restate the list.\n{question.text}", "\n".join(f"{count} {name}" for count, name in _herds(question.text))
        return f"Restate the terms.\n{question.text}", " ".join(_expression(question.text))
    if kind < 0.85:
        words = [
            rng.choice(symbols) if symbols and rng.random() < 0.3 else str(rng.randint(-99, 999))
            for _ in range(rng.randint(4, 12))
        ]
        return "Repeat: " + " ".join(words), " ".join(words)
    return question.text, f"\\boxed{{{question.answer}}}"
