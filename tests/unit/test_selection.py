"""Selection: reproducible, whatever the order in which traces were committed, and with a reason for each that is left out."""

import random
from collections import Counter

import pytest

from stillhouse.pipeline.selection import Candidate, select


def candidate(problem, index, tokens, source="s", topic=""):
    return Candidate(f"{problem}-{index}", problem, source, tokens, index, topic)


ROWS = [candidate(f"p{p:02}", i, tokens) for p in range(20) for i, tokens in enumerate((30, 10, 20, 10, 40))]


def test_the_shortest_are_kept_and_the_rest_have_a_verdict():
    """Small students learn better from short correct traces; what is not chosen is still accounted for."""
    kept, verdicts = select(ROWS, per_problem=3, seed=0)
    assert [row.num_tokens for row in kept[:3]] == [10, 20, 10]
    assert [row.sample_index for row in kept[:3]] == [1, 2, 3]
    assert len(kept) == 60
    assert {v.trace_key for v in verdicts} == {row.key for row in ROWS} - {row.key for row in kept}
    assert {(v.keep, v.reason, v.check) for v in verdicts} == {(False, "not among the k best", "best_of_n")}


@pytest.mark.parametrize(
    ("strategy", "expected"), [("shortest", [10, 10]), ("longest", [30, 40]), ("mixed", [10, 40]), ("mixed_3", [10, 10, 40])]
)
def test_length_strategies(strategy, expected):
    """A recipe that asks for short and long solutions must not get the short ones alone."""
    name, _, k = strategy.partition("_")
    kept, _ = select(ROWS[:5], per_problem=int(k or 2), seed=1, strategy=name)
    assert sorted(row.num_tokens for row in kept) == expected


@pytest.mark.parametrize("strategy", ["shortest", "random", "mixed"])
def test_input_order_changes_nothing(strategy):
    """Ray returns traces in any order; the training set must not depend on it."""
    settings = {"per_problem": 2, "seed": 5, "strategy": strategy, "per_source": 30, "max_total": 17, "balance": "equal"}
    expected = select(ROWS, **settings)
    assert len(expected[0]) == 17
    for shuffle_seed in range(5):
        assert select(random.Random(shuffle_seed).sample(ROWS, len(ROWS)), **settings) == expected


def test_the_seed_decides_ties_and_random_draws():
    """A seed without effect would hide that a result hangs on one draw."""
    for strategy in ("shortest", "random"):
        drawn = {tuple(row.key for row in select(ROWS, per_problem=1, seed=s, strategy=strategy)[0]) for s in range(4)}
        assert len(drawn) == 4


def test_fewer_candidates_than_asked_for_are_all_kept():
    """A hard problem with one correct trace is the one most worth keeping."""
    assert select(ROWS[:5], per_problem=9, seed=0, per_source=9, max_total=9) == (ROWS[:5], [])
    assert select([], per_problem=1, seed=0, per_source=1, max_total=1) == ([], [])


def test_pass_rate_bands_choose_problems():
    """What the base student solves already teaches nothing; what the teacher solves once in a hundred may be luck."""
    rates = {f"p{p:02}": p / 20 for p in range(20)}
    kept, verdicts = select(ROWS, per_problem=5, seed=0, teacher_band=(0.25, 0.75), teacher_pass_rates=rates)
    assert {row.problem_id for row in kept} == {f"p{p:02}" for p in range(5, 16)}
    assert Counter(v.reason for v in verdicts) == {"too hard for the teacher": 25, "too easy for the teacher": 20}
    kept, verdicts = select(ROWS, per_problem=5, seed=0, student_band=(0, 0.5), student_pass_rates=rates)
    assert {v.reason for v in verdicts} == {"too easy for the student"}
    assert {row.problem_id for row in kept} == {f"p{p:02}" for p in range(11)}
    with pytest.raises(ValueError, match="miss 19 problems"):
        select(ROWS, per_problem=1, seed=0, student_band=(0, 1), student_pass_rates={"p00": 1.0})


def test_a_source_is_capped_with_its_problems_and_topics_taking_turns():
    """A cap that takes all traces of a few problems wastes the breadth of the source."""
    rows = [candidate(f"{t}{p}", i, 10 + i, "big", t) for t in ("algebra", "sums") for p in range(10) for i in range(3)]
    rows += [candidate(f"x{p}", 0, 10, "small") for p in range(4)]
    kept, verdicts = select(rows, per_problem=3, seed=2, per_source=12)
    assert Counter(row.source for row in kept) == {"big": 12, "small": 4}
    assert Counter(row.topic for row in kept if row.source == "big") == {"algebra": 6, "sums": 6}
    assert len({row.problem_id for row in kept if row.source == "big"}) == 12
    assert {v.reason for v in verdicts} == {"over the cap of its source"}


def test_a_total_is_shared_over_sources():
    """Cut at random, a small source may be gone; cut by its balance, it is there in the share that was asked for."""
    sizes = {"a": 60, "b": 30, "c": 10}
    rows = [candidate(f"{name}{p}", 0, 10, name) for name, size in sizes.items() for p in range(size)]
    for total in (1, 7, 50, 99):
        proportional, _ = select(rows, per_problem=1, seed=0, max_total=total)
        counts = Counter(row.source for row in proportional)
        assert counts.total() == total
        assert all(abs(counts[name] - size * total / 100) < 1 for name, size in sizes.items())
    equal, verdicts = select(rows, per_problem=1, seed=0, max_total=50, balance="equal")
    assert Counter(row.source for row in equal) == {"a": 20, "b": 20, "c": 10}
    assert len(verdicts) == 50
    assert verdicts[0].evidence.endswith("equal, 50 in all")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"per_problem": 0}, "per_problem must be at least 1, got 0"),
        ({"per_source": 0}, "per_source must be at least 1"),
        ({"strategy": "fewest"}, "'fewest'"),
        ({"balance": "fair"}, "'fair'"),
        ({"teacher_band": (0.8, 0.2), "teacher_pass_rates": {}}, "within 0 and 1"),
        ({"teacher_band": (0.2, 0.8)}, "teacher_pass_rates, which are not given"),
    ],
)
def test_nonsense_is_refused(changes, expected):
    """per_problem=0 would keep nothing and say nothing."""
    with pytest.raises(ValueError, match=expected):
        select(ROWS, **({"per_problem": 1, "seed": 0} | changes))
