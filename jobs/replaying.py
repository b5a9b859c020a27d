"""A recipe whose teacher is a data set: its rows become the problems and the traces of the run, and nobody is asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stillhouse.jobs.recipe_teacher import ReplayTeacher
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.records import Planned, Problem
from stillhouse.pipeline.row_files import rows_of_dataset, rows_of_file
from stillhouse.pipeline.trace_store.writer import Intent, TraceWriter
from stillhouse.pipeline.verification import NO_GOLD_NEEDED
from stillhouse.teachers.answers import replayed_bytes
from stillhouse.teachers.replay import ReplayCounts, ReplayedTrace, replay_rows, to_problem_and_trace

if TYPE_CHECKING:
    from stillhouse.jobs.run_state import RunState

ROWS_AT_ONCE = 256
REPLAYED_FILES = (".jsonl", ".json", ".parquet")


def replayed_traces(teacher: ReplayTeacher, counts: ReplayCounts) -> Iterator[ReplayedTrace]:
    """The data set's generations; ``counts`` says afterwards what could not be used, and why.

    Raises:
        RecipeError: the file or data set cannot be read, or does not have the layout's columns.
    """
    if teacher.path:
        rows, name = rows_of_file(teacher.path, what="traces", endings=REPLAYED_FILES), Path(teacher.path).name
    else:
        where = {"subset": teacher.subset, "split": teacher.split, "revision": teacher.revision}
        rows, name = rows_of_dataset(teacher.name, what="traces", **where, streaming=True), teacher.name
    found = replay_rows(
        teacher.layout,
        itertools.islice((row for _, row in rows), teacher.limit),
        dataset=name,
        revision=teacher.revision or "",
        counts=counts,
        teacher=teacher.model,
    )
    yield from found


def replayed_problems(teacher: ReplayTeacher) -> list[Problem]:
    """The data set's problems that have an answer to judge by, each once.

    Raises:
        RecipeError: there is none.
    """
    counts = ReplayCounts()
    problems: dict[str, Problem] = {}
    for replayed in replayed_traces(teacher, counts):
        if replayed.answer or teacher.problem_kind in NO_GOLD_NEEDED:
            problem, _ = to_problem_and_trace(replayed, kind=teacher.problem_kind)
            problems.setdefault(problem.id, problem)
    if not problems:
        why = ", ".join(f"{count} × {reason}" for reason, count in counts.unusable.most_common()) or "the rows have no answers"
        raise RecipeError(
            f"{teacher.path or teacher.name} has no trace with an answer to judge it by, of {counts.num_rows} rows: {why}"
        )
    return list(problems.values())


def replay_into(run: RunState, writer: TraceWriter, problems: Sequence[Problem]) -> list[Planned]:
    """Put the data set's traces for these problems into the store; those that are there already are left."""
    teacher, counts = run.recipe.teacher, ReplayCounts()
    wanted, there = {problem.id for problem in problems}, writer.keys()
    planned: list[Planned] = []
    waiting: list[tuple[Intent, bytes]] = []

    def write() -> None:
        ids = writer.begin([intent for intent, _ in waiting]).result()
        writer.answered_many([(call_id, raw) for call_id, (_, raw) in zip(ids, waiting)]).result()
        run.reporter.advance(len(waiting))
        waiting.clear()

    run.reporter.begin("replayed traces", len(wanted))
    seen: set[str] = set()
    for replayed in replayed_traces(teacher, counts):
        problem, trace = to_problem_and_trace(replayed, kind=teacher.problem_kind)
        if problem.id not in wanted or trace.key in seen:
            continue
        seen.add(trace.key)
        planned.append(Planned(trace.key, problem.id))
        if trace.key not in there:
            waiting.append((Intent(trace.key, problem.id, b"", 0, 0, endpoint="replay"), replayed_bytes(trace)))
        if len(waiting) == ROWS_AT_ONCE:
            write()
    if waiting:
        write()
    for reason, count in counts.unusable.most_common():
        run.reporter.note(f"  {count:,} generations could not be used: {reason}")
    if counts.num_without_gold and teacher.problem_kind not in NO_GOLD_NEEDED:
        run.reporter.note(f"  {counts.num_without_gold:,} generations have no answer to judge them by, left out")
    return planned
