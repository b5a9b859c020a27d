"""The traces stage: what the recipe's teacher is asked, what of it is there already, and what came.

Every answer goes through one `TraceWriter` of this process: reserved before it is asked for, on disk before it is looked at,
sealed into the trace store. Requests are found again by their keys, so the same command goes on where the last one stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillhouse.jobs import remote
from stillhouse.jobs.asking import Asked, ask_pool, ask_servers
from stillhouse.jobs.generators import GeneratorPool
from stillhouse.jobs.recipe import Recipe
from stillhouse.jobs.recipe_teacher import EndpointTeacher, EngineTeacher, ReplayTeacher, TransformersTeacher
from stillhouse.jobs.replaying import replay_into
from stillhouse.jobs.run_state import RunState, StageOutput, read_problems
from stillhouse.jobs.servers import running_servers
from stillhouse.jobs.sources import filter_settings, resolve_teacher, teacher_sampling, teacher_spec
from stillhouse.jobs.trace_plan import AdaptivePlan, FixedPlan, TracePlan
from stillhouse.pipeline.errors import first_line
from stillhouse.pipeline.filters.judging import judge_batch
from stillhouse.pipeline.filters.settings import with_percentiles
from stillhouse.pipeline.records import Completion, Outcome, Planned, Problem, Trace, content_key
from stillhouse.pipeline.stopping import StoppingRule
from stillhouse.pipeline.trace_store.budget import Budget, Prices
from stillhouse.pipeline.trace_store.migration import migrate
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.pipeline.trace_store.writer import TraceWriter
from stillhouse.teachers.answers import parse_answer
from stillhouse.teachers.chat_response import call_context
from stillhouse.teachers.tracing import TraceRequest, folder_revision, render_for_teacher, trace_requests

CODE_VERSION = 2


def trace_root_of(recipe: Recipe, folder: Path) -> str | Path:
    """Where the traces of a recipe that runs in ``folder`` are kept: what it says, or a folder in the run's own."""
    return recipe.teacher.store or folder / "traces"


def spool_of(recipe: Recipe, folder: Path) -> Path:
    """Where the run's spool lies, on a local disk; a folder that several runs share holds one for each."""
    given = recipe.teacher.spool
    return Path(given, content_key("spool", str(folder.absolute()))[:16]) if given else folder / "traces" / "spool"


def trace_root(run: RunState) -> str | Path:
    return trace_root_of(run.recipe, run.store.root)


@contextmanager
def open_writer(run: RunState, root: str | Path, spool: Path, budget: Budget) -> Iterator[TraceWriter]:
    """A writer into the trace store at ``root``; what it holds is sealed when the block ends, however it ends."""
    teacher = run.recipe.teacher
    prices = Prices()
    if isinstance(teacher, EndpointTeacher):
        prices = Prices(teacher.price_per_million_input_tokens, teacher.price_per_million_output_tokens)

    def note(sentence: str) -> None:
        run.reporter.note(f"  {sentence}")

    with TraceWriter(TraceStore(root), spool, parse=parse_answer, prices=prices, budget=budget, note=note) as writer:
        yield writer


def teacher_identity(run: RunState) -> dict[str, Any]:
    """What decides a trace besides its prompt: the teacher, its revision, sampling and how it is asked."""
    teacher = run.recipe.teacher
    if isinstance(teacher, ReplayTeacher):
        settings = teacher.model_dump(mode="json", exclude={"store", "spool", "path"})
        return {"model": teacher.model, "replay": settings}
    model, revision = teacher.model, teacher.revision or ""
    folder = Path(resolve_teacher(model)).expanduser()
    if isinstance(teacher, EndpointTeacher):
        served = teacher.base_url
        if teacher.extra_body:
            served += f" {content_key(teacher.extra_body)[:16]}"
    else:
        served = teacher.dtype
        if folder.is_dir():
            # Known by what is in it: the same folder elsewhere is the same teacher.
            model, revision = Path(model).name, folder_revision(folder)
    if isinstance(teacher, EngineTeacher):
        # Engines compute the same model, and their completions may stand for each other as far as samples go. Which one
        # wrote a trace is still part of its key: a comparison of two engines must not read the other's traces.
        served = f"{teacher.kind}, {served}" + (f", at most {teacher.max_model_len} tokens" if teacher.max_model_len else "")
    sampling = teacher_sampling(run.recipe)
    return {
        "model": model,
        "revision": revision,
        "served": served,
        "sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_new_tokens": sampling.max_new_tokens}
        | sampling.extras(),
        "system_prompt": teacher.system_prompt,
        "prompt_suffix": teacher.prompt_suffix,
        "opens_think": teacher.opens_think,
        "seed": run.recipe.seed,
    }


