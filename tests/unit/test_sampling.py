"""How a token is drawn: the numbers behind it, the top-p set, and the frequencies that come out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.pipeline.errors import TeacherError
from stillhouse.teachers.local import choose_tokens, uniform

MASK_64 = 2**64 - 1


def _splitmix64(seed: int, step: int) -> float:
    """The same hash in Python's own integers, after the paper's listing."""
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK_64
    return ((z ^ (z >> 31)) >> 11) / 2**53


def _seeds(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def test_numbers_are_splitmix64_of_seed_and_step():
    """If it failed, a trace could not be drawn again from the seed that is stored with it."""
    seeds = [0, 1, 2, 12345, 2**63 - 1, 2**64 - 1]
    for step in (0, 1, 7, 32767):
        assert uniform(_seeds(*seeds), step).tolist() == [_splitmix64(seed, step) for seed in seeds]
    # The first outputs of splitmix64 seeded with 1234567, as published with its reference implementation.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [uniform(_seeds(1234567), step)[0] for step in range(5)] == [(value >> 11) / 2**53 for value in published]


def test_a_rows_number_does_not_depend_on_its_neighbours():
    """If it failed, the same seed would give another trace in another batch."""
    alone = uniform(_seeds(42), 3)
    assert uniform(_seeds(7, 42, 9), 3)[1] == alone[0]
    assert uniform(_seeds(42, 42), 3).tolist() == [alone[0]] * 2


@pytest.mark.parametrize("along", ["seeds", "steps"])
def test_numbers_are_spread_evenly_and_do_not_follow_one_another(along):
    """If it failed, neighbouring seeds or steps would draw related tokens, and sampled traces would repeat each other."""
    count = 100_000
    if along == "seeds":
        numbers = uniform(np.arange(count, dtype=np.uint64), 0)
    else:
        numbers = np.concatenate([uniform(_seeds(5), step) for step in range(count)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # Chi-square with 99 degrees of freedom: mean 99, standard deviation 14; 7 deviations above.
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    assert ((counts - count / 100) ** 2 / (count / 100)).sum() < 99 + 7 * 14.1
    # Of independent numbers the correlation has standard deviation 1/sqrt(n).
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 7 / count**0.5


def _draw_by_hand(logits: list[float], number: float, temperature: float, top_p: float) -> int:
    """Inverse CDF over the top-p set, token by token, in Python floats."""
    weights = np.exp((np.array(logits, dtype=np.float64) - max(logits)) / temperature)
    probabilities = weights / weights.sum()
    ranked = sorted(range(len(logits)), key=lambda token: (-probabilities[token], token))
    inside, gathered = [], 0.0
    for token in ranked:
        if gathered >= top_p:
            break
        inside.append(token)
        gathered += probabilities[token]
    reached = 0.0
    for token in inside:
        reached += probabilities[token] / gathered
        if reached >= number:
            return token
    return inside[-1]


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_a_draw_is_the_inverse_cdf_over_the_top_p_set(temperature, top_p):
    """If it failed, traces would be sampled from another distribution than the recipe's temperature and top-p name."""
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(500, 11, generator=generator) * 2
    logits_BV[::7, 3] = float("-inf")
    numbers_B = torch.rand(500, generator=generator, dtype=torch.float64)
    drawn = choose_tokens(logits_BV, numbers_B, temperature=temperature, top_p=top_p).tolist()
    expected = [_draw_by_hand(row, u, temperature, top_p) for row, u in zip(logits_BV.tolist(), numbers_B.tolist())]
    assert drawn == expected


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    """If it failed, tokens that top-p is there to shut out would be drawn, or allowed ones never."""
    logits_BV = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64).log().repeat(1000, 1)
    numbers_B = torch.arange(1000) / 1000
    for top_p, allowed in {0.4: {0}, 0.6: {0, 1}, 0.8: {0, 1, 2}, 0.95: {0, 1, 2, 3}, 1.0: {0, 1, 2, 3}}.items():
        assert set(choose_tokens(logits_BV, numbers_B, temperature=1.0, top_p=top_p).tolist()) == allowed


def test_frequencies_are_the_renormalized_probabilities():
    """If it failed, the teacher would be more, or less, daring than asked."""
    probabilities = torch.tensor([0.05, 0.4, 0.2, 0.25, 0.1], dtype=torch.float64)
    count = 50_000
    numbers_B = torch.from_numpy(uniform(np.arange(count, dtype=np.uint64), 11))
    tokens = choose_tokens(probabilities.log().repeat(count, 1), numbers_B, temperature=1.0, top_p=0.85)
    kept = torch.tensor([0, 0.4, 0.2, 0.25, 0], dtype=torch.float64) / 0.85
    frequencies = torch.bincount(tokens, minlength=5) / count
    assert (frequencies - kept).abs().max() < 7 * 0.5 / count**0.5


def test_temperature_zero_takes_the_likeliest_token_whatever_the_number():
    """If it failed, greedy decoding would not be repeatable."""
    logits_BV = torch.tensor([[0.0, 3.0, 1.0], [5.0, -1.0, 4.9]])
    for number in (0.0, 0.5, 1 - 2**-53):
        numbers_B = torch.full((2,), number, dtype=torch.float64)
        assert choose_tokens(logits_BV, numbers_B, temperature=0, top_p=0.1).tolist() == [1, 0]


def test_the_ends_of_the_unit_interval_stay_inside_the_set():
    """If it failed, one number in 2⁵³ would draw a token outside the set, or crash hours into a run."""
    logits_BV = torch.tensor([[1.0, 1.0, 1.0, float("-inf")]]).repeat(2, 1)
    numbers_B = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose_tokens(logits_BV, numbers_B, temperature=0.7, top_p=1.0).tolist() == [0, 2]


@pytest.mark.parametrize("temperature", [0, 0.6])
def test_logits_that_are_not_numbers_are_refused(temperature):
    """If it failed, a teacher whose float16 activations overflow would fill the store with token 0."""
    logits_BV = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    with pytest.raises(TeacherError, match="bfloat16 or float32"):
        choose_tokens(logits_BV, torch.zeros(2), temperature=temperature, top_p=1.0)
