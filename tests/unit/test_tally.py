"""What is counted of a run's traces: it must add up over batches, and the bins must hold what they say."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from stillhouse.pipeline.filters.repetition import repeated_share
from stillhouse.pipeline.report_filtering import FATES, bar_chart
from stillhouse.pipeline.tally import Seen, histogram, seen, source_rates, with_kept
from tests.unit.test_funnel import TRAIN, make_trace, worked

GOOD = make_trace(TRAIN[0], 0, worked(TRAIN[0]))


def counted(*lengths, source="a", topic="", outcome="correct", fate="kept", text="one two"):
    traces = (replace(GOOD, num_completion_tokens=length, completion=text) for length in lengths)
    problem = replace(TRAIN[0], source=source, topic=topic)
    return Counter(seen(trace, problem, outcome=outcome, fate=fate) for trace in traces)


@pytest.mark.parametrize("lengths", [(1,), (1, 2, 3), (5, 900, 30_000), tuple(range(1, 3_000, 7))])
def test_every_trace_stands_in_the_bin_of_its_length(lengths):
    """The histogram would show the teacher's traces shorter or longer than they are."""
    found = histogram(counted(*lengths), "num_tokens")
    assert found.edges == sorted(set(found.edges))
    assert len(found.edges) - 1 <= 26
    for low, high, count in zip(found.edges, found.edges[1:], found.counts["kept"]):
        assert count == sum(low <= length < high for length in lengths)


def test_batches_add_up():
    """A run of many batches would be counted otherwise than the same traces in one."""
    whole = counted(10, 20, 30) + counted(40, source="b", outcome="wrong", fate="not right")
    assert counted(10) + counted(20, 30) + counted(40, source="b", outcome="wrong", fate="not right") == whole


def test_pass_rates_by_source_take_what_was_verified_and_nothing_else():
    """A filtered trace that nobody verified would count as wrong; one that was verified, and right, would not be seen."""
    tally = counted(10, 10, 10) + counted(10, 10, outcome="wrong", fate="not right")
    tally += counted(10, outcome="", fate="filtered") + counted(10, fate="filtered") + counted(10, source="b", outcome="")
    tally += counted(10, 10, source="b", topic="t")
    a, b, topic = source_rates(tally)
    assert (topic.source, topic.topic, topic.num_traces) == ("b", "t", 2)
    assert (a.source, a.num_traces, a.num_filtered, a.num_verified, a.num_right, a.num_kept) == ("a", 7, 2, 6, 4, 3)
    assert a.pass_rate == pytest.approx(4 / 6)
    assert (b.source, b.pass_rate) == ("b", None)


def test_what_nobody_could_decide_is_neither_right_nor_wrong():
    """A sandbox that was down for an hour would make a source look hard."""
    (rate,) = source_rates(counted(10) + counted(10, 10, 10, outcome="undecided", fate="not right"))
    assert (rate.num_traces, rate.num_verified, rate.pass_rate) == (4, 1, 1.0)


def test_kept_traces_move_and_none_is_counted_twice():
    """The bars of one trace would stand on each other twice, as kept and as not chosen."""
    tally = counted(10, 10, 10, fate="not chosen")
    (entry,) = tally
    moved = with_kept(tally, [entry])
    assert moved == Counter({entry: 2, entry._replace(fate="kept"): 1})
    assert with_kept(tally, [entry] * 3).total() == 3
    assert entry not in with_kept(tally, [entry] * 3)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("only seven words stand in this one", 0.0),
        (" ".join(map(str, range(100))), 0.0),
        (" ".join(map(str, range(10))) + " " + " ".join(map(str, range(10))), 3 / 13),
        ("again " * 108, 100 / 101),
    ],
)
def test_repetition_is_the_share_of_runs_that_stood_there_before(text, share):
    """A teacher that goes in circles would look like one that does not."""
    assert repeated_share(text) == pytest.approx(share)
    (entry,) = counted(10, text=text)
    found = histogram(Counter([entry]), "repetition")
    low, high = next(edges for edges, count in zip(zip(found.edges, found.edges[1:]), found.counts["kept"]) if count)
    assert low <= share < high or share > 0.98


def test_bars_are_stacked_without_gaps_and_reach_the_total():
    """A bar would hide another, or the axis would not say how many traces there are."""
    tally = counted(10, 10, 11, 500) + counted(10, outcome="wrong", fate="not right") + counted(10, outcome="", fate="filtered")
    chart = bar_chart(histogram(tally, "num_tokens"), str)
    first = [bar for bar in chart["bars"] if bar["x"] == 0]
    assert [bar["colour"] for bar in first] == [FATES[fate][0] for fate in ("kept", "not right", "filtered")]
    assert first[0]["y"] + first[0]["height"] == pytest.approx(100)
    for below, above in itertools.pairwise(first):
        assert above["y"] + above["height"] == pytest.approx(below["y"])
    assert chart["num_traces"] == 6
    assert bar_chart(histogram(Counter[Seen](), "num_tokens"), str) is None
