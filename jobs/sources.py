"""A recipe's problem sources read into problems, its models into what loads them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from stillhouse.jobs.generators import GeneratorSpec
from stillhouse.jobs.recipe import DatasetSource, FileSource, ReasoningGymSource, Recipe
from stillhouse.jobs.recipe_teacher import EngineTeacher, ReplayTeacher, TransformersTeacher
from stillhouse.jobs.replaying import replayed_problems
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.filters.settings import FilterSetting, default_filters
from stillhouse.pipeline.problems import dataset_problems, disjoint, local_problems, reasoning_gym_problems
from stillhouse.pipeline.records import Problem, Sampling, Split
from stillhouse.pipeline.store import output_hash
from stillhouse.pipeline.verification import NO_GOLD_NEEDED, SelfCheck, gold_as_answer, self_check, verify

MAX_UNVERIFIABLE_SHARE = 0.2
"""Large public sets hold golds that nothing can check (proofs, prose): those are left out. Beyond this share the source, its
fields or its kind are wrong."""
MUTATED_PROBLEMS = 200
"""Problems of each split whose altered golds have to be refused before a teacher's token is spent."""
MAX_MUTATED_ACCEPTED = 0.05


def load_problems(recipe: Recipe) -> tuple[dict[Split, list[Problem]], dict[str, int]]:
    """Problems of each split, texts disjoint: what stands in test is taken out of validation and train.

    Returns:
        the problems, and counts of those left out: ``num_repeated_<split>`` (repetitions, or problems of another split) and
        ``num_unverifiable_<split>`` (their own gold answer does not verify).

    Raises:
        RecipeError: a source cannot be read, a problem has no answer, more than a fifth of the golds do not verify
            themselves, or the verifier accepts altered golds.
    """
    kept: dict[Split, list[Problem]] = {}
    counts: dict[str, int] = {}
    earlier: list[Problem] = []
    for split in ("test", "validation", "train"):
        found = [problem for source in getattr(recipe.problems, split) for problem in _read(source, split)]
        if split == "train" and isinstance(recipe.teacher, ReplayTeacher):
            found = replayed_problems(recipe.teacher)
        distinct, repeated = disjoint(found, earlier)
        kept[split] = _with_sound_golds(distinct, split)
        counts[f"num_repeated_{split}"] = len(repeated)
        counts[f"num_unverifiable_{split}"] = len(distinct) - len(kept[split])
        earlier += distinct
    for split in ("train", "test"):
        if not kept[split]:
            raise RecipeError(
                f"problems.{split} has no problem left: {counts[f'num_repeated_{split}']} are repetitions, or stand in another "
                "split"
            )
    return kept, counts


