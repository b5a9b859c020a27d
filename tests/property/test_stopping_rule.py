"""What the stopping rule promises, for any rule and pass rate, and against simulated sampling."""

from __future__ import annotations

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.pipeline.statistics import wilson
from stillhouse.pipeline.stopping import Planner, StoppingRule, give_up_probability, prospects

RULES = st.builds(
    lambda k, more, rate, error: StoppingRule(k, k + more, rate, error),
    st.integers(1, 5),
    st.integers(0, 60),
    st.floats(0.02, 0.9),
    st.floats(0.001, 0.5),
)


def drawn(rule: StoppingRule, pass_rate: float, rng: random.Random, *, at_once: bool) -> tuple[int, str]:
    """Sample one problem as a run does: (draws paid for, how it ended).

    ``at_once``: each batch comes back before the next is asked for. Else answers come one at a time, the right ones first
    because they are shorter, and after each the draws under way are filled up again.
    """
    planner, under_way, next_index = Planner(rule), [], 0
    while True:
        while len(under_way) < planner.next_draws("p"):
            outcome = "correct" if rng.random() < pass_rate else rng.choice(["wrong", "undecided"])
            under_way.append((next_index, outcome))
            next_index += 1
        if not under_way:
            return next_index, planner.state("p")
        under_way.sort(key=lambda draw: (draw[1] != "correct", draw[0]))
        for _ in range(len(under_way) if at_once else 1):
            planner.record("p", *under_way.pop(0))


@given(RULES, st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_a_solvable_problem_is_given_up_no_more_often_than_promised(rule, share):
    """The one figure a user sets, ``error``, would not be true."""
    pass_rate = rule.min_pass_rate + share * (1 - rule.min_pass_rate)
    assert give_up_probability(rule, pass_rate) <= rule.error * (1 + 1e-9)


@given(RULES)
@settings(max_examples=200, deadline=None)
def test_no_error_is_given_away_for_a_single_verified_trace(rule):
    """The rule would draw longer than its promise needs, at a cost a draw."""
    if rule.k > 1:
        return
    needed = math.log(rule.error) / math.log1p(-rule.min_pass_rate)
    if abs(needed - round(needed)) > 1e-6:  # on an integer, rounding decides
        assert rule.give_up_after == (min(math.ceil(needed), rule.max_samples),)


@given(RULES, st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_prospects_are_probabilities_and_fit_together(rule, pass_rate):
    """`plan` would print costs or shares that cannot be."""
    what = prospects(rule, pass_rate)
    assert math.isclose(what.enough + what.hopeless + what.exhausted, 1)
    assert 0 <= what.kept <= rule.k + 1e-9
    assert what.kept <= what.draws * pass_rate + 1e-9  # nobody keeps more than passes (Wald)
    assert what.draws <= rule.max_samples + 1e-9
    assert list(rule.give_up_after) == sorted(rule.give_up_after)


@given(RULES, st.floats(0, 1), st.integers(0, 2**32), st.booleans())
@settings(max_examples=300, deadline=None)
def test_no_draw_is_paid_for_after_the_end(rule, pass_rate, seed, at_once):
    """A run would buy traces for a problem that is done, or beyond the number the user allows."""
    draws, end = drawn(rule, pass_rate, random.Random(seed), at_once=at_once)
    assert draws <= rule.max_samples
    assert end != "going"
    if end == "hopeless":
        assert draws in rule.give_up_after


def test_simulated_sampling_does_what_the_arithmetic_says():
    """The exact figures and the planner that a run uses would be about two different rules."""
    rng = random.Random(0)
    for rule in (StoppingRule(1, 64, 0.1, 0.05), StoppingRule(3, 128, 0.15, 0.1), StoppingRule(2, 24, 0.1, 0.05)):
        for pass_rate in (rule.min_pass_rate, 0.4):
            exact, num_problems = prospects(rule, pass_rate), 3_000
            runs = [drawn(rule, pass_rate, rng, at_once=True) for _ in range(num_problems)]
            for end in ("enough", "hopeless", "exhausted"):
                seen = wilson(sum(state == end for _, state in runs), num_problems, confidence=0.9999)
                assert seen.low <= getattr(exact, end) <= seen.high, (rule, pass_rate, end, seen)
            mean = sum(draws for draws, _ in runs) / num_problems
            spread = math.sqrt(sum((draws - mean) ** 2 for draws, _ in runs)) / num_problems
            assert abs(mean - exact.draws) <= 4 * spread + 1e-9, (rule, pass_rate, mean, exact.draws)


def test_filling_up_after_every_answer_gives_up_no_more_often():
    """A run that does not wait for whole batches would throw away more solvable problems than promised."""
    rng, rule, num_problems = random.Random(1), StoppingRule(2, 128, 0.1, 0.05), 4_000
    exact = prospects(rule, 0.1)
    runs = [drawn(rule, 0.1, rng, at_once=False) for _ in range(num_problems)]
    seen = wilson(sum(state == "hopeless" for _, state in runs), num_problems, confidence=0.9999)
    assert seen.low <= exact.hopeless <= seen.high
    assert sum(draws for draws, _ in runs) / num_problems < 1.3 * exact.draws


def test_a_kept_trace_costs_less_than_with_a_fixed_number_of_draws():
    """Adaptive sampling would be an option that costs money: pass rates spread like Beta(1/2, 1/2), many near 0 and near 1."""
    pass_rates = [math.sin(math.pi * (i + 0.5) / 400) ** 2 for i in range(200)]  # its quantiles

    def kept_of(num_draws: int, k: int) -> float:
        """Verified traces, at most k, that a fixed number of draws leaves of a problem, on average."""
        return sum(
            min(j, k) * math.comb(num_draws, j) * p**j * (1 - p) ** (num_draws - j)
            for p in pass_rates
            for j in range(num_draws + 1)
        ) / len(pass_rates)

    for k, at_least in ((1, 3.5), (2, 2.5), (4, 1.8)):
        rule = StoppingRule(k, 32, 0.1, 0.05)
        all_of_them = [prospects(rule, p) for p in pass_rates]
        draws, kept = (sum(getattr(what, name) for what in all_of_them) / len(pass_rates) for name in ("draws", "kept"))
        fixed = next(n for n in range(1, 65) if kept_of(n, k) >= kept)  # the fixed number that leaves as many
        assert fixed / draws >= at_least, (k, fixed, draws)