class TeacherRequests:
    """The completions that a recipe may ask its teacher for, with keys and seeds.

    Args:
        seed: decides the seeds; the traces and the teacher's own score have different ones.
    """

    def __init__(self, run: RunState, problems: Sequence[Problem], *, samples: int, seed: int):
        teacher = run.recipe.teacher
        self.problems = problems
        self._identity = teacher_identity(run)
        self._sampling, self._samples, self._seed = teacher_sampling(run.recipe), samples, seed
        prompts = render_for_teacher(
            [problem.prompt for problem in problems],
            kind="transformers" if isinstance(teacher, TransformersTeacher) else "endpoint",
            model=resolve_teacher(teacher.model),
            revision=teacher.revision,
            system_prompt=teacher.system_prompt,
            prompt_suffix=teacher.prompt_suffix,
            opens_think=teacher.opens_think,
        )
        self._prompts = dict(zip((problem.id for problem in problems), prompts))

    def __len__(self) -> int:
        return len(self.problems) * self._samples

    def __iter__(self) -> Iterator[TraceRequest]:
        for problem in self.problems:
            yield from self.of(problem)

    def of(self, problem: Problem) -> list[TraceRequest]:
        """One problem's requests, by sample index."""
        return trace_requests(
            [problem],
            [self._prompts[problem.id]],
            teacher=self._identity["model"],
            teacher_revision=self._identity["revision"],
            served=self._identity["served"],
            sampling=self._sampling,
            samples_per_problem=self._samples,
            seed=self._seed,
        )


def ask_teacher(
    run: RunState, plan: TracePlan, writer: TraceWriter, on_trace: Callable[[Trace], None]
) -> tuple[Asked, dict[str, str] | None]:
    """Work a plan off; no Ray and no server is started for an empty one.

    Returns:
        how it ended, and which code computed the completions (None for an empty plan).
    """
    first = plan.take(1)
    if not first:
        return Asked(), None
    plan.give_back(first)
    teacher, identity, sampling = run.recipe.teacher, teacher_identity(run), teacher_sampling(run.recipe)

    def context(request: TraceRequest) -> bytes:
        return call_context(request, teacher=identity["model"], teacher_revision=identity["revision"], sampling=sampling)

    if isinstance(teacher, TransformersTeacher):
        spec = teacher_spec(run.recipe)
        with GeneratorPool(run.ray, spec, num_actors=run.recipe.cluster.num_teacher_actors) as pool:
            asked = ask_pool(
                pool, plan, writer, sampling=sampling, context=context, batch_size=spec.batch_size, on_trace=on_trace
            )
            return asked, pool.served()

    async def ask() -> tuple[Asked, dict[str, str]]:
        async with running_servers(run, writer) as servers:
            return await ask_servers(servers, plan, context=context, on_trace=on_trace), servers.served

    return asyncio.run(ask())


def traces_stage(run: RunState) -> None:
    """The teacher's completions: those that are not there yet are asked for, each is committed when it arrives."""
    teacher = run.recipe.teacher
    if isinstance(teacher, ReplayTeacher):
        how: dict[str, Any] = {}
    else:
        how = {
            "samples_per_problem": teacher.samples_per_problem,
            "adaptive": teacher.adaptive and teacher.adaptive.model_dump(mode="json"),
            "budget": teacher.budget.model_dump(mode="json"),
        }
    run.stage(
        "traces",
        kind="traces",
        code_version=CODE_VERSION,
        settings=teacher_identity(run) | how,
        inputs={"problems": run.manifests["problems"].fingerprint},
        work=lambda _: _write_traces(run),
    )


def _write_traces(run: RunState) -> StageOutput:
    problems = [problem for problem in read_problems(run) if problem.split == "train"]
    check_student(run, problems)
    root, teacher = trace_root(run), run.recipe.teacher
    _bring_to_this_layout(run, root)
    counts: dict[str, float] = {}
    caps = {} if isinstance(teacher, ReplayTeacher) else teacher.budget.model_dump()
    with open_writer(run, root, spool_of(run.recipe, run.store.root), Budget(**caps)) as writer:
        if isinstance(teacher, ReplayTeacher):
            rows = replay_into(run, writer, problems)
        else:
            rows, counts = _ask_for_all(run, writer, problems)
    store = TraceStore(root)
    files = run.store.replace_shards("planned", Planned, rows)
    counts |= count_traces(store, {row.key for row in rows})
    totals = writer.totals() if teacher.store else store.totals()
    return StageOutput((*files, *_files(store)), counts | totals.to_json())


def check_student(run: RunState, problems: Sequence[Problem]) -> None:
    """Load the student's tokenizer and put a problem to it: a base without a chat template must not cost a teacher's tokens.

    Raises:
        RecipeError: there is no such model, or it cannot be asked.
    """
    recipe = run.recipe
    remote.render_for_student(
        recipe.student.base_model,
        recipe.student.revision,
        [problem.prompt for problem in problems[:1]],
        recipe.teacher.system_prompt,
        recipe.teacher.prompt_suffix,
    )


def _bring_to_this_layout(run: RunState, root: str | Path) -> None:
    if isinstance(root, Path) and any(root.glob("part-*.parquet")):
        run.reporter.note(f"  {migrate(root)} traces of an earlier version's layout were taken over")


def _files(store: TraceStore) -> list[Path]:
    """What the stage's manifest vouches for: the store's files, where they are files of this machine."""
    if not store.folder.is_local:
        return []
    root = Path(store.folder.url)
    return [root / entry.name for commit in store.commits() for entry in (*commit.shards, *commit.calls)]


