"""The recipe: one YAML file that says what is distilled into what, and how a run of it is judged.

This module, with its parts in `recipe_problems`, `recipe_teacher` and `recipe_filters`, is the only schema. ``load_recipe``
reads a file or a shipped name, applies ``--set`` overrides, and answers every mistake with one sentence that names the key.
Below ``jobs/`` nothing takes a recipe: functions take plain arguments.

Relative paths in a recipe file start at that file's folder, those in an override at the working directory. A model is a
shipped name (``tiny``), a path (it starts with ``.``, ``/`` or ``~``) or a hub name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from stillhouse.jobs.own_code import refuse_shadowed, search_in
from stillhouse.jobs.recipe_file import anchor_paths, find_recipe, read_mapping, sentence, shipped_files, with_override
from stillhouse.jobs.recipe_filters import Filters, Select
from stillhouse.jobs.recipe_problems import Problems
from stillhouse.jobs.recipe_section import (
    Count,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    Share,
    Text,
)
from stillhouse.jobs.recipe_teacher import AnyTeacher, EngineTeacher, ReplayTeacher
from stillhouse.pipeline.errors import RecipeError
from stillhouse.teachers.known import MOVING_NAMES


class Lora(Section):
    """The adapter that is trained over the frozen base."""

    rank: PositiveInt = 32
    alpha: PositiveFloat = 64.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | tuple[Text, ...] = "all-linear"
    """all-linear takes every linear layer but the output head; or a list of layer names."""


class Student(Section):
    """The model that learns."""

    base_model: Text
    """Shipped name (tiny), path or hub name."""
    revision: Text | None = None
    """Commit or tag on the hub; null takes the newest."""
    base_weights: Literal["int4", "nf4", "bitsandbytes", "bf16"] = "nf4"
    """How the frozen base is held while the adapter is trained: our int4 or NF4, bitsandbytes' NF4, or 16 bits."""
    group_size: Literal[32, 64, 128] = 32
    """int4: weights along a row that share one scale."""
    block_size: Literal[64, 128, 256] = 64
    """nf4, bitsandbytes: weights that share one absmax."""
    double_quant: bool = True
    """nf4, bitsandbytes: hold the absmax values in 8 bits as well."""
    lora: Lora = Lora()
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type that activations and the adapter are computed in."""


class Train(Section):
    """Supervised training of the adapter."""

    learning_rate: PositiveFloat
    """Peak of the schedule."""
    num_steps: PositiveInt | None = None
    """Optimizer steps; give this or epochs."""
    epochs: PositiveFloat | None = None
    """Passes over the training rows; give this or num_steps."""
    tokens_per_step: PositiveInt = 65536
    """Tokens in one optimizer step over all workers, at most."""
    max_length: PositiveInt = 32768
    """Longest training row, tokens; a longer one is an error and never cut."""
    scheduler: Literal["one_cycle", "cosine", "constant"] = "cosine"
    warmup_ratio: Share = 0.03
    """Share of the steps in which the learning rate rises."""
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    save_steps: PositiveInt = 100
    """Steps between two resumable checkpoints."""
    packing: bool = True
    """Lay a step's rows behind each other, kept apart by position ids, instead of padding them; padding is faster on a CPU."""
    accumulation_steps: PositiveInt = 1
    """Forward passes that a step's rows are spread over, to fit memory."""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.num_steps is None) == (self.epochs is None):
            given = "neither" if self.num_steps is None else "both; set one of them to null"
            raise ValueError(f"needs exactly one of num_steps and epochs; got {given}")
        if self.max_length > self.tokens_per_step:
            raise ValueError(
                f"max_length={self.max_length} does not fit tokens_per_step={self.tokens_per_step}; "
                "raise tokens_per_step or lower max_length"
            )
        return self


class Quantize(Section):
    """The format of the emitted checkpoint."""

    format: Literal["int4"] = "int4"
    group_size: Literal[32, 64, 128] = 32
    """Weights along a row that share one fp16 scale."""
    symmetric: Literal[True] = True
    """No zero points."""
    skip: tuple[Text, ...] = ()
    """Layers that stay in 16 bits besides lm_head, by the end of their name."""


class Gate(Section):
    """How base, student and checkpoint are measured, and what the checkpoint must reach; intervals are of 95 %.

    A threshold of null asks nothing.
    """

    num_problems: PositiveInt | None = None
    """At most this many test problems, taken evenly from the sources; null takes all."""
    samples_per_problem: PositiveInt = 1
    temperature: NonNegativeFloat = 0.0
    """0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    batch_size: PositiveInt = 32
    max_new_tokens: PositiveInt = 32768
    min_accuracy: Share | None = None
    """Floor of the checkpoint's pass@1, by its interval."""
    min_family_accuracy: Share | None = None
    """Floor of the checkpoint's pass@1 on each source of problems, by the point estimate."""
    min_student_ratio: Share | None = 0.95
    """Floor of the checkpoint's pass@1 over the 16-bit student's, by the point estimates."""
    min_gain: Annotated[float, Field(ge=-1, le=1)] | None = 0.0
    """Floor of the checkpoint's pass@1 minus the base's, paired by problem, by the interval."""
    max_drop: Share | None = 0.1
    """The 16-bit student's pass@1 minus the checkpoint's, paired by problem, at most; by the interval."""
    min_think_closed: Share | None = None
    """Floor of the share of the checkpoint's completions whose think block closes, by the interval."""
    kernels: bool = True
    """Also measure the checkpoint on our own kernels, and require that it answers as it does in transformers."""
    max_kernel_difference: Share | None = 0.05
    """pass@1 on our kernels and in transformers, paired by problem, may differ by this at most; by the interval."""
    min_same_verdict: Share | None = None
    """Floor of the share of completions judged alike on our kernels and in transformers, by the interval; for float32."""
    teacher_problems: Count = 100
    """Test problems for the teacher's own score; 0 leaves it out."""


