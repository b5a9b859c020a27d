"""The filter stage: traces stream from the store through Ray tasks; what takes knowledge of all of them comes after.

Re-filtering never asks the teacher: it reads what is stored. Verdicts are written as they come; of a trace that passes, only a
few hundred bytes stay in memory until duplicates and the selection are settled.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stillhouse.jobs.cluster import meant_error
from stillhouse.jobs.judged_by import judged_by
from stillhouse.jobs.own_code import filter_names, own_code, own_folders, search_in
from stillhouse.jobs.probing import PROBE_KEYS, student_pass_rates
from stillhouse.jobs.run_state import RunState, StageOutput, read_problems
from stillhouse.jobs.sources import evaluation_set_identities, filter_settings
from stillhouse.jobs.traces import stream_planned_traces
from stillhouse.pipeline.decontamination import DECONTAMINATION_VERSION, TEST_SPLIT, Decontaminator
from stillhouse.pipeline.dedup import DEDUP_VERSION
from stillhouse.pipeline.errors import NothingKeptError, RecipeError
from stillhouse.pipeline.filters.drop import FILTERS_VERSION
from stillhouse.pipeline.filters.rates import FilterRate, filter_rates
from stillhouse.pipeline.filters.settings import FILTERS, FilterSetting, needs_percentiles, with_percentiles
from stillhouse.pipeline.funnel import FunnelRow, Survey, settle, survey_batch
from stillhouse.pipeline.overlap.evaluation_sets import evaluation_prompts
from stillhouse.pipeline.records import Problem, Trace, Verdict
from stillhouse.pipeline.selection import SELECTION_VERSION
from stillhouse.pipeline.store import RunStore
from stillhouse.pipeline.tally import Seen, histogram, source_rates

CODE_VERSION = 3
TRACES_A_TASK = 256
TASKS_A_CORE = 2
FILTERING_FILE = "filtering.json"
"""Rates of each filter, check and source, and the histograms of the traces."""


def filter_stage(run: RunState) -> None:
    """Filter, verify, deduplicate, decontaminate and select the traces; every drop keeps its verdict."""
    filters, select = run.recipe.filters, run.recipe.select
    run.stage(
        "filter",
        kind="filter",
        code_version=CODE_VERSION,
        settings={
            "filters": filters.model_dump(mode="json") | {"evaluation_sets": evaluation_set_identities(run.recipe)},
            "select": select.model_dump(mode="json", exclude=PROBE_KEYS),
            "seed": run.recipe.seed,
            "filters_version": FILTERS_VERSION,
            "dedup_version": DEDUP_VERSION,
            "decontamination_version": DECONTAMINATION_VERSION,
            "selection_version": SELECTION_VERSION,
            "own_filters": own_code(filter_names(run.recipe)),
            **judged_by(run.recipe),
        },
        inputs={name: run.manifests[name].fingerprint for name in ("traces", "probe") if name in run.manifests},
        work=lambda _: _filter(run),
    )


def _filter(run: RunState) -> StageOutput:
    recipe, problems = run.recipe, read_problems(run)
    by_id = {problem.id: problem for problem in problems}
    settings = filter_settings(recipe)
    if needs_percentiles(settings):
        lengths = [trace.num_completion_tokens for trace in stream_planned_traces(run) if trace.finish_reason == "stop"]
        settings = with_percentiles(settings, lengths)
    surveys: list[Survey] = []
    with run.store.replacing("verdicts", Verdict) as verdicts:

        def verdicts_as_they_come() -> Iterator[Verdict]:
            for survey in _surveys(run, by_id, settings):
                verdicts.add(survey.verdicts)
                surveys.append(replace(survey, verdicts=[]))
                yield from survey.verdicts

        rates = filter_rates(settings, verdicts_as_they_come())
        settled = settle(
            surveys,
            by_id,
            near_dedup=recipe.filters.near_duplicates,
            prompt_dedup=recipe.filters.near_prompts,
            decontaminate=recipe.filters.decontaminate,
            selection={
                "per_problem": recipe.select.per_problem,
                "seed": recipe.seed,
                "strategy": recipe.select.strategy,
                "teacher_band": recipe.select.teacher_band,
                "student_band": recipe.select.student_band,
                "student_pass_rates": student_pass_rates(run),
                "per_source": recipe.select.per_source,
                "max_total": recipe.select.max_examples,
                "balance": recipe.select.balance,
            },
        )
        verdicts.add(settled.verdicts)
    chosen = {row.key for row in settled.kept}
    with run.store.replacing("kept", Trace) as kept:
        for batch in _batches(stream_planned_traces(run, chosen)):
            kept.add(batch)
    num_in = sum(survey.num_samples.total() for survey in surveys)
    files = (
        *verdicts.files,
        *kept.files,
        run.store.write_json("funnel.json", [asdict(row) for row in settled.funnel]),
        run.store.write_json(FILTERING_FILE, _figures(rates + settled.rates, settled.tally)),
        run.store.write_json("duplicates.json", [asdict(cluster) for cluster in settled.clusters]),
    )
    if not chosen:
        raise _nothing_kept(run, num_in, settled.funnel)
    return StageOutput(files, {"num_in": num_in, "num_kept": len(chosen)})


def _figures(rates: Sequence[FilterRate], tally: Counter[Seen]) -> dict[str, Any]:
    """What the report shows of the stage beside its funnel."""
    return {
        "filters": [asdict(rate) for rate in rates],
        "sources": [asdict(rate) for rate in source_rates(tally)],
        "num_tokens": asdict(histogram(tally, "num_tokens")),
        "repetition": asdict(histogram(tally, "repetition")),
    }


def _surveys(run: RunState, by_id: dict[str, Problem], settings: Sequence[FilterSetting]) -> Iterator[Survey]:
    """What is found in the planned traces, batch by batch in their order, a few batches under way at a time."""
    ray, sets = run.ray, dict[str, list[str]]()
    if run.recipe.filters.decontaminate != "off":
        sets[TEST_SPLIT] = [problem.prompt for problem in by_id.values() if problem.split == "test"]
    for named in run.recipe.filters.evaluation_sets:
        where = {"subset": named.subset, "split": named.split, "revision": named.revision}
        sets.setdefault(named.name, []).extend(evaluation_prompts(named.name, field=named.field, **where))
    shared, folders = (ray.put(by_id), ray.put(Decontaminator(sets))), own_folders(run.recipe)
    task = ray.remote(num_cpus=1, max_retries=2)(_survey_task)
    under_way: deque[Any] = deque()
    limit = max(2, int(TASKS_A_CORE * ray.cluster_resources().get("CPU", 1)))
    try:
        for batch in _batches(stream_planned_traces(run)):
            under_way.append(task.remote(*shared, batch, settings, run.recipe.filters.verify_dropped, folders))
            if len(under_way) >= limit:
                yield ray.get(under_way.popleft())
        while under_way:
            yield ray.get(under_way.popleft())
    except ray.exceptions.RayError as error:
        raise meant_error(error) from error


def _survey_task(
    by_id: dict[str, Problem],
    decontaminator: Decontaminator,
    traces: list[Trace],
    settings: Sequence[FilterSetting],
    verify_dropped: bool,
    own_folders: Sequence[str],
) -> Survey:
    search_in(own_folders)
    return survey_batch(by_id, traces, settings, decontaminator, verify_dropped=verify_dropped)


def _batches(traces: Iterable[Trace]) -> Iterator[list[Trace]]:
    source = iter(traces)
    while batch := list(itertools.islice(source, TRACES_A_TASK)):
        yield batch


def _nothing_kept(run: RunState, num_in: int, funnel: Sequence[FunnelRow]) -> NothingKeptError:
    largest = max(funnel, key=lambda row: row.num_dropped, default=None)
    reason = f"most were dropped by {largest.stage} ({largest.reason})" if num_in and largest else "the teacher wrote none"
    look_at = (
        "teacher.opens_think, teacher.prompt_suffix and teacher.sampling.max_new_tokens"
        if largest and largest.stage == "format"
        else "the answers of the problems, filters and select"
    )
    return NothingKeptError(
        f"none of {num_in} traces was kept: {reason}. The verdicts are in {run.store.path('verdicts')}; look at {look_at}"
    )


def explain(run_folder: Path, key_prefix: str) -> list[Verdict]:
    """Everything that was said of one trace, in the order of the checks.

    Raises:
        RecipeError: no trace, or more than one, has a key that begins so.
    """
    found: dict[str, list[Verdict]] = {}
    for verdict in RunStore(run_folder).read("verdicts", Verdict):
        if verdict.trace_key.startswith(key_prefix):
            found.setdefault(verdict.trace_key, []).append(verdict)
    if len(found) != 1:
        what = f"{len(found)} traces have keys that begin" if found else "no filtered trace has a key that begins"
        raise RecipeError(f"{what} with {key_prefix!r}; `stillhouse traces ls {run_folder}` lists them")
    steps = (*FILTERS, ":", "verify", "exact", "near", "prompt", "decontamination")
    (verdicts,) = found.values()

    def place(verdict: Verdict) -> int:
        names = (verdict.check, verdict.check.partition("_")[0], ":" if ":" in verdict.check else "")
        return next((steps.index(name) for name in names if name in steps), len(steps))

    return sorted(verdicts, key=place)
