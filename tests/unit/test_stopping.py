"""The stopping rule by hand: thresholds, batches, what a planner makes of outcomes."""

from __future__ import annotations

import math

import pytest

from stillhouse.pipeline.stopping import (
    Planner,
    StoppingRule,
    expected_draws,
    give_up_probability,
    prospects,
)

ONE = StoppingRule(k=1, max_samples=64, min_pass_rate=0.1, error=0.05)


def test_a_problem_is_given_up_after_as_many_draws_as_the_rule_says():
    """If it failed, the recipe's error would not be the error: solvable problems would be thrown away, or money would."""
    assert ONE.give_up_after == (29,)
    assert math.ceil(math.log(0.05) / math.log(0.9)) == 29
    assert ONE.state(28, 0) == "going"
    assert ONE.state(29, 0) == "hopeless"
    assert ONE.state(29, 1) == "enough"
    assert give_up_probability(ONE, 0.1) == pytest.approx(0.9**29)


def test_max_samples_comes_before_a_threshold_that_lies_beyond_it():
    """If it failed, a rule with few draws would call a problem hopeless that it has hardly tried."""
    short = StoppingRule(k=1, max_samples=16, min_pass_rate=0.1, error=0.05)
    assert short.give_up_after == (16,)
    assert short.state(16, 0) == "exhausted"
    assert give_up_probability(short, 0.1) == 0
    assert prospects(short, 0.1).exhausted == pytest.approx(0.9**16)


def test_with_some_verified_a_problem_gets_more_time():
    """If it failed, a problem that gave one of two traces would be given up as early as one that gave none."""
    two = StoppingRule(k=2, max_samples=256, min_pass_rate=0.1, error=0.05)
    none, one = two.give_up_after
    assert 29 <= none < one
    # The two thresholds share the error: together they are within it, and neither could come one draw earlier alone.
    assert give_up_probability(two, 0.1) <= 0.05
    assert two.state(none, 0) == "hopeless"
    assert two.state(none, 1) == "going"
    # Where there is no room for the second threshold, the first has the whole error.
    assert StoppingRule(k=2, max_samples=32, min_pass_rate=0.1, error=0.05).give_up_after == (29, 32)


def test_batches_grow_while_nothing_is_verified_and_never_pass_a_threshold():
    """If it failed, a hard problem would take a round a draw, or its last batch would be drawn for nothing."""
    draws, batches = 0, []
    while batch := ONE.under_way(draws, 0):
        batches.append(batch)
        draws += batch
    assert batches == [1, 2, 4, 8, 14]
    assert StoppingRule(4, 64, 0.1, 0.05).under_way(0, 0) == 4
    assert StoppingRule(4, 64, 0.1, 0.05).under_way(4, 3) == 2  # one more is needed, four of five pass
    assert StoppingRule(4, 64, 0.1, 0.05).under_way(4, 4) == 0


def test_expected_draws_by_hand():
    """If it failed, `plan` would announce another cost than the run has."""
    rule = StoppingRule(k=1, max_samples=3, min_pass_rate=0.1, error=0.05)
    # One draw; after a failure both of the others at once.
    assert expected_draws(rule, 0.5) == pytest.approx(1 + 0.5 * 2)
    assert expected_draws(rule, 1.0) == 1
    assert expected_draws(rule, 0.0) == 3
    assert prospects(rule, 0.5).kept == pytest.approx(1 - 0.5**3)


def test_an_undecided_verdict_is_a_draw_and_no_verified_trace():
    """If it failed, a problem whose verifier times out would be sampled for ever, or be taken as solved."""
    planner = Planner(ONE)
    for index in range(29):
        assert planner.state("p") == "going"
        planner.record("p", index, "undecided" if index % 2 else "wrong")
    assert planner.state("p") == "hopeless"
    assert planner.next_draws("p") == 0


def test_a_planner_goes_on_from_the_outcomes_of_an_earlier_run():
    """If it failed, a restarted run would pay for the same draws again, or stop short."""
    outcomes = [("a", 0, "wrong"), ("a", 1, "wrong"), ("b", 0, "correct"), ("a", 3, "wrong")]
    planner, resumed = Planner(ONE), Planner(ONE, reversed(outcomes))
    for outcome in [*outcomes, outcomes[0]]:  # the same outcome twice is one draw
        planner.record(*outcome)
    for problem_id in ("a", "b", "new"):
        assert planner.next_draws(problem_id) == resumed.next_draws(problem_id)
        assert planner.state(problem_id) == resumed.state(problem_id)
    assert (planner.next_draws("a"), planner.next_draws("b"), planner.next_draws("new")) == (4, 0, 1)
    assert planner.progress("a").num_draws == 3


def test_one_draw_has_one_outcome():
    """If it failed, two verdicts on one trace would count as two draws, and the money would not add up."""
    planner = Planner(ONE, [("a", 0, "wrong")])
    with pytest.raises(ValueError, match="sample 0 of problem 'a' was recorded as 'wrong' and is now 'correct'"):
        planner.record("a", 0, "correct")


@pytest.mark.parametrize(
    "arguments", [(0, 8, 0.1, 0.05), (9, 8, 0.1, 0.05), (1, 8, 0.0, 0.05), (1, 8, 1.0, 0.05), (1, 8, 0.1, 0.0)]
)
def test_a_rule_that_cannot_be_kept_is_refused(arguments):
    """If it failed, the run would start and end with a division by zero, or with nothing."""
    with pytest.raises(ValueError, match="a stopping rule needs"):
        StoppingRule(*arguments)
