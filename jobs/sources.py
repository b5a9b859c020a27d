"""A recipe's problem sources read into problems, its models into what loads them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from stillhouse.jobs.generators import GeneratorSpec
from stillhouse.jobs.recipe import Recipe
from stillhouse.jobs.recipe_problems import AnySource, DatasetSource, FileSource, ReasoningGymSource
from stillhouse.jobs.recipe_teacher import EngineTeacher, ReplayTeacher, TransformersTeacher
from stillhouse.jobs.replaying import replayed_problems
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.filters.settings import FilterSetting, default_filters
from stillhouse.pipeline.overlap.evaluation_sets import ROW_FILES
from stillhouse.pipeline.problems import dataset_problems, disjoint, local_problems, reasoning_gym_problems
from stillhouse.pipeline.records import Problem, Sampling, Split
from stillhouse.pipeline.store import output_hash
from stillhouse.pipeline.verification import SelfCheck, self_check

MAX_UNVERIFIABLE_SHARE = 0.2
"""Large public sets hold golds that nothing can check (proofs, prose): those are left out. Beyond this share the source, its
fields or its kind are wrong."""
MUTATED_PROBLEMS = 200
"""Problems of each source whose altered golds have to be refused before a teacher's token is spent."""
MAX_MUTATED_ACCEPTED = 0.05
SPLITS: tuple[Split, ...] = ("test", "validation", "train")
"""In the order in which they are read: what stands in an earlier one is taken out of the later ones."""


class LoadedProblems(NamedTuple):
    """Problems of each split, and what was found while they were read.

    ``left_out`` counts ``num_repeated_<split>`` (repetitions, or problems of another split) and ``num_unverifiable_<split>``
    (their own gold answer does not verify); ``self_checks`` are by ``split: source``.
    """

    by_split: dict[Split, list[Problem]]
    left_out: dict[str, int]
    self_checks: dict[str, SelfCheck]


def load_problems(recipe: Recipe) -> LoadedProblems:
    """Problems of each split, texts disjoint: what stands in test is taken out of validation and train.

    Raises:
        RecipeError: a source cannot be read, a problem has no answer, more than a fifth of the golds do not verify
            themselves, or the verifier accepts altered golds.
    """
    loaded = LoadedProblems({}, {}, {})
    earlier: list[Problem] = []
    for split in SPLITS:
        distinct, repeated = disjoint(_read_split(recipe, split), earlier)
        checks = self_checks(distinct, split, max_mutated=MUTATED_PROBLEMS)
        require_sound(checks, split)
        unsound = {key for check in checks.values() for key in check.unsound}
        loaded.by_split[split] = [problem for problem in distinct if problem.id not in unsound]
        loaded.left_out[f"num_repeated_{split}"] = len(repeated)
        loaded.left_out[f"num_unverifiable_{split}"] = len(distinct) - len(loaded.by_split[split])
        loaded.self_checks.update(checks)
        earlier += distinct
    for split in ("train", "test"):
        if not loaded.by_split[split]:
            num_repeated = loaded.left_out[f"num_repeated_{split}"]
            raise RecipeError(
                f"problems.{split} has no problem left: {num_repeated} are repetitions, or stand in another split"
            )
    return loaded


def _read_split(recipe: Recipe, split: Split) -> list[Problem]:
    if split == "train" and isinstance(recipe.teacher, ReplayTeacher):
        return replayed_problems(recipe.teacher)
    return [problem for source in getattr(recipe.problems, split) for problem in read_source(source, split)]


def self_checks(
    problems: Iterable[Problem], split: Split, *, max_mutated: int | None = MUTATED_PROBLEMS
) -> dict[str, SelfCheck]:
    """`self_check` by ``split: source``."""
    by_source: dict[str, list[Problem]] = {}
    for problem in problems:
        by_source.setdefault(f"{split}: {problem.source}", []).append(problem)
    return {name: self_check(found, max_mutated=max_mutated) for name, found in by_source.items()}


