"""The intervals that decide whether a model goes out, against published worked examples."""

import random
from statistics import NormalDist

import pytest

from stillhouse.pipeline.statistics import (
    Interval,
    clustered,
    items_to_decide,
    mcnemar_exact,
    newcombe_difference,
    paired_difference,
    wilson,
)


@pytest.mark.parametrize(
    ("num_correct", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_newcombes_table(num_correct, n, low, high):
    """A user would read a wrong accuracy interval. Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3."""
    interval = wilson(num_correct, n)
    assert (round(interval.low, 4), round(interval.high, 4), interval.n) == (low, high, n)
    assert interval.value == num_correct / n


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((6, 7, 2, 7), 0.0582, 0.8062),
        ((5, 56, 0, 29), -0.0381, 0.1926),
        ((0, 10, 0, 20), -0.1611, 0.2775),
        ((10, 10, 0, 20), 0.6791, 1.0000),
    ],
)
def test_difference_of_independent_rates_is_newcombes_table(counts, low, high):
    """Two runs on different problems would be compared wrongly. Newcombe, Stat. in Medicine 17 (1998) 873, method 10."""
    interval = newcombe_difference(*counts)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


def paired(both, only_a, only_b, neither):
    pairs = [(1, 1)] * both + [(1, 0)] * only_a + [(0, 1)] * only_b + [(0, 0)] * neither
    return {str(i): a for i, (a, _) in enumerate(pairs)}, {str(i): b for i, (_, b) in enumerate(pairs)}


def test_paired_difference_is_the_published_interval():
    """The gate would judge a drop from the student wrongly.

    Cavo et al. (2012), 161 patients, as worked in Fagerland, Lydersen and Laake, Statistical Analysis of Contingency
    Tables (2017), chapter 8; the authors' R package contingencytables prints the same −0.1195 to −0.0032.
    """
    interval = paired_difference(*paired(59, 6, 16, 80))
    assert (round(interval.value, 4), round(interval.low, 4), round(interval.high, 4)) == (-0.0621, -0.1195, -0.0032)
    assert interval.n == 161


def test_identical_models_get_a_narrow_interval_that_is_not_nothing():
    """An A/A comparison would claim certainty from two problems, or would not pass with four hundred."""
    two, many = paired_difference(*paired(1, 0, 0, 1)), paired_difference(*paired(280, 0, 0, 120))
    assert two.high > 0.5
    assert (many.low, many.value, many.high) == (pytest.approx(-0.0069, abs=1e-4), 0.0, pytest.approx(0.0069, abs=1e-4))


def test_paired_difference_covers_the_truth_as_often_as_it_says():
    """A 95 % interval that holds in 85 % of runs would let bad checkpoints out; 500 runs with 10 % discordant pairs."""
    rng, covered = random.Random(0), 0
    for _ in range(500):
        draws = rng.choices(((1, 1), (1, 0), (0, 1), (0, 0)), weights=(0.62, 0.03, 0.07, 0.28), k=300)
        interval = paired_difference({i: a for i, (a, _) in enumerate(draws)}, {i: b for i, (_, b) in enumerate(draws)})
        covered += interval.low <= -0.04 <= interval.high
    # Binomial(500, 0.95) lies in 461 … 487 with probability 0.99; the two pseudo-items make it a little wider than that.
    assert 461 <= covered <= 495


def test_paired_difference_refuses_different_problems():
    """Two models measured on different problems would be compared as if paired."""
    with pytest.raises(ValueError, match="1 are only in a, 0 only in b"):
        paired_difference({"x": 1, "y": 0}, {"x": 1})
    with pytest.raises(ValueError, match="at least one item"):
        paired_difference({}, {})
    with pytest.raises(ValueError, match="'y' has the score nan"):
        paired_difference({"x": 1, "y": float("nan")}, {"x": 1, "y": 0})


def test_one_sample_an_item_is_wilson():
    """The same answers would get two different intervals, by which function was called."""
    items = {str(i): [i < 81] for i in range(263)}
    assert clustered(items).low == pytest.approx(wilson(81, 263).low, abs=1e-12)
    assert clustered(items).high == pytest.approx(wilson(81, 263).high, abs=1e-12)


def test_samples_of_one_item_are_not_independent():
    """Asking each of 50 problems 20 times would look as sure as asking 1,000 problems."""
    together = clustered({str(i): [i < 35] * 20 for i in range(50)})
    apart = clustered({str(i): [(i * 20 + k) % 10 < 7 for k in range(20)] for i in range(50)})
    assert together.n == apart.n == 50
    assert (together.low, together.high) == (pytest.approx(wilson(35, 50).low), pytest.approx(wilson(35, 50).high))
    assert (apart.low, apart.high) == (pytest.approx(wilson(700, 1000).low), pytest.approx(wilson(700, 1000).high))


def test_clustered_mean_weighs_items_alike_and_needs_samples():
    """An item that happened to be sampled more often would count more."""
    assert clustered({"a": [True] * 9, "b": [False]}).value == 0.5
    assert clustered({"a": [True] * 9, "b": [True]}).low == pytest.approx(wilson(2, 2).low)
    with pytest.raises(ValueError, match="1 items have none, the first is 'b'"):
        clustered({"a": [True], "b": []})
    with pytest.raises(ValueError, match="at least one item"):
        clustered({})


def test_rates_out_of_range_are_refused():
    """A counting error upstream would come out as an accuracy of 110 %."""
    for num_correct, n in ((11, 10), (-1, 10), (0, 0), (float("nan"), 3)):
        with pytest.raises(ValueError, match="0 <= num_correct <= n"):
            wilson(num_correct, n)
    with pytest.raises(ValueError, match="confidence lies between 0 and 1"):
        wilson(1, 2, confidence=95)


def test_exact_mcnemar_is_the_published_value():
    """The p value beside a difference would be wrong.

    1 against 7 discordant pairs (Bentur et al. 2009): 0.0703 by Fagerland, Lydersen and Laake, BMC Medical Research
    Methodology 13 (2013) 91.
    """
    assert round(mcnemar_exact(1, 7), 4) == 0.0703
    assert mcnemar_exact(7, 1) == mcnemar_exact(1, 7)
    assert mcnemar_exact(0, 0) == mcnemar_exact(5, 5) == 1.0
    assert 0 < mcnemar_exact(900, 1300) < 1e-15  # integers throughout: no overflow, no rounding to nothing


def test_items_to_decide_does_decide():
    """INCONCLUSIVE would send a user to label a number of problems that still decides nothing."""
    floor, interval = 0.60, wilson(190, 300)
    needed = items_to_decide(interval, floor)
    assert interval.low < floor < interval.value
    assert needed > 300
    assert wilson(needed * 190 / 300, needed).low == pytest.approx(floor, abs=0.002)
    # The score test's own answer: z² · f(1−f) / (p−f)².
    assert needed == pytest.approx(NormalDist().inv_cdf(0.975) ** 2 * 0.24 / (190 / 300 - floor) ** 2, rel=0.05)


def test_items_to_decide_at_the_edges():
    """A decided question would be reported as open, or a tie as decidable."""
    assert items_to_decide(Interval(0.5, 0.4, 0.6, 100), 0.5) is None
    assert items_to_decide(Interval(0.5, 0.4, 0.6, 100), 0.3) == 100
    assert items_to_decide(Interval(0.5, 0.4, 0.6, 100), 0.55) == 400
    assert items_to_decide(Interval(0.5, 0.4, 0.6, 100), 0.45) == 400
