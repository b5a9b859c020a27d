"""What the base student can do already: its answers to the training problems, graded before the traces are filtered.

Nothing here runs unless the recipe sets ``select.student_band``. The band itself decides none of the answers: another one
asks the student nothing. A stage that was stopped goes on from the last problems it committed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from stillhouse.jobs.generators import chunks
from stillhouse.jobs.run_state import RunState, StageOutput, read_problems
from stillhouse.jobs.sources import probe_sampling
from stillhouse.jobs.student_grading import base_identity, grading_settings, student_pool
from stillhouse.pipeline.records import Graded, Planned, Problem, content_key

CODE_VERSION = 1
PROBE_KEYS = {"student_samples", "student_temperature"}
"""What in the recipe's select section decides the student's answers, and nothing of what is made of them."""
BATCHES_AT_ONCE = 8
"""Batches of each actor between two commits: a stop costs these at most. Several actors wait for the last of them to end."""


def probe_stage(run: RunState) -> None:
    """Grade the base student on the problems that have traces, where the selection wants to know."""
    recipe = run.recipe
    if recipe.select.student_band is None:
        return
    problems = _probed_problems(run)
    run.stage(
        "probe",
        kind="probe",
        code_version=CODE_VERSION,
        settings=grading_settings(recipe, probe_sampling(recipe), recipe.select.student_samples)
        | base_identity(recipe)
        # Their own fingerprint is not an input: what the teacher is asked for besides changes nothing here.
        | {"problems": content_key("probed", sorted((problem.id, problem.entry) for problem in problems))},
        inputs={},
        work=lambda print_: _probe(run, f"probe/{print_[:12]}", problems),
    )


def _probed_problems(run: RunState) -> list[Problem]:
    planned = {row.problem_id for row in run.store.read("planned", Planned)}
    return [problem for problem in read_problems(run) if problem.id in planned]


def _probe(run: RunState, folder: str, problems: list[Problem]) -> StageOutput:
    """Grade what is not committed under this fingerprint; a problem's answers are committed together."""
    recipe, samples = run.recipe, run.recipe.select.student_samples
    committed = {problem_id for problem_id, _, _ in _graded(run.store.shards(folder))}
    left = [problem for problem in problems if problem.id not in committed]
    run.reporter.begin("base on training problems", len(problems) * samples, len(committed) * samples)
    if left:
        at_once = max(1, BATCHES_AT_ONCE * recipe.gate.batch_size * max(1, recipe.cluster.train_workers) // samples)
        with student_pool(run, recipe.student.base_model, revision=recipe.student.revision) as pool:
            for some in chunks(left, at_once):
                graded = pool.grade(some, model_name="base", num_samples=samples, sampling=probe_sampling(recipe))
                run.store.add_shard(folder, Graded, graded)
    files = run.store.shards(folder)
    found = list(_graded(files))
    return StageOutput(
        tuple(files),
        {
            "num_problems": len(problems),
            "num_graded": len(found),
            "num_correct": sum(correct for _, correct, _ in found),
            "num_completion_tokens": sum(tokens for _, _, tokens in found),
        },
    )


def student_pass_rates(run: RunState) -> dict[str, float] | None:
    """The share of the base student's answers that are right, by problem; None where nobody wants to know.

    An answer that no verifier could decide counts as not right.
    """
    if run.recipe.select.student_band is None:
        return None
    num_answers: Counter[str] = Counter()
    num_correct: Counter[str] = Counter()
    for problem_id, correct, _ in _graded(run.store.path(name) for name in run.manifests["probe"].outputs):
        num_answers[problem_id] += 1
        num_correct[problem_id] += correct
    return {problem_id: num_correct[problem_id] / num for problem_id, num in num_answers.items()}


def _graded(files: Iterable[Path]) -> Iterator[tuple[str, bool, int]]:
    """(problem, whether it is right, tokens) of each answer; what was written stays on disk."""
    import pyarrow.parquet as pq

    names = ["problem_id", "correct", "num_completion_tokens"]
    for path in files:
        table = pq.read_table(path, columns=names)
        yield from zip(*(table.column(name).to_pylist() for name in names))
