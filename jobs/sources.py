"""A recipe's problem sources read into problems, its models into what loads them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from stillhouse.jobs.generators import GeneratorSpec
from stillhouse.jobs.recipe import DatasetSource, EndpointTeacher, FileSource, ReasoningGymSource, Recipe, VllmTeacher
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.problems import dataset_problems, disjoint, local_problems, reasoning_gym_problems
from stillhouse.pipeline.records import Problem, Sampling, Split
from stillhouse.pipeline.store import output_hash
from stillhouse.pipeline.verification import self_check

SELF_CHECKED_PROBLEMS = 200
"""Golds of each split that must verify themselves before a teacher's token is spent; all where there are fewer."""


def load_problems(recipe: Recipe) -> tuple[dict[Split, list[Problem]], dict[Split, int]]:
    """Problems of each split, texts disjoint: what stands in test is taken out of validation and train.

    Returns:
        the problems, and how many were taken out as repetitions or as problems of another split.

    Raises:
        RecipeError: a source cannot be read, a problem has no answer, or a gold answer does not verify itself.
    """
    kept: dict[Split, list[Problem]] = {}
    removed: dict[Split, int] = {}
    earlier: list[Problem] = []
    for split in ("test", "validation", "train"):
        sources = getattr(recipe.problems, split)
        found = [problem for source in sources for problem in _read(source, split)]
        kept[split], gone = disjoint(found, earlier)
        removed[split] = len(gone)
        earlier += kept[split]
        _require_gold(kept[split], split)
    for split in ("train", "test"):
        if not kept[split]:
            raise RecipeError(
                f"problems.{split} has no problem left: all {removed[split]} are repetitions, or stand in another split"
            )
    return kept, removed


def _read(source: ReasoningGymSource | FileSource | DatasetSource, split: Split) -> list[Problem]:
    match source:
        case ReasoningGymSource():
            return reasoning_gym_problems(source.task, split=split, size=source.size, seed=source.seed, options=source.options)
        case FileSource():
            return local_problems(
                source.path,
                split=split,
                prompt_field=source.prompt_field,
                answer_field=source.answer_field,
                answer_after=source.answer_after,
                kind=source.kind,
                limit=source.limit,
            )
        case DatasetSource():
            return dataset_problems(
                source.name,
                subset=source.subset,
                dataset_split=source.split,
                revision=source.revision,
                split=split,
                prompt_field=source.prompt_field,
                answer_field=source.answer_field,
                answer_after=source.answer_after,
                kind=source.kind,
                limit=source.limit,
            )


def _require_gold(problems: list[Problem], split: str) -> None:
    step = max(1, len(problems) // SELF_CHECKED_PROBLEMS)
    check = self_check(problems[::step])
    if check.failures:
        more = f" (and {len(check.failures) - 1} more)" if len(check.failures) > 1 else ""
        raise RecipeError(f"problems.{split} cannot be verified: {check.failures[0]}{more}; correct the answer or its kind")


def file_hashes(recipe: Recipe) -> dict[str, str]:
    """Content hashes of the local files that a recipe reads problems from: a changed file is a changed recipe."""
    hashes = {}
    for source in (*recipe.problems.train, *recipe.problems.validation, *recipe.problems.test):
        if isinstance(source, FileSource) and Path(source.path).is_file():
            hashes[source.path] = output_hash(Path(source.path))
    return hashes


def resolve_teacher(name: str) -> str:
    """The folder of the shipped tiny teacher for ``tiny``; any other name unchanged."""
    return str(resources.files("stillhouse.teachers.tiny") / "model") if name == "tiny" else name


def teacher_sampling(recipe: Recipe) -> Sampling:
    sampling = recipe.teacher.sampling
    return Sampling(sampling.temperature, sampling.top_p, sampling.max_new_tokens)


def gate_sampling(recipe: Recipe) -> Sampling:
    return Sampling(recipe.gate.temperature, recipe.gate.top_p, recipe.gate.max_new_tokens)


def teacher_spec(recipe: Recipe) -> GeneratorSpec:
    """How the recipe's teacher is loaded in one Ray actor."""
    teacher, cluster = recipe.teacher, recipe.cluster
    common: dict[str, Any] = {"num_cpus": cluster.cpus_per_teacher_actor, "num_gpus": cluster.gpus_per_teacher_actor}
    if isinstance(teacher, EndpointTeacher):
        return GeneratorSpec(
            "endpoint",
            teacher.model,
            revision=teacher.revision,
            batch_size=teacher.max_concurrent,
            base_url=teacher.base_url,
            api_key_env=teacher.api_key_env,
            **common,
        )
    if isinstance(teacher, VllmTeacher):
        return GeneratorSpec(
            "vllm",
            resolve_teacher(teacher.model),
            revision=teacher.revision,
            dtype=teacher.dtype,
            batch_size=teacher.max_concurrent,
            tensor_parallel=teacher.tensor_parallel,
            max_model_len=teacher.max_model_len,
            gpu_memory_utilization=teacher.gpu_memory_utilization,
            **(common | {"num_gpus": max(common["num_gpus"], teacher.tensor_parallel)}),
        )
    return GeneratorSpec(
        "transformers",
        resolve_teacher(teacher.model),
        revision=teacher.revision,
        dtype=teacher.dtype,
        batch_size=teacher.batch_size,
        **common,
    )


def num_teacher_actors(recipe: Recipe) -> int:
    """Actors that hold the teacher: vLLM's replicas, one client for an endpoint, else what the recipe says."""
    if isinstance(recipe.teacher, VllmTeacher):
        return recipe.teacher.replicas
    return 1 if isinstance(recipe.teacher, EndpointTeacher) else recipe.cluster.num_teacher_actors


def evaluation_spec(recipe: Recipe, model: str, *, revision: str | None = None) -> GeneratorSpec:
    """How a student is loaded for evaluation: as a user would, with transformers, in the recipe's dtype."""
    cluster = recipe.cluster
    return GeneratorSpec(
        "transformers",
        model,
        revision=revision,
        dtype=recipe.student.dtype,
        batch_size=recipe.gate.batch_size,
        num_cpus=cluster.cpus_per_teacher_actor,
        num_gpus=cluster.gpus_per_teacher_actor,
    )


def test_problems(problems: Iterable[Problem], limit: int | None) -> list[Problem]:
    """The test problems that the gate uses: all, or ``limit`` taken in turn from each source."""
    chosen = [problem for problem in problems if problem.split == "test"]
    if limit is None or limit >= len(chosen):
        return chosen
    by_source: dict[str, list[Problem]] = {}
    for problem in chosen:
        by_source.setdefault(problem.source, []).append(problem)
    picked: list[Problem] = []
    for rank in range(limit):
        for rows in by_source.values():
            if rank < len(rows) and len(picked) < limit:
                picked.append(rows[rank])
    return picked
