"""Short runs of the harnesses that measure the math verifier; the long ones are `python -m tests.harness.<name>`."""

import pytest

from tests.harness import hostile, perturbed, verdict_speed


def test_no_perturbed_answer_of_a_sample_is_accepted():
    """A verifier that accepts wrong answers teaches them."""
    report = perturbed.run(num=1_500, seed=11)
    assert report["num_negatives"] >= 1_500
    assert report["num_kinds_of_negatives"] >= 40
    assert report["mistakes"] == []


def test_perturbed_cases_do_not_depend_on_anything_but_the_seed():
    """Two runs could otherwise not be compared."""
    assert perturbed.cases(300, seed=5) == perturbed.cases(300, seed=5)
    assert perturbed.cases(300, seed=5) != perturbed.cases(300, seed=6)


@pytest.mark.slow
def test_no_hostile_answer_of_a_sample_hangs_executes_or_is_accepted():
    """One such answer in a data set would stall the stage, run code, or be learnt."""
    report = hostile.run(deadline_s=1.0, answers_of=slice(None, None, 4))
    assert report["num_answers"] >= 30
    assert (report["accepted"], report["executed"], report["next_item_spoiled"]) == ([], False, [])
    assert report["undecided"] > 0  # some did hang, and were killed


def test_the_speed_harness_states_the_slow_share():
    """A rate without the share that left the fast path says nothing about the next data set."""
    report = verdict_speed.run(num_rounds=1)
    assert report["num_rows"] == 530
    assert 0 < report["num_slow"] < 0.05 * report["num_rows"]
    assert report["verdicts_per_s"] > 0
