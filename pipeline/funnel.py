"""From all traces to those worth learning from: every stage in order, every drop with its reason.

`survey_batch` looks at traces, batch by batch, and can run as tasks; what it gives back of a trace is a verdict and, of those
that pass, a few hundred bytes. `settle` decides what takes knowledge of all of them, on those bytes: duplicates, selection and
the counts. `filter_traces` does both in one process.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stillhouse.pipeline.decontamination import DECONTAMINATION_VERSION, Decontaminator
from stillhouse.pipeline.dedup import (
    NEAR_THRESHOLD,
    Duplicate,
    DuplicateCluster,
    clusters,
    exact_duplicates,
    group_numbers,
    near_duplicate_problems,
    near_duplicates,
    normalized_text,
    text_digest,
)
from stillhouse.pipeline.filters.drop import Drop
from stillhouse.pipeline.filters.judging import judge_batch
from stillhouse.pipeline.filters.rates import FilterRate
from stillhouse.pipeline.filters.settings import FilterSetting, Mode, default_filters, needs_percentiles, with_percentiles
from stillhouse.pipeline.overlap import minhash
from stillhouse.pipeline.records import DECIDED, Problem, Trace, Verdict
from stillhouse.pipeline.selection import SELECTION_VERSION, Candidate, Strategy, select
from stillhouse.pipeline.tally import Fate, Seen, seen, with_kept

STAGES = ("format", "verification", "dedup", "decontamination", "selection")
_BATCH = 256


@dataclass(frozen=True, slots=True)
class FunnelRow:
    """How many traces a stage dropped for one reason, of how many that reached it; reason "" where it dropped none."""

    stage: str
    reason: str
    num_in: int
    num_dropped: int


@dataclass(frozen=True)
class Survey:
    """What `survey_batch` found: all verdicts on its traces, and the small rows that `settle` needs.

    Args:
        dropped: (stage, reason) of the traces that fell out, counted.
        num_samples: traces of each problem, whatever became of them.
        num_outcomes: the same by their verifier's outcome, also of those that a filter dropped.
        tally: all of them as they are counted; a right one as not chosen.
        candidates: the right ones; ``seen``, ``digests``, ``sketches`` and ``contaminated`` hold one entry for each.
    """

    verdicts: list[Verdict]
    dropped: Counter[tuple[str, str]]
    num_samples: Counter[str]
    num_outcomes: dict[str, Counter[str]]
    tally: Counter[Seen]
    candidates: list[Candidate]
    seen: list[Seen]
    digests: list[bytes]
    sketches: minhash.Sketches
    contaminated: list[Drop | None]


@dataclass(frozen=True)
class Settled:
    """What is kept, the verdicts of the stages that look at all traces (a keeping one with check ``selected`` for each kept),
    the funnel, who stands for whom among duplicates, what each check of these stages did, and all traces as counted."""

    kept: list[Candidate]
    verdicts: list[Verdict]
    funnel: list[FunnelRow]
    clusters: list[DuplicateCluster]
    rates: list[FilterRate]
    tally: Counter[Seen]


@dataclass(frozen=True, slots=True)
class FilterResult:
    """What is kept, what was said of each trace, the counts, and the duplicates by the trace that stands for them.

    ``verdicts`` holds one per trace and stage that had something to say: every verification (with its outcome), every drop,
    shadow verdicts, and a keeping one with check ``selected`` for each trace in ``kept``.
    """

    kept: list[Trace]
    verdicts: list[Verdict]
    funnel: list[FunnelRow]
    clusters: list[DuplicateCluster]


def survey_batch(
    problems_by_id: Mapping[str, Problem],
    traces: Sequence[Trace],
    settings: Sequence[FilterSetting],
    decontaminator: Decontaminator,
    *,
    near_threshold: float = NEAR_THRESHOLD,
    verify_dropped: bool = True,
) -> Survey:
    """Filter, verify, sketch and decontaminate a batch of traces with different keys.

    ``verify_dropped`` verifies what a filter dropped as well: without it nobody knows what the filter costs in right answers.

    Raises:
        ValueError, RecipeError: as `stillhouse.pipeline.filters.judging.judge_batch`.
    """
    verdicts = judge_batch(problems_by_id, traces, settings, verify_dropped=verify_dropped)
    deciding = {verdict.trace_key: verdict for verdict in verdicts if not verdict.shadow}
    dropped: Counter[tuple[str, str]] = Counter()
    for verdict in deciding.values():
        if not verdict.keep:  # a verifier's reasons quote the item, so its outcome is counted
            dropped["verification" if verdict.outcome else "format", verdict.outcome or verdict.reason] += 1
    outcomes = {verdict.trace_key: verdict.outcome for verdict in verdicts if verdict.outcome}

    def as_counted(trace: Trace) -> Seen:
        verdict = deciding[trace.key]
        fate: Fate = "not chosen" if verdict.keep else "not right" if verdict.outcome else "filtered"
        return seen(trace, problems_by_id[trace.problem_id], outcome=outcomes.get(trace.key, ""), fate=fate)

    counted = {trace.key: as_counted(trace) for trace in traces}
    correct = [trace for trace in traces if deciding[trace.key].keep]
    texts = [normalized_text(trace.completion) for trace in correct]
    groups = group_numbers([trace.problem_id for trace in correct])
    return Survey(
        verdicts=verdicts,
        dropped=dropped,
        num_samples=Counter(trace.problem_id for trace in traces),
        num_outcomes={
            outcome: Counter(trace.problem_id for trace in traces if outcomes.get(trace.key) == outcome) for outcome in DECIDED
        },
        tally=Counter(counted.values()),
        seen=[counted[trace.key] for trace in correct],
        candidates=[_candidate(trace, problems_by_id[trace.problem_id]) for trace in correct],
        digests=[text_digest(text, trace.problem_id) for text, trace in zip(texts, correct)],
        sketches=minhash.sketches(texts, groups, threshold=near_threshold),
        contaminated=decontaminator.check_batch([(problems_by_id[t.problem_id].prompt, t.completion) for t in correct]),
    )


def settle(
    surveys: Iterable[Survey],
    problems_by_id: Mapping[str, Problem],
    *,
    near_dedup: Mode = "shadow",
    prompt_dedup: Mode = "shadow",
    decontaminate: Mode = "drop",
    near_threshold: float = NEAR_THRESHOLD,
    selection: Mapping[str, Any],
) -> Settled:
    """Deduplicate, decontaminate and select over all batches; the same whatever their order.

    Args:
        problems_by_id: at least the problems of the right traces.
        prompt_dedup: what becomes of the traces of a problem whose prompt nearly repeats another's.
        near_dedup: what becomes of near duplicates among one problem's traces. Exact ones are always dropped.
        decontaminate: what becomes of traces that the survey found contaminated.
        near_threshold: as the surveys were made with.
        selection: arguments of `stillhouse.pipeline.selection.select` beyond the candidates; where a ``teacher_band`` is set,
            the teacher's pass rates are the ones counted here, over all traces of a problem that were judged right or wrong.
    """
    rows = _gather(surveys)
    verdicts: list[Verdict] = []
    rates: list[FilterRate] = []
    left = rows.in_order()
    selection = dict(selection)
    if selection.get("teacher_band") is not None:
        num_right, num_decided = rows.num_outcomes["correct"], rows.num_outcomes["correct"] + rows.num_outcomes["wrong"]
        selection["teacher_pass_rates"] = {
            problem: num_right[problem] / max(1, num_decided[problem]) for problem in rows.num_samples
        }

    def settle_check(stage: str, found: list[Verdict], check: str = "", mode: Mode = "drop") -> None:
        nonlocal left
        if check and mode != "off":
            rates.append(FilterRate(check, mode, len(left), len(found)))
        verdicts.extend(found)
        drops = {verdict.trace_key: verdict.reason for verdict in found if not verdict.shadow}
        rows.dropped.update((stage, reason) for reason in drops.values())
        left = [i for i in left if rows.candidates[i].key not in drops]

    duplicates = exact_duplicates((rows.candidates[i].key, rows.digests[i]) for i in left)
    settle_check("dedup", [dup.verdict() for dup in duplicates], "exact_dedup")
    near: list[Duplicate] = []
    if near_dedup != "off":
        near = near_duplicates([rows.candidates[i].key for i in left], rows.sketches.take(left), threshold=near_threshold)
    settle_check("dedup", [dup.verdict(shadow=near_dedup == "shadow") for dup in near], "near_dedup", near_dedup)
    repeated: list[Duplicate] = []
    if prompt_dedup != "off":
        # Among problems that still have a right trace: one without may not stand for another.
        answered = {rows.candidates[i].problem_id for i in left}
        of = {dup.key: dup for dup in near_duplicate_problems([problems_by_id[key] for key in sorted(answered)])}
        for row in (rows.candidates[i] for i in left):
            if dup := of.get(row.problem_id):
                repeated.append(Duplicate(row.key, dup.kept_as, dup.similarity, dup.how))
    settle_check("dedup", [dup.verdict(shadow=prompt_dedup == "shadow") for dup in repeated], "prompt_dedup", prompt_dedup)
    if decontaminate != "off":
        contaminated = _contaminated(rows, left, shadow=decontaminate == "shadow")
        settle_check("decontamination", contaminated, "decontamination", decontaminate)
    kept, not_chosen = select([rows.candidates[i] for i in left], **selection)
    settle_check("selection", not_chosen)
    verdicts += [Verdict(row.key, "selected", SELECTION_VERSION, True, "among the k best") for row in kept]
    chosen = {row.key for row in kept}
    return Settled(
        kept,
        verdicts,
        _funnel(rows.num_samples.total(), rows.dropped),
        clusters(duplicates + near),
        rates,
        with_kept(rows.tally, (entry for row, entry in zip(rows.candidates, rows.seen) if row.key in chosen)),
    )


def filter_traces(
    problems: Iterable[Problem],
    traces: Iterable[Trace],
    *,
    test_problems: Iterable[Problem],
    per_problem: int,
    min_tokens: int,
    max_tokens: int,
    seed: int,
    strategy: Strategy = "shortest",
    filters: Sequence[FilterSetting] | None = None,
    evaluation_sets: Mapping[str, Sequence[str]] | None = None,
    near_dedup: Mode = "shadow",
    prompt_dedup: Mode = "shadow",
    decontaminate: Mode = "drop",
    selection: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FilterResult:
    """Filter, verify, deduplicate, decontaminate and select traces; the same whatever the order they come in.

    A trace that comes twice under one key (a store may deliver at least once) counts once.

    Args:
        problems: at least the problems that the traces answer.
        test_problems: what the student will be judged on; no kept trace shows one.
        per_problem: how many correct traces of a problem to keep.
        min_tokens, max_tokens: bounds on a completion's tokens, both allowed, where ``filters`` is not given.
        seed: for ties in the selection.
        filters: the per-trace filters in their order; None takes `default_filters`.
        evaluation_sets: prompts of named sets that are kept out as well.
        near_dedup, prompt_dedup, decontaminate, selection: see `settle`.
        progress: called as progress(done, total) after each batch of traces.

    Raises:
        ValueError: a trace answers a problem that is not in ``problems``.
        RecipeError: a problem's kind has no verifier, or a filter cannot be made.
    """
    by_id = {problem.id: problem for problem in problems}
    once = {trace.key: trace for trace in traces}
    ordered = sorted(once.values(), key=lambda trace: (trace.problem_id, trace.sample_index, trace.key))
    settings = default_filters(min_tokens=min_tokens, max_tokens=max_tokens) if filters is None else tuple(filters)
    if needs_percentiles(settings):
        settings = with_percentiles(settings, [t.num_completion_tokens for t in ordered if t.finish_reason == "stop"])
    decontaminator = Decontaminator({"": [problem.prompt for problem in test_problems], **(evaluation_sets or {})})
    surveys = []
    for begin in range(0, len(ordered), _BATCH):
        surveys.append(survey_batch(by_id, ordered[begin : begin + _BATCH], settings, decontaminator))
        if progress is not None:
            progress(min(begin + _BATCH, len(ordered)), len(ordered))
    settled = settle(
        surveys,
        by_id,
        near_dedup=near_dedup,
        prompt_dedup=prompt_dedup,
        decontaminate=decontaminate,
        selection={"per_problem": per_problem, "seed": seed, "strategy": strategy, **(selection or {})},
    )
    verdicts = [verdict for survey in surveys for verdict in survey.verdicts] + settled.verdicts
    return FilterResult([once[row.key] for row in settled.kept], verdicts, settled.funnel, settled.clusters)


@dataclass(frozen=True)
class _Rows:
    """The candidates of all batches with what is known of each, by place; and what is counted over all traces."""

    candidates: list[Candidate] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    sketches_of_batches: list[minhash.Sketches] = field(default_factory=list)
    contaminated: dict[int, Drop] = field(default_factory=dict)
    num_samples: Counter[str] = field(default_factory=Counter)
    num_outcomes: dict[str, Counter[str]] = field(default_factory=lambda: {outcome: Counter() for outcome in DECIDED})
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    tally: Counter[Seen] = field(default_factory=Counter)

    @functools.cached_property
    def sketches(self) -> minhash.Sketches:
        return minhash.concatenated(self.sketches_of_batches)

    def in_order(self) -> list[int]:
        key = [(row.problem_id, row.sample_index, row.key) for row in self.candidates]
        return sorted(range(len(key)), key=key.__getitem__)


def _gather(surveys: Iterable[Survey]) -> _Rows:
    rows = _Rows()
    for survey in surveys:
        first = len(rows.candidates)
        rows.contaminated.update((first + i, drop) for i, drop in enumerate(survey.contaminated) if drop is not None)
        rows.candidates.extend(survey.candidates)
        rows.seen.extend(survey.seen)
        rows.digests.extend(survey.digests)
        rows.sketches_of_batches.append(survey.sketches)
        rows.num_samples.update(survey.num_samples)
        for outcome, num in survey.num_outcomes.items():
            rows.num_outcomes[outcome].update(num)
        rows.dropped.update(survey.dropped)
        rows.tally.update(survey.tally)
    return rows


def _contaminated(rows: _Rows, left: Iterable[int], *, shadow: bool) -> list[Verdict]:
    return [
        Verdict(rows.candidates[i].key, "decontamination", DECONTAMINATION_VERSION, False, *rows.contaminated[i], shadow=shadow)
        for i in left
        if i in rows.contaminated
    ]


def _candidate(trace: Trace, problem: Problem) -> Candidate:
    where = problem.source, trace.num_completion_tokens, trace.sample_index, problem.topic
    return Candidate(trace.key, trace.problem_id, *where)


def _funnel(num_traces: int, dropped: Mapping[tuple[str, str], int]) -> list[FunnelRow]:
    """One row a stage and reason, the most frequent first; a stage that dropped nothing has a row too."""
    by_stage: dict[str, dict[str, int]] = defaultdict(dict)
    for (stage, reason), count in dropped.items():
        by_stage[stage][reason] = count
    funnel = []
    for stage in STAGES:
        reasons = by_stage.get(stage, {})
        counted = sorted(reasons.items(), key=lambda item: (-item[1], item[0])) or [("", 0)]
        funnel += [FunnelRow(stage, reason, num_traces, count) for reason, count in counted]
        num_traces -= sum(reasons.values())
    return funnel
