"""Which rows make up which step: batches of about the same number of tokens, decided before training starts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

# Rows of this many steps are sorted by length together: enough to waste little padding, few enough to stay shuffled.
_STEPS_PER_WINDOW = 16


def _shuffled_forever(num_rows: int, rng: random.Random) -> Iterator[int]:
    while True:
        yield from rng.sample(range(num_rows), num_rows)


def plan_batches(
    lengths: Sequence[int], *, num_steps: int, tokens_per_step: int, num_parts: int = 1, seed: int
) -> list[list[list[int]]]:
    """Plan every optimizer step of a run: for each step ``num_parts`` lists of row numbers.

    Rows are drawn epoch after epoch, each shuffled anew. The rows of 16 steps at a time are sorted by length before they
    are cut into steps, and the steps shuffled again, so that rows padded to one length have nearly that length. A step
    takes rows until it holds ``tokens_per_step`` tokens (prompt included, padding not), and at least one row a part.

    Being a pure function of its arguments, the plan is the same after a restart.

    Args:
        lengths: tokens of each row.
        num_parts: micro-batches a step, times processes; a step's rows are dealt to them in order of length.
        seed: of the shuffles.
    """
    if not lengths:
        raise ValueError("plan_batches needs at least one row")
    if num_steps < 1 or tokens_per_step < 1 or num_parts < 1:
        raise ValueError(
            f"num_steps, tokens_per_step and num_parts are at least 1; got {num_steps}, {tokens_per_step}, {num_parts}"
        )
    rng = random.Random(seed)
    rows = _shuffled_forever(len(lengths), rng)
    steps: list[list[list[int]]] = []
    while len(steps) < num_steps:
        window: list[int] = []
        total = 0
        while total < tokens_per_step * _STEPS_PER_WINDOW or len(window) < num_parts * _STEPS_PER_WINDOW:
            window.append(next(rows))
            total += lengths[window[-1]]
        window.sort(key=lambda row: (lengths[row], row))
        # The whole window is dealt out: a rest kept for the next one would be its longest rows, again and again.
        planned: list[list[int]] = [[]]
        tokens_so_far = 0
        for row in window:
            middle = tokens_so_far + lengths[row] / 2
            if len(planned[-1]) >= num_parts and middle > total * len(planned) / _STEPS_PER_WINDOW:
                planned.append([])
            planned[-1].append(row)
            tokens_so_far += lengths[row]
        if len(planned[-1]) < num_parts:
            too_few = planned.pop()
            planned[-1] += too_few
        rng.shuffle(planned)
        steps.extend(_deal(step, num_parts) for step in planned)
    return steps[:num_steps]


def _deal(rows: Sequence[int], num_parts: int) -> list[list[int]]:
    """Cut rows into contiguous parts whose sizes differ by at most one."""
    bounds = [round(part * len(rows) / num_parts) for part in range(num_parts + 1)]
    return [list(rows[start:end]) for start, end in itertools.pairwise(bounds)]
