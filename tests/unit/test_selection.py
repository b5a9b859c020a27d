"""k best of N: reproducible, whatever the order in which traces were committed."""

import random

import pytest

from stillhouse.pipeline.records import Trace
from stillhouse.pipeline.selection import best_of_n


def make_trace(problem, index, tokens):
    key = f"{problem}-{index}"
    return Trace(key, problem, "t", "r", "prompt", "c", None, None, "stop", 1, tokens, 0.6, 0.95, 64, index, 1, 0.1)


TRACES = [make_trace(f"p{p}", i, tokens) for p in range(20) for i, tokens in enumerate((30, 10, 20, 10, 40))]


def test_the_shortest_are_kept_and_the_rest_have_a_verdict():
    """Small students learn better from short correct traces; what is not chosen is still accounted for."""
    kept, verdicts = best_of_n(TRACES, per_problem=3, seed=0)
    assert [t.num_completion_tokens for t in kept[:3]] == [10, 20, 10]
    assert [t.sample_index for t in kept[:3]] == [1, 2, 3]
    assert len(kept) == 60
    assert {v.trace_key for v in verdicts} == {t.key for t in TRACES} - {t.key for t in kept}
    assert {(v.keep, v.reason, v.check) for v in verdicts} == {(False, "not among the k best", "best_of_n")}


@pytest.mark.parametrize("strategy", ["shortest", "random"])
def test_input_order_changes_nothing(strategy):
    """Ray returns traces in any order; the training set must not depend on it."""
    expected = best_of_n(TRACES, per_problem=1, seed=5, strategy=strategy)
    for shuffle_seed in range(5):
        shuffled = random.Random(shuffle_seed).sample(TRACES, len(TRACES))
        kept, verdicts = best_of_n(shuffled, per_problem=1, seed=5, strategy=strategy)
        assert (kept, sorted(v.trace_key for v in verdicts)) == (expected[0], sorted(v.trace_key for v in expected[1]))


def test_the_seed_decides_ties_and_random_draws():
    """A seed without effect would hide that a result hangs on one draw."""
    for strategy in ("shortest", "random"):
        drawn = {tuple(t.key for t in best_of_n(TRACES, per_problem=1, seed=s, strategy=strategy)[0]) for s in range(4)}
        assert len(drawn) == 4
    tokens = {t.num_completion_tokens for t in best_of_n(TRACES, per_problem=1, seed=0, strategy="random")[0]}
    assert len(tokens) > 1


def test_fewer_candidates_than_asked_for_are_all_kept():
    """A hard problem with one correct trace is the one most worth keeping."""
    kept, verdicts = best_of_n(TRACES[:5], per_problem=9, seed=0)
    assert len(kept) == 5
    assert verdicts == []
    assert best_of_n([], per_problem=1, seed=0) == ([], [])


def test_nonsense_is_refused():
    """per_problem=0 would keep nothing and say nothing."""
    with pytest.raises(ValueError, match="per_problem must be at least 1, got 0"):
        best_of_n(TRACES, per_problem=0, seed=0)
    with pytest.raises(ValueError, match="'longest'"):
        best_of_n(TRACES, per_problem=1, seed=0, strategy="longest")