class Cluster(Section):
    """How many Ray actors and workers, and what each asks for."""

    num_teacher_actors: PositiveInt = 1
    cpus_per_teacher_actor: PositiveFloat = 1.0
    gpus_per_teacher_actor: NonNegativeFloat = 0.0
    train_workers: Count = 0
    """0 trains inside one process, without a process group."""
    cpus_per_train_worker: PositiveFloat = 1.0
    gpus_per_train_worker: NonNegativeFloat = 0.0
    object_store_mb: Annotated[int, Field(ge=80)] | None = None
    """Shared memory of a local Ray, MiB; null takes 256."""


class Recipe(Section):
    """What is distilled into what: problems, teacher, filters, selection, student, training, 4-bit format, gate, cluster."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Letters, digits, dots and dashes; names the run's folder."""
    description: str = ""
    """One line for `stillhouse recipes`."""
    seed: Seed = 0
    """Every random choice of the run follows from it."""
    problems: Problems
    teacher: AnyTeacher
    filters: Filters = Filters()
    select: Select = Select()
    student: Student
    train: Train
    quantize: Quantize = Quantize()
    gate: Gate = Gate()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _selection_is_possible(self) -> Recipe:
        teacher = self.teacher
        if isinstance(teacher, ReplayTeacher):
            if self.problems.train:
                raise ValueError("problems.train has to be empty with teacher.kind=replay: the problems come with the traces")
            return self
        if isinstance(teacher, EngineTeacher):
            for key, says in (("num_teacher_actors", teacher.replicas), ("gpus_per_teacher_actor", teacher.num_gpus)):
                given = getattr(self.cluster, key)
                if key in self.cluster.model_fields_set and given not in (says, Cluster.model_fields[key].default):
                    raise ValueError(
                        f"cluster.{key}={given:g} contradicts the teacher, whose replicas make it {says}; leave it out"
                    )
        if not self.problems.train:
            raise ValueError("problems.train: expected a list with at least one item, got a list of 0")
        if self.select.per_problem > teacher.max_samples:
            draws = "adaptive.max_samples" if teacher.adaptive else "samples_per_problem"
            raise ValueError(
                f"select.per_problem={self.select.per_problem} asks for more than teacher.{draws}={teacher.max_samples} draws"
            )
        return self

    def to_yaml(self) -> str:
        """The whole recipe as YAML, defaults included; ``load_recipe`` reads it back as an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def recipe_json_schema() -> dict[str, Any]:
    """The recipe as JSON schema (draft 2020-12), with a description of every key; editors complete and check by it."""
    return Recipe.model_json_schema()


def shipped_recipes() -> dict[str, str]:
    """Names of the recipes in the package, each with its one-line description."""
    return {name: str(read_mapping(path).get("description", "")) for name, path in shipped_files().items()}


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file or by its shipped name, with ``key.path=value`` overrides applied in order.

    Args:
        path_or_name: a path where it ends in .yaml or .yml or holds a slash, a shipped name otherwise.
        overrides: ``train.num_steps=20``; the value is YAML, list items go by number (``problems.train.0.size=8``).

    Raises:
        RecipeError: the file or name does not exist, is not YAML, or does not fit the schema, or a module of
            its own is hidden by another of that name. One sentence.

    Modules in the recipe's folder and in the working folder can be imported from then on, so that a team's own verifiers and
    filters can lie beside the recipe.
    """
    path = find_recipe(path_or_name)
    folders = (path.resolve().parent, Path.cwd())
    search_in(folders)
    data = anchor_paths(read_mapping(path), path.resolve().parent)
    for override in overrides:
        data = with_override(data, override, Path.cwd())
    try:
        recipe = Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        # No "from error": pydantic's text repeats the input, which may be a key that was refused because it is one.
        raise RecipeError(f"{path.name}: {sentence(error, Recipe)}{_about_the_teacher(error)}") from None
    refuse_shadowed(recipe, folders)
    return recipe


def _about_the_teacher(error: ValidationError) -> str:
    """Why a teacher needs settings that other recipes leave out."""
    found = error.errors(include_url=False)
    missing = [entry for entry in found if entry["type"] == "missing" and entry["loc"][0] == "teacher"]
    if not any(entry["loc"][-1] in ("temperature", "top_p", "max_new_tokens", "opens_think") for entry in missing):
        return ""
    # The section that misses opens_think comes along with its error, and its model is the name that was looked up.
    names = [entry["input"].get("model") for entry in missing if entry["loc"][-1] == "opens_think"]
    why = next((f" ({MOVING_NAMES[name.lower()]})" for name in names if str(name).lower() in MOVING_NAMES), "")
    return (
        f"; the teacher is not among the known ones{why}, whose published settings would be taken: give its own, or name the "
        "one that it descends from in teacher.like (`stillhouse teachers` lists them)"
    )