def require_sound(checks: Mapping[str, SelfCheck], split: Split) -> None:
    """Refuse a split whose golds do not verify, or whose verifier accepts altered ones.

    Raises:
        RecipeError: more of either than a few; names the first.
    """
    num_golds = sum(check.num_golds for check in checks.values())
    num_unsound = num_golds - sum(check.gold_accepted for check in checks.values())
    first = next((check.failures[0] for check in checks.values() if check.failures), "")
    if num_unsound > MAX_UNVERIFIABLE_SHARE * num_golds:
        raise RecipeError(
            f"problems.{split}: {num_unsound} of {num_golds} gold answers do not verify themselves; {first}; correct the "
            "answers, answer_field or kind"
        )
    num_mutated = sum(check.num_mutated for check in checks.values())
    num_accepted = num_mutated - sum(check.mutated_rejected for check in checks.values())
    if num_accepted > MAX_MUTATED_ACCEPTED * num_mutated:
        raise RecipeError(
            f"problems.{split}: the verifier accepts {num_accepted} of {num_mutated} altered answers, for example {first}; "
            "choose another kind"
        )


def self_test(recipe: Recipe, *, max_mutated: int | None = None) -> dict[str, SelfCheck]:
    """Let the verifiers prove themselves on every source of problems: golds have to be accepted, altered golds refused.

    Args:
        max_mutated: alter the golds of about so many problems of a source; None alters all.

    Returns:
        by ``split: source``.

    Raises:
        RecipeError: a source cannot be read.
    """
    found: dict[str, SelfCheck] = {}
    for split in SPLITS:
        found |= self_checks(_read_split(recipe, split), split, max_mutated=max_mutated)
    return found


def read_source(source: AnySource, split: Split) -> list[Problem]:
    """All problems of one source.

    Raises:
        RecipeError: it cannot be read.
    """
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
                topic_field=source.topic_field,
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
                topic_field=source.topic_field,
                kind=source.kind,
                limit=source.limit,
            )


def file_hashes(recipe: Recipe) -> dict[str, str]:
    """Content hashes of the local files that a recipe reads problems from: a changed file is a changed recipe."""
    hashes = {}
    for split in SPLITS:
        for number, source in enumerate(getattr(recipe.problems, split)):
            if isinstance(source, FileSource) and Path(source.path).is_file():
                hashes[f"{split}.{number}: {Path(source.path).name}"] = output_hash(Path(source.path))
            if isinstance(source, DatasetSource) and Path(source.name).is_dir():
                for path in sorted(Path(source.name).rglob("*")):
                    if path.is_file():
                        hashes[f"{split}.{number}: {path.relative_to(source.name)}"] = output_hash(path)
    if isinstance(recipe.teacher, ReplayTeacher) and recipe.teacher.path:
        hashes[Path(recipe.teacher.path).name] = output_hash(Path(recipe.teacher.path))
    return hashes


def evaluation_set_identities(recipe: Recipe) -> list[dict[str, str | None]]:
    """The recipe's evaluation sets, local files by their names and contents alone: where they lie is not what they are.

    Raises:
        RecipeError: a local file is not there.
    """
    found = []
    for named in recipe.filters.evaluation_sets:
        entry = named.model_dump(mode="json")
        if named.name.endswith(ROW_FILES):
            path = Path(named.name)
            if not path.is_file() and "://" not in named.name:
                raise RecipeError(f"filters.evaluation_sets names {path}, and there is no such file")
            entry["name"] = path.name
            entry["sha256"] = output_hash(path) if path.is_file() else None
        found.append(entry)
    return found


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
        listed = tuple(FilterSetting(step.name, step.mode, dict(step.options)) for step in filters.list)
        return listed if any(step.name == "finished" for step in listed) else (FilterSetting("finished"), *listed)
    return default_filters(min_tokens=filters.min_tokens, max_tokens=filters.max_tokens or longest_completion(recipe))


def gate_sampling(recipe: Recipe) -> Sampling:
    return Sampling(recipe.gate.temperature, recipe.gate.top_p, recipe.gate.max_new_tokens)


def probe_sampling(recipe: Recipe) -> Sampling:
    """How the base student answers the training problems for ``select.student_band``."""
    return replace(gate_sampling(recipe), temperature=recipe.select.student_temperature)


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
