"""Adaptive sampling: draw completions of a problem until k are verified or it looks hopeless, instead of a fixed number.

The rule has one threshold a number of verified traces: with c < k verified after ``n_c`` draws the problem is given up.
``n_c`` is the least n at which a problem of pass rate ``min_pass_rate`` has c or fewer verified with probability at most α,

    n_c = min { n : P(Binomial(n, min_pass_rate) <= c) <= α },        n_0 = ceil(log α / log(1 - min_pass_rate)),

and α is the largest one, at most ``error``, for which the whole rule keeps its promise:

    P(given up | pass rate >= min_pass_rate) <= error.

The thresholds of several c add up, so α lies between error / k and ``error``; it is ``error`` itself for k = 1 and wherever
``max_samples`` leaves no room for a second threshold. The promise needs checking at ``min_pass_rate`` alone: a problem that
passes more often reaches every threshold less often (couple the draws). A problem that comes to ``max_samples`` with fewer
than k is exhausted, not given up; the promise says nothing of that, `prospects` does.

Draws are taken in batches that grow while nothing is verified (1, 2, 4, 8, … for k = 1), so that a hard problem takes
about log2(n_0) rounds rather than n_0, and no batch reaches beyond a threshold. So a problem is given up when its first n_c
samples, by index, had c verified, in whatever order their answers came and however they were batched: which answers come
first (short ones, and they are right more often) cannot bias it. What batches do cost is draws beyond the k-th verified
one; `prospects` counts them.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from stillhouse.pipeline.records import Outcome

State = Literal["going", "enough", "hopeless", "exhausted"]


@dataclass(frozen=True, slots=True)
class StoppingRule:
    """When a problem has been sampled enough.

    Args:
        k: verified traces that are enough.
        max_samples: draws at most.
        min_pass_rate: a problem that passes at least this often is given up with probability ``error`` at most.
        error: see min_pass_rate.

    Raises:
        ValueError: k is under 1 or above max_samples, or a rate is not between 0 and 1.
    """

    k: int
    max_samples: int
    min_pass_rate: float
    error: float

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.max_samples or not 0 < self.min_pass_rate < 1 or not 0 < self.error < 1:
            raise ValueError(
                f"a stopping rule needs 1 <= k <= max_samples, 0 < min_pass_rate < 1 and 0 < error < 1; got {self}"
            )

    @property
    def give_up_after(self) -> tuple[int, ...]:
        """For each number of verified traces below k, the draws after which the problem is given up.

        Those at or beyond ``max_samples`` are never reached; each is given as ``max_samples``.
        """
        return _thresholds(self)

    def state(self, num_draws: int, num_verified: int) -> State:
        """Where a problem stands, whatever the order of its draws."""
        if num_verified >= self.k:
            return "enough"
        if num_draws >= self.max_samples:
            return "exhausted"
        return "hopeless" if num_draws >= self.give_up_after[num_verified] else "going"

    def under_way(self, num_draws: int, num_verified: int) -> int:
        """How many draws the next batch has; 0 when the problem is done.

        As many as are likely to give what is still needed, if draws pass at the rate seen so far (with one more pass
        added, so that nothing seen yet means every draw passes); no more than are left before the next threshold.
        """
        if self.state(num_draws, num_verified) != "going":
            return 0
        needed = self.k - num_verified
        likely = -(-needed * (num_draws + 1) // (num_verified + 1))
        return min(likely, self.give_up_after[num_verified] - num_draws)


@dataclass(frozen=True, slots=True)
class Prospects:
    """What a rule does to problems of one pass rate, exactly, where each batch is waited for before the next is drawn.

    Args:
        draws: expected draws a problem, with those that turn out to be more than needed.
        kept: expected verified traces a problem, at most k.
        enough, hopeless, exhausted: how problems end; the three add up to 1.
    """

    draws: float
    kept: float
    enough: float
    hopeless: float
    exhausted: float


@functools.lru_cache(maxsize=4096)
def prospects(rule: StoppingRule, pass_rate: float) -> Prospects:
    """Follow a rule over all outcomes for one pass rate.

    Raises:
        ValueError: the pass rate is not between 0 and 1.
    """
    if not 0 <= pass_rate <= 1:
        raise ValueError(f"a pass rate lies between 0 and 1; got {pass_rate}")
    # Probability of being at (draws, verified); every step adds draws, so one sweep over draws sees each state once.
    at: list[dict[int, float]] = [defaultdict(float) for _ in range(rule.max_samples + 1)]
    at[0][0] = 1.0
    draws = kept = 0.0
    ends: dict[str, float] = defaultdict(float)
    for num_draws, states in enumerate(at):
        for num_verified, probability in states.items():
            batch = rule.under_way(num_draws, num_verified)
            if batch == 0:
                ends[rule.state(num_draws, num_verified)] += probability
                draws += probability * num_draws
                kept += probability * min(num_verified, rule.k)
                continue
            for passed, share in enumerate(_binomial(batch, pass_rate)):
                at[num_draws + batch][num_verified + passed] += probability * share
    return Prospects(draws, kept, ends["enough"], ends["hopeless"], ends["exhausted"])


def expected_draws(rule: StoppingRule, pass_rate: float) -> float:
    """Expected draws for a problem of this pass rate; see `Prospects`."""
    return prospects(rule, pass_rate).draws


def give_up_probability(rule: StoppingRule, pass_rate: float) -> float:
    """Probability that a problem of this pass rate is given up: at most ``error`` wherever it is min_pass_rate or more."""
    return prospects(rule, pass_rate).hopeless


@dataclass
class ProblemProgress:
    """The outcomes of one problem so far, by sample index."""

    outcomes: dict[int, Outcome] = field(default_factory=dict)

    @property
    def num_draws(self) -> int:
        """All outcomes: an undecided one has been paid for like any other."""
        return len(self.outcomes)

    @property
    def num_verified(self) -> int:
        return sum(outcome == "correct" for outcome in self.outcomes.values())


class Planner:
    """Says for each problem how many draws to have under way, from the outcomes recorded so far and from nothing else.

    What it answers depends on how many outcomes there are of which kind, not on their order, so a run that was killed
    goes on exactly where it was when its outcomes are recorded again.

    Args:
        rule: the same for all problems.
        outcomes: (problem_id, sample_index, outcome) of an earlier run.
    """

    def __init__(self, rule: StoppingRule, outcomes: Iterable[tuple[str, int, Outcome]] = ()):
        self.rule = rule
        self._progress: dict[str, ProblemProgress] = defaultdict(ProblemProgress)
        for problem_id, sample_index, outcome in outcomes:
            self.record(problem_id, sample_index, outcome)

    def record(self, problem_id: str, sample_index: int, outcome: Outcome) -> None:
        """Note what became of one draw; noting the same again changes nothing.

        Args:
            outcome: ``correct`` for a trace that was verified and kept; a draw that a filter dropped is ``wrong``.

        Raises:
            ValueError: the draw has another outcome already.
        """
        outcomes = self._progress[problem_id].outcomes
        if outcomes.setdefault(sample_index, outcome) != outcome:
            raise ValueError(
                f"sample {sample_index} of problem {problem_id!r} was recorded as {outcomes[sample_index]!r} and is now "
                f"{outcome!r}; one draw has one outcome"
            )

    def next_draws(self, problem_id: str) -> int:
        """How many draws of this problem to have under way; 0 when it is done.

        Asked when none is under way any more, it costs what `prospects` counts. Asked after every answer, to fill up, it
        keeps the promise and waits less; it pays for up to a fifth more draws (on problems that seldom pass) where answers
        come in any order, and for fewer where right ones come first.
        """
        progress = self.progress(problem_id)
        return self.rule.under_way(progress.num_draws, progress.num_verified)

    def state(self, problem_id: str) -> State:
        """Whether the problem is going, has enough, looks hopeless or is exhausted."""
        progress = self.progress(problem_id)
        return self.rule.state(progress.num_draws, progress.num_verified)

    def progress(self, problem_id: str) -> ProblemProgress:
        """The problem's outcomes so far; empty for one without any."""
        return self._progress.get(problem_id) or ProblemProgress()