def _with_sound_golds(problems: list[Problem], split: str) -> list[Problem]:
    """The problems whose gold answer verifies itself."""
    sound = []
    first = ""
    for problem in problems:
        if not problem.answer and problem.kind in NO_GOLD_NEEDED:
            sound.append(problem)  # schema, pattern or tests say what is right; there is no gold to prove them with
            continue
        judged = verify(problem, gold_as_answer(problem))
        if judged.outcome == "correct":
            sound.append(problem)
        elif not first:
            first = f"the answer {problem.answer[:80]!r} of {problem.prompt[:60]!r} is {judged.outcome} ({judged.reason})"
    num_unsound = len(problems) - len(sound)
    if num_unsound > MAX_UNVERIFIABLE_SHARE * len(problems):
        raise RecipeError(
            f"problems.{split}: {num_unsound} of {len(problems)} gold answers do not verify themselves; {first}; correct the "
            "answers, answer_field or kind"
        )
    check = self_check([problem for problem in sound if problem.answer][:: max(1, len(sound) // MUTATED_PROBLEMS)])
    num_accepted = check.num_mutated - check.mutated_rejected
    if num_accepted > MAX_MUTATED_ACCEPTED * check.num_mutated:
        raise RecipeError(
            f"problems.{split}: the verifier accepts {num_accepted} of {check.num_mutated} altered answers, for example "
            f"{check.failures[0]}; choose another kind"
        )
    return sound


def self_test(recipe: Recipe) -> dict[str, SelfCheck]:
    """Let the verifiers prove themselves on every source of problems: golds have to be accepted, altered golds refused.

    Returns:
        by ``split: source``; problems without a gold are not among them.

    Raises:
        RecipeError: a source cannot be read.
    """
    found: dict[str, list[Problem]] = {}
    for split in ("train", "validation", "test"):
        problems = [problem for source in getattr(recipe.problems, split) for problem in _read(source, split)]
        if split == "train" and isinstance(recipe.teacher, ReplayTeacher):
            problems = replayed_problems(recipe.teacher)
        for problem in problems:
            if problem.answer:
                found.setdefault(f"{split}: {problem.source}", []).append(problem)
    return {name: self_check(problems) for name, problems in found.items()}


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


def file_hashes(recipe: Recipe) -> dict[str, str]:
    """Content hashes of the local files that a recipe reads problems from: a changed file is a changed recipe."""
    hashes = {}
    for source in (*recipe.problems.train, *recipe.problems.validation, *recipe.problems.test):
        if isinstance(source, FileSource) and Path(source.path).is_file():
            hashes[Path(source.path).name] = output_hash(Path(source.path))
        if isinstance(source, DatasetSource) and Path(source.name).is_dir():
            for path in sorted(Path(source.name).rglob("*")):
                if path.is_file():
                    hashes[f"{source.name}:{path.relative_to(source.name)}"] = output_hash(path)
    if isinstance(recipe.teacher, ReplayTeacher) and recipe.teacher.path:
        hashes[Path(recipe.teacher.path).name] = output_hash(Path(recipe.teacher.path))
    return hashes


def resolve_teacher(name: str) -> str:
    """The folder of the shipped tiny teacher for ``tiny``; any other name unchanged."""
    return str(resources.files("stillhouse.teachers.tiny") / "model") if name == "tiny" else name


def teacher_sampling(recipe: Recipe) -> Sampling:
    return Sampling(**recipe.teacher.sampling.model_dump())


def longest_completion(recipe: Recipe) -> int:
    """Tokens that a teacher's completion can have; replayed ones were cut, if at all, by somebody else."""
    return sys.maxsize if isinstance(recipe.teacher, ReplayTeacher) else recipe.teacher.sampling.max_new_tokens


def filter_settings(recipe: Recipe) -> tuple[FilterSetting, ...]:
    """The recipe's filters in their order, or the default ones with its bounds on the length."""
    filters = recipe.filters
    if filters.list:
        return tuple(FilterSetting(step.name, step.mode, dict(step.options)) for step in filters.list)
    return default_filters(min_tokens=filters.min_tokens, max_tokens=filters.max_tokens or longest_completion(recipe))


def gate_sampling(recipe: Recipe) -> Sampling:
    return Sampling(recipe.gate.temperature, recipe.gate.top_p, recipe.gate.max_new_tokens)


def teacher_spec(recipe: Recipe) -> GeneratorSpec:
    """How the recipe's in-process teacher is loaded in one Ray actor."""
    teacher, cluster = recipe.teacher, recipe.cluster
    return GeneratorSpec(
        resolve_teacher(teacher.model),
        revision=teacher.revision,
        dtype=teacher.dtype,
        batch_size=teacher.batch_size,
        num_cpus=cluster.cpus_per_teacher_actor,
        num_gpus=cluster.gpus_per_teacher_actor,
    )


def teacher_resources(recipe: Recipe) -> tuple[int, float, float]:
    """Ray actors that hold the teacher, and the CPUs and GPUs of each; none for a teacher that runs elsewhere."""
    teacher, cluster = recipe.teacher, recipe.cluster
    if isinstance(teacher, EngineTeacher):
        return teacher.replicas, cluster.cpus_per_teacher_actor, teacher.num_gpus
    if isinstance(teacher, TransformersTeacher):
        return cluster.num_teacher_actors, cluster.cpus_per_teacher_actor, cluster.gpus_per_teacher_actor
    return 0, 0.0, 0.0


def evaluation_spec(recipe: Recipe, model: str, *, revision: str | None = None, kernels: bool = False) -> GeneratorSpec:
    """How a student is loaded for evaluation: with transformers, in the recipe's dtype, on what training asks for.

    ``kernels`` then puts a 4-bit checkpoint's layers on our own kernels.
    """
    cluster = recipe.cluster
    return GeneratorSpec(
        model,
        revision=revision,
        dtype=recipe.student.dtype,
        batch_size=recipe.gate.batch_size,
        num_cpus=cluster.cpus_per_train_worker,
        num_gpus=cluster.gpus_per_train_worker,
        kernels=kernels,
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
