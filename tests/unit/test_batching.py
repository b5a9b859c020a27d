"""Which rows make up which step, and the learning rate of each step."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from stillhouse.students.batching import plan_batches
from stillhouse.students.training import learning_rate_factor

LENGTHS = [random.Random(0).randint(20, 300) for _ in range(200)]


def test_steps_hold_the_tokens_asked_for_and_little_padding():
    """If this failed, tokens_per_step in a recipe would mean something else, or a CPU would train mostly on padding."""
    plan = plan_batches(LENGTHS, num_steps=60, tokens_per_step=2000, seed=1)
    tokens = [sum(LENGTHS[row] for row in rows) for (rows,) in plan]
    assert len(plan) == 60
    assert all(abs(count - 2000) <= 300 for count in tokens)
    padded = sum(len(rows) * max(LENGTHS[row] for row in rows) for (rows,) in plan)
    assert padded < 1.15 * sum(tokens)


def test_every_row_is_used_about_equally_often():
    """If this failed, some traces would be trained on often and others never."""
    plan = plan_batches(LENGTHS, num_steps=200, tokens_per_step=2000, seed=1)
    used = Counter(row for step in plan for rows in step for row in rows)
    assert set(used) == set(range(len(LENGTHS)))
    assert max(used.values()) - min(used.values()) <= 3


def test_the_plan_depends_on_its_arguments_alone():
    """If this failed, a resumed training would go on with other batches."""
    assert plan_batches(LENGTHS, num_steps=40, tokens_per_step=900, seed=5) == plan_batches(
        LENGTHS, num_steps=40, tokens_per_step=900, seed=5
    )
    assert plan_batches(LENGTHS, num_steps=40, tokens_per_step=900, seed=5) != plan_batches(
        LENGTHS, num_steps=40, tokens_per_step=900, seed=6
    )


@pytest.mark.parametrize("num_rows", [1, 3, 200])
def test_each_part_of_a_step_has_rows_also_when_there_are_few(num_rows):
    """If this failed, a small data set or many accumulation steps would stop the training with an empty batch."""
    plan = plan_batches(LENGTHS[:num_rows], num_steps=30, tokens_per_step=100, num_parts=4, seed=0)
    assert len(plan) == 30
    assert all(len(step) == 4 and all(step) for step in plan)


@pytest.mark.parametrize(("num_steps", "warmup_ratio"), [(100, 0.1), (300, 0.3), (20, 0.5)])
def test_one_cycle_is_torchs(num_steps, warmup_ratio):
    """If this failed, a learning rate known to work with torch's OneCycleLR would not be the same here."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=num_steps, pct_start=warmup_ratio)
    for step in range(num_steps):
        ours = learning_rate_factor(step, num_steps=num_steps, scheduler="one_cycle", warmup_ratio=warmup_ratio)
        assert ours == pytest.approx(reference.get_last_lr()[0], rel=1e-6, abs=1e-9)
        optimizer.step()
        if step < num_steps - 1:
            reference.step()


def test_cosine_and_constant_warm_up_and_end_where_they_say():
    """If this failed, the first steps would blow up a fresh adapter, or the last ones learn nothing."""
    cosine = [learning_rate_factor(s, num_steps=100, scheduler="cosine", warmup_ratio=0.1) for s in range(101)]
    assert cosine[0] == pytest.approx(1 / 11)
    assert max(cosine) == cosine[10] == 1.0
    assert cosine[100] == pytest.approx(0.1)
    constant = [learning_rate_factor(s, num_steps=100, scheduler="constant", warmup_ratio=0.0) for s in range(100)]
    assert set(constant) == {1.0}