def _binomial(n: int, p: float) -> list[float]:
    """P(Binomial(n, p) = j) for j = 0 … n."""
    return [math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(n + 1)]


@functools.lru_cache(maxsize=4096)
def _thresholds(rule: StoppingRule) -> tuple[int, ...]:
    """The thresholds for the largest α that keeps the promise."""
    tails = _tails(rule)
    # Thresholds move only where α passes one of the tails, so those are all there is to try.
    candidates = sorted({tail for row in tails for tail in row if tail <= rule.error} | {rule.error}, reverse=True)
    low, high = 0, len(candidates) - 1  # a smaller α never gives up more often, so the largest good one is found by halving
    while low < high:
        middle = (low + high) // 2
        if _given_up(rule, _thresholds_at(rule, tails, candidates[middle])) <= rule.error:
            high = middle
        else:
            low = middle + 1
    return _thresholds_at(rule, tails, candidates[low])


def _tails(rule: StoppingRule) -> list[list[float]]:
    """P(Binomial(n, min_pass_rate) <= c): a row for each c < k, an entry for each n from 0 to max_samples - 1."""
    rows: list[list[float]] = [[] for _ in range(rule.k)]
    for n in range(rule.max_samples):
        cumulative = 0.0
        terms = _binomial(n, rule.min_pass_rate)
        for c in range(rule.k):
            cumulative += terms[c] if c <= n else 0.0
            rows[c].append(cumulative)
    return rows


def _thresholds_at(rule: StoppingRule, tails: list[list[float]], alpha: float) -> tuple[int, ...]:
    return tuple(next((n for n, tail in enumerate(row) if tail <= alpha), rule.max_samples) for row in tails)


def _given_up(rule: StoppingRule, thresholds: tuple[int, ...]) -> float:
    """P(given up | min_pass_rate) with these thresholds, one draw at a time."""
    p, at, given_up = rule.min_pass_rate, {0: 1.0}, 0.0
    for num_draws in range(1, rule.max_samples):
        moved: dict[int, float] = defaultdict(float)
        for num_verified, probability in at.items():
            moved[num_verified] += probability * (1 - p)
            if num_verified + 1 < rule.k:
                moved[num_verified + 1] += probability * p
        given_up += sum(moved.pop(c) for c in list(moved) if num_draws >= thresholds[c])
        at = moved
    return given_up
