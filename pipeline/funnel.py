"""From all traces to those worth learning from: every stage in order, every drop with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from stillhouse.pipeline.decontamination import DECONTAMINATION_VERSION, Decontaminator
from stillhouse.pipeline.dedup import exact_duplicates
from stillhouse.pipeline.extraction import strict_answer
from stillhouse.pipeline.filters import format_filters, run_filters
from stillhouse.pipeline.records import Problem, Trace, Verdict
from stillhouse.pipeline.selection import SELECTION_VERSION, Strategy, best_of_n
from stillhouse.pipeline.verification import VERIFIER_VERSION, verify


@dataclass(frozen=True, slots=True)
class FunnelRow:
    """How many traces a stage dropped for one reason, of how many that reached it; reason "" where it dropped none."""

    stage: str
    reason: str
    num_in: int
    num_dropped: int


@dataclass(frozen=True, slots=True)
class FilterResult:
    """What is kept, what was said of each trace, and the counts.

    ``verdicts`` holds one per trace and stage that had something to say: every verification (with its outcome), every drop,
    and a keeping one with check ``selected`` for each trace in ``kept``.
    """

    kept: list[Trace]
    verdicts: list[Verdict]
    funnel: list[FunnelRow]


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
    progress: Callable[[int, int], None] | None = None,
) -> FilterResult:
    """Filter, verify, deduplicate, decontaminate and select traces; the same whatever the order they come in.

    A trace that comes twice under one key (a store may deliver at least once) counts once.

    Args:
        problems: at least the problems that the traces answer.
        test_problems: what the student will be judged on; no kept trace shows one.
        per_problem: how many correct traces of a problem to keep.
        min_tokens, max_tokens: bounds on a completion's tokens, both allowed.
        seed: for ties in the selection.
        progress: called as progress(done, total) while verifying, the slow part.

    Raises:
        ValueError: a trace answers a problem that is not in ``problems``.
        RecipeError: a problem's kind has no verifier.
    """
    by_id = {problem.id: problem for problem in problems}
    once = {trace.key: trace for trace in traces}
    left = sorted(once.values(), key=lambda trace: (trace.problem_id, trace.sample_index, trace.key))
    for trace in left:
        if trace.problem_id not in by_id:
            raise ValueError(f"trace {trace.key[:12]} answers problem {trace.problem_id[:12]}, which is not among the problems")
    verdicts: list[Verdict] = []
    funnel: list[FunnelRow] = []

    def settle(stage: str, of_stage: Sequence[Verdict], *, also_kept: bool = False) -> None:
        nonlocal left
        drops = [verdict for verdict in of_stage if not verdict.keep]
        verdicts.extend(of_stage if also_kept else drops)
        reasons = Counter(_counted_as(verdict) for verdict in drops)
        rows = sorted(reasons.items(), key=lambda item: (-item[1], item[0])) or [("", 0)]
        funnel.extend(FunnelRow(stage, reason, len(left), count) for reason, count in rows)
        dropped = {verdict.trace_key for verdict in drops}
        left = [trace for trace in left if trace.key not in dropped]

    settle("format", run_filters(left, format_filters(min_tokens=min_tokens, max_tokens=max_tokens)))
    settle("verification", _verified(left, by_id, progress), also_kept=True)
    settle("dedup", exact_duplicates(left))
    settle("decontamination", _decontaminated(left, by_id, test_problems))
    kept, not_chosen = best_of_n(left, per_problem=per_problem, seed=seed, strategy=strategy)
    settle("selection", not_chosen)
    verdicts += [Verdict(trace.key, "selected", SELECTION_VERSION, True, "among the k best") for trace in kept]
    return FilterResult(kept, verdicts, funnel)


def _counted_as(verdict: Verdict) -> str:
    """The reason a drop is counted under: for a verifier its outcome, since its reasons quote the item."""
    return verdict.outcome or verdict.reason


def _verified(traces: Sequence[Trace], by_id: dict[str, Problem], progress: Callable[[int, int], None] | None) -> list[Verdict]:
    verdicts = []
    for done, trace in enumerate(traces, 1):
        problem = by_id[trace.problem_id]
        answer = strict_answer(trace.completion)
        judged = verify(problem, answer)
        keep = judged.outcome == "correct"
        evidence = f"answer {answer or ''!r}, gold {problem.answer!r}"[:200]
        check = f"verify_{problem.kind}"
        verdicts.append(Verdict(trace.key, check, VERIFIER_VERSION, keep, judged.reason, evidence, judged.outcome))
        if progress is not None:
            progress(done, len(traces))
    return verdicts


def _decontaminated(traces: Sequence[Trace], by_id: dict[str, Problem], test_problems: Iterable[Problem]) -> list[Verdict]:
    decontaminator = Decontaminator(problem.prompt for problem in test_problems)
    verdicts = []
    for trace in traces:
        if drop := decontaminator.check(by_id[trace.problem_id].prompt, trace.completion):
            verdicts.append(Verdict(trace.key, "decontamination", DECONTAMINATION_VERSION, False, drop.reason, drop.evidence))
    return verdicts
