"""What the traces of a run are like, by source and by what became of them: counts that add up over batches.

A `Seen` is a trace reduced to a few small values. A Counter of them stays small however many traces there are; pass rates by
source and the histograms of lengths and of repetition are read from it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from stillhouse.pipeline.filters.repetition import repeated_share
from stillhouse.pipeline.records import DECIDED, Problem, Trace

Fate = Literal["kept", "not chosen", "not right", "filtered"]
"""What became of a trace: a training row; right, but a duplicate, contaminated or not selected; wrong or undecided; or a filter
dropped it."""
Figure = Literal["num_tokens", "repetition"]

_BINS_AN_OCTAVE = 8
_REPETITION_BINS = 50
_MAX_SHOWN_BINS = 26


class Seen(NamedTuple):
    """A trace as it is counted. ``outcome`` is "" where no verifier looked at it; bins as `length_bin` and so on give them."""

    source: str
    topic: str
    outcome: str
    fate: Fate
    num_tokens: int
    repetition: int


def seen(trace: Trace, problem: Problem, *, outcome: str, fate: Fate) -> Seen:
    """Reduce a trace, and the problem that it answers, to what is counted of it."""
    bins = _length_bin(trace.num_completion_tokens), _repetition_bin(trace.completion)
    return Seen(problem.source, problem.topic, outcome, fate, *bins)


def _length_bin(num_tokens: int) -> int:
    return math.floor(math.log2(max(1, num_tokens)) * _BINS_AN_OCTAVE)


def _repetition_bin(text: str) -> int:
    return min(_REPETITION_BINS - 1, int(repeated_share(text) * _REPETITION_BINS))


@dataclass(frozen=True, slots=True)
class SourceRate:
    """The traces of one source and topic of problems. ``num_right / num_verified`` is its pass rate: of those judged right or
    wrong, whether or not a filter dropped them."""

    source: str
    num_traces: int
    num_filtered: int
    num_verified: int
    num_right: int
    num_kept: int
    topic: str = ""

    @property
    def pass_rate(self) -> float | None:
        return self.num_right / self.num_verified if self.num_verified else None


@dataclass(frozen=True, slots=True)
class Histogram:
    """Traces by a figure and by fate.

    Args:
        edges: of the bins, rising, one more than there are bins; tokens, or a share from 0 to 1. The upper edge is outside.
        counts: by fate, one for each bin.
    """

    edges: list[float]
    counts: dict[Fate, list[int]]


def source_rates(tally: Counter[Seen]) -> list[SourceRate]:
    """One row a source and topic, by name."""
    rows: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for entry, count in tally.items():
        row = rows[entry.source, entry.topic]
        row["traces"] += count
        row["filtered"] += count * (entry.fate == "filtered")
        row["verified"] += count * (entry.outcome in DECIDED)
        row["right"] += count * (entry.outcome == "correct")
        row["kept"] += count * (entry.fate == "kept")
    columns = ("traces", "filtered", "verified", "right", "kept")
    return [SourceRate(source, *(row[name] for name in columns), topic) for (source, topic), row in sorted(rows.items())]


def histogram(tally: Counter[Seen], figure: Figure) -> Histogram:
    """The traces by length in tokens (bins of equal ratio) or by the share of repeated words (bins of equal width).

    Neighbouring bins are joined until at most 26 are left; empty bins at both ends are left out.
    """
    found = [getattr(entry, figure) for entry in tally]
    if not found:
        return Histogram([], {fate: [] for fate in get_args(Fate)})
    low, high = (min(found), max(found)) if figure == "num_tokens" else (0, max(found))
    width = 1
    while high // width - low // width + 1 > _MAX_SHOWN_BINS:
        width *= 2
    first, last = low // width, high // width
    counts = {fate: [0] * (last - first + 1) for fate in get_args(Fate)}
    for entry, count in tally.items():
        counts[entry.fate][getattr(entry, figure) // width - first] += count
    places = (place * width for place in range(first, last + 2))
    if figure == "num_tokens":
        return Histogram([2 ** (place / _BINS_AN_OCTAVE) for place in places], counts)
    return Histogram([min(1.0, place / _REPETITION_BINS) for place in places], counts)


def with_kept(tally: Counter[Seen], kept: Iterable[Seen]) -> Counter[Seen]:
    """The tally once it is known which of its right traces are kept."""
    moved = Counter(tally)
    for entry in kept:
        moved[entry] -= 1
        moved[entry._replace(fate="kept")] += 1
    return +moved