def _ask_for_all(run: RunState, writer: TraceWriter, problems: Sequence[Problem]) -> tuple[list[Planned], dict[str, float]]:
    """Ask for every trace that is planned and missing; returns what is planned, and what the plan itself counted."""
    teacher = run.recipe.teacher
    requests = TeacherRequests(run, problems, samples=teacher.max_samples, seed=run.recipe.seed)
    committed = writer.keys()
    plan: FixedPlan | AdaptivePlan
    if teacher.adaptive:
        settings = teacher.adaptive

        def known(wanted: Container[str]) -> Iterator[Trace]:
            yield from writer.recovered()
            yield from TraceStore(trace_root(run)).traces(wanted)

        plan = AdaptivePlan(
            problems,
            requests.of,
            StoppingRule(settings.verified, settings.max_samples, settings.min_pass_rate, settings.error),
            committed=known,
            judge=_judge(run),
        )
        run.reporter.begin("traces, at most", len(requests))
    else:
        plan = FixedPlan(requests, committed)
        wanted = [Planned(request.key, request.problem_id) for request in requests]
        run.reporter.begin("traces", len(wanted), sum(row.key in committed for row in wanted))
    asked, _ = ask_teacher(run, plan, writer, lambda _: run.reporter.advance(1))
    counts: dict[str, float] = {"budget_reached": float(asked.reached is not None), "num_refused": len(asked.refused)}
    note_how_it_ended(run, asked, "The run goes on with the traces that are there.")
    if isinstance(plan, AdaptivePlan):
        return list(plan.planned()), counts | plan.counts()
    return wanted, counts | {"num_planned": len(wanted)}


def note_how_it_ended(run: RunState, asked: Asked, consequence: str) -> None:
    """Say that the budget was reached, or that the teacher refused requests, and what follows."""
    if asked.reached is not None:
        run.reporter.note(f"  {first_line(asked.reached)} {consequence}")
    if asked.refused:
        words = next(iter(asked.refused.values()))
        run.reporter.note(f"  {len(asked.refused):,} requests were refused for good, the first: {words} {consequence}")


def _judge(run: RunState) -> Callable[[Problem, Trace], Outcome]:
    """What an adaptive plan counts as verified: a trace that the filters will keep and whose answer is right."""
    # Percentiles of lengths are known when all traces are there; until then they bound nothing.
    settings = with_percentiles(filter_settings(run.recipe), [])

    def judge(problem: Problem, trace: Trace) -> Outcome:
        (deciding,) = (v for v in judge_batch({trace.problem_id: problem}, [trace], settings) if not v.shadow)
        return deciding.outcome or "wrong"

    return judge


def count_traces(store: TraceStore, wanted: Container[str]) -> dict[str, float]:
    """How many of the wanted traces are there, their tokens, and how they ended."""
    counts = dict.fromkeys(
        ("num_traces", "num_prompt_tokens", "num_completion_tokens", "num_length_stops", "num_loop_stops"), 0.0
    )
    for batch in store.batches(["key", "num_prompt_tokens", "num_completion_tokens", "finish_reason"]):
        for row in batch.to_pylist():
            if row["key"] in wanted:
                counts["num_traces"] += 1
                counts["num_prompt_tokens"] += row["num_prompt_tokens"]
                counts["num_completion_tokens"] += row["num_completion_tokens"]
                counts["num_length_stops"] += row["finish_reason"] == "length"
                counts["num_loop_stops"] += row["finish_reason"] == "loop"
    return counts


def left_of_budget(run: RunState) -> Budget:
    """What the traces stage left of the recipe's caps."""
    teacher, counts = run.recipe.teacher, run.manifests["traces"].counts
    if isinstance(teacher, ReplayTeacher):
        return Budget()
    caps = teacher.budget
    spent = {
        "max_dollars": counts["dollars"] + counts["dollars_lost"],
        "max_tokens": int(counts["prompt_tokens"] + counts["completion_tokens"] + counts["tokens_lost"]),
        "max_hours": counts["seconds"] / 3600,
    }
    left = {name: max(0, cap - spent[name]) for name, cap in caps.model_dump().items() if cap is not None}
    return Budget(**left)


def completion_of(trace: Trace) -> Completion:
    """The completion that a trace was made from."""
    counts = (trace.num_prompt_tokens, trace.num_completion_tokens)
    return Completion(trace.completion, trace.finish_reason, *counts, trace.seed)


def stream_planned_traces(run: RunState, wanted: Container[str] | None = None) -> Iterator[Trace]:
    """The traces that this recipe planned and that are there, each once; with ``wanted``, only those of these keys.

    The store may hold others, of other settings or runs.
    """
    parents = {row.key: row.problem_id for row in run.store.read("planned", Planned)}
    if wanted is not None:
        parents = {key: problem_id for key, problem_id in parents.items() if key in wanted}
    for trace in TraceStore(trace_root(run)).traces(parents):
        problem_id = parents[trace.key]
        yield trace if trace.problem_id == problem_id else replace(trace, problem_id=problem_id)
