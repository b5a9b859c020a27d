"""Choose which correct traces to learn from, on rows that hold no text; seeded and the same whatever the input order.

In this order: pass-rate bands choose problems, k best of N chooses among a problem's traces, caps bound the sources, and a
total is shared out over sources and topics.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from stillhouse.pipeline.records import Verdict

SELECTION_VERSION = 2
Strategy = Literal["shortest", "longest", "mixed", "random"]
Balance = Literal["proportional", "equal"]
Band = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Candidate:
    """What selection knows of a correct trace."""

    key: str
    problem_id: str
    source: str
    num_tokens: int
    sample_index: int
    topic: str = ""


def select(
    candidates: Iterable[Candidate],
    *,
    per_problem: int,
    seed: int,
    strategy: Strategy = "shortest",
    teacher_band: Band | None = None,
    teacher_pass_rates: Mapping[str, float] | None = None,
    student_band: Band | None = None,
    student_pass_rates: Mapping[str, float] | None = None,
    per_source: int | None = None,
    max_total: int | None = None,
    balance: Balance = "proportional",
) -> tuple[list[Candidate], list[Verdict]]:
    """Choose the traces to keep.

    Args:
        per_problem, strategy: see `best_of_n`.
        teacher_band, student_band: (lowest, highest) pass rate of a problem, both allowed: what the teacher always solves may
            be too easy, what the base student already solves teaches nothing.
        teacher_pass_rates, student_pass_rates: by problem id, 0 to 1; needed where the band is set.
        per_source: at most so many traces of one source; its topics take turns, and every problem's best comes before any
            problem's second.
        max_total: at most so many traces in all, shared over (source, topic) by ``balance``: ``proportional`` to what each has,
            or ``equal`` as far as each has enough.

    Returns:
        (kept, sorted by problem_id, sample_index and key; one dropping Verdict for each of the rest, by check and key).

    Raises:
        ValueError: an argument makes no sense, or a pass rate is missing.
    """
    _check_arguments(per_problem, strategy, balance, per_source, max_total)
    left = sorted(candidates, key=_place)
    verdicts: list[Verdict] = []

    def settle(check: str, refused: Mapping[str, tuple[str, str]]) -> None:
        nonlocal left
        for row in left:
            if row.key in refused:
                verdicts.append(Verdict(row.key, check, SELECTION_VERSION, False, *refused[row.key]))
        left = [row for row in left if row.key not in refused]

    for who, band, rates in (("teacher", teacher_band, teacher_pass_rates), ("student", student_band, student_pass_rates)):
        if band is not None:
            settle("pass_rate", _outside_band(left, who, band, rates))
    rank = _ranks(left, seed, strategy)
    settle("best_of_n", _not_best(left, rank, per_problem, strategy))
    if per_source is not None:
        settle("per_source", _over_cap(left, rank, per_source, seed))
    if max_total is not None and len(left) > max_total:
        settle("max_total", _over_total(left, rank, max_total, balance, seed))
    return left, verdicts


def _check_arguments(per_problem: int, strategy: str, balance: str, per_source: int | None, max_total: int | None) -> None:
    for name, value in (("per_problem", per_problem), ("per_source", per_source), ("max_total", max_total)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value, known in (("strategy", strategy, get_args(Strategy)), ("balance", balance, get_args(Balance))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _place(row: Candidate) -> tuple[str, int, str]:
    return row.problem_id, row.sample_index, row.key


def _draw(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def _outside_band(
    rows: Sequence[Candidate], who: str, band: Band, rates: Mapping[str, float] | None
) -> dict[str, tuple[str, str]]:
    low, high = band
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{who}_band must be (lowest, highest) within 0 and 1, got {band}")
    if rates is None or (missing := {row.problem_id for row in rows} - rates.keys()):
        what = "are not given" if rates is None else f"miss {len(missing)} problems, among them {min(missing)[:12]}"
        raise ValueError(f"{who}_band needs {who}_pass_rates, which {what}")
    refused = {}
    for row in rows:
        rate = rates[row.problem_id]
        if not low <= rate <= high:
            how = "too hard" if rate < low else "too easy"
            refused[row.key] = (f"{how} for the {who}", f"pass rate {rate:.2f}, wanted {low:g} to {high:g}")
    return refused


def _ranks(rows: Sequence[Candidate], seed: int, strategy: Strategy) -> dict[str, int]:
    """Each trace's place among its problem's, from 0.

    ``shortest`` and ``longest`` go by completion tokens, ``random`` draws without looking, ``mixed`` takes the shortest, the
    longest, the second shortest, and so on. The seed breaks ties.
    """
    of_problem: dict[str, list[Candidate]] = defaultdict(list)
    for row in rows:
        of_problem[row.problem_id].append(row)
    sign = {"shortest": 1, "mixed": 1, "longest": -1, "random": 0}[strategy]
    ranks = {}
    for of_one in of_problem.values():
        ordered = sorted(of_one, key=lambda row: (sign * row.num_tokens, _draw(seed, row.key)))
        if strategy == "mixed":
            ordered = [ordered[i // 2] if i % 2 == 0 else ordered[-1 - i // 2] for i in range(len(ordered))]
        ranks.update((row.key, place) for place, row in enumerate(ordered))
    return ranks


def _not_best(
    rows: Sequence[Candidate], rank: Mapping[str, int], per_problem: int, strategy: str
) -> dict[str, tuple[str, str]]:
    num_of: dict[str, int] = defaultdict(int)
    for row in rows:
        num_of[row.problem_id] += 1
    return {
        row.key: (
            "not among the k best",
            f"place {rank[row.key] + 1} of {num_of[row.problem_id]} by {strategy}, {row.num_tokens} tokens",
        )
        for row in rows
        if rank[row.key] >= per_problem
    }


def _over_cap(rows: Sequence[Candidate], rank: Mapping[str, int], cap: int, seed: int) -> dict[str, tuple[str, str]]:
    refused = {}
    for source, of_source in _grouped(rows, lambda row: row.source).items():
        turns = []
        for topic, of_topic in _grouped(of_source, lambda row: row.topic).items():
            turns += [(turn, _draw(seed, topic), row) for turn, row in enumerate(_best_first(of_topic, rank, seed))]
        turns.sort(key=lambda turn: turn[:2])
        for _, _, row in turns[cap:]:
            refused[row.key] = ("over the cap of its source", f"{len(of_source)} of {source}, at most {cap} wanted")
    return refused


def _over_total(
    rows: Sequence[Candidate], rank: Mapping[str, int], total: int, balance: str, seed: int
) -> dict[str, tuple[str, str]]:
    strata = _grouped(rows, lambda row: f"{row.source}\n{row.topic}")
    shares = _shares({name: len(of_stratum) for name, of_stratum in strata.items()}, total, balance, seed)
    refused = {}
    for name, of_stratum in strata.items():
        for row in _best_first(of_stratum, rank, seed)[shares[name] :]:
            what = f"{shares[name]} of {len(of_stratum)} from {' '.join(name.split())}, {balance}, {total} in all"
            refused[row.key] = ("over the total wanted", what)
    return refused


def _shares(sizes: Mapping[str, int], total: int, balance: str, seed: int) -> dict[str, int]:
    """How many each stratum gives: sums to ``total``, none more than it has."""
    order = sorted(sizes, key=lambda name: _draw(seed, name))
    if balance == "equal":
        shares, left = {}, total
        for i, name in enumerate(sorted(order, key=lambda name: sizes[name])):  # the small ones first: what they lack is shared
            shares[name] = min(sizes[name], left // (len(order) - i))
            left -= shares[name]
        return shares
    everything = sum(sizes.values())
    exact = {name: sizes[name] * total / everything for name in order}
    shares = {name: int(exact[name]) for name in order}
    by_remainder = sorted(order, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def _best_first(rows: Sequence[Candidate], rank: Mapping[str, int], seed: int) -> list[Candidate]:
    return sorted(rows, key=lambda row: (rank[row.key], _draw(seed, row.key)))


def _grouped(rows: Sequence[Candidate], name: Callable[[Candidate], str]) -> dict[str, list[Candidate]]:
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for row in rows:
        groups[name(row)].append(row)
    return groups
