"""The pass that looks at one trace at a time: the filters of a recipe in their order, then the verifier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from stillhouse.pipeline.errors import RecipeError, first_line
from stillhouse.pipeline.extraction import graded_answer_of, strict_answer_of
from stillhouse.pipeline.filters.drop import EVIDENCE_CHARS, FILTERS_VERSION
from stillhouse.pipeline.filters.settings import FilterSetting, TraceFilter, make_filter
from stillhouse.pipeline.records import Problem, Trace, Verdict
from stillhouse.pipeline.verification import VERIFIER_VERSION, verify


def judge_batch(
    problems_by_id: Mapping[str, Problem],
    traces: Iterable[Trace],
    settings: Sequence[FilterSetting],
    *,
    verify_dropped: bool = False,
) -> list[Verdict]:
    """Filter and verify a batch of traces; a pure function of each trace, so batches may be cut and run anywhere.

    Each trace gets exactly one deciding verdict (``shadow`` False): of the first filter that drops it, or of its verifier.
    Beside it stand the shadow verdicts of the filters that only watch and would have dropped it.

    Args:
        settings: with no percentile left in them (`with_percentiles`).
        verify_dropped: also verify what a filter dropped, as a shadow verdict: what the filter costs in right answers.

    Raises:
        ValueError: a trace answers a problem that is not there.
        RecipeError: a filter cannot be made, or the user's own fails; a problem's kind has no verifier.
    """
    filters = [(setting, make_filter(setting)) for setting in settings if setting.mode != "off"]
    verdicts = []
    for trace in traces:
        problem = problems_by_id.get(trace.problem_id)
        if problem is None:
            raise ValueError(f"trace {trace.key[:12]} answers problem {trace.problem_id[:12]}, which is not among the problems")
        of_trace = filter_verdicts(trace, filters)
        dropped = any(not verdict.shadow for verdict in of_trace)
        verdicts += of_trace
        if not dropped or verify_dropped:
            verdicts.append(_verified(trace, problem, shadow=dropped))
    return verdicts


def filter_verdicts(trace: Trace, filters: Sequence[tuple[FilterSetting, TraceFilter]]) -> list[Verdict]:
    """What the filters say against a trace: those that watch, up to the first that drops it; empty where all let it pass."""
    verdicts = []
    for setting, trace_filter in filters:
        try:
            drop = trace_filter(trace)
        except Exception as error:
            if ":" not in setting.name:
                raise
            message = f"filter {setting.name!r} failed on trace {trace.key[:12]}: {type(error).__name__}: {first_line(error)}"
            raise RecipeError(message) from error
        if drop is None:
            continue
        if not (isinstance(drop, tuple) and len(drop) == 2 and all(isinstance(part, str) for part in drop)):
            raise RecipeError(
                f"filter {setting.name!r} must return None or (reason, evidence), two texts; it returned {drop!r:.80}"
            )
        reason, evidence = drop
        shadow = setting.mode == "shadow"
        found = Verdict(trace.key, setting.name, FILTERS_VERSION, False, reason, evidence[:EVIDENCE_CHARS], shadow=shadow)
        verdicts.append(found)
        if not shadow:
            break
    return verdicts


def _verified(trace: Trace, problem: Problem, *, shadow: bool) -> Verdict:
    # A filter's cost is counted as a score would: what has no think block may still answer.
    answer = (graded_answer_of if shadow else strict_answer_of)(problem.kind, trace.completion)
    judged = verify(problem, answer)
    keep = judged.outcome == "correct"
    evidence = f"answer {answer or ''!r}, gold {problem.answer!r}"[:EVIDENCE_CHARS]
    check = f"verify_{problem.kind}"
    return Verdict(trace.key, check, VERIFIER_VERSION, keep, judged.reason, evidence, judged.outcome, shadow)
