"""The recipe: one YAML file that says what is distilled into what, and how a run of it is judged.

This module is the only schema. ``load_recipe`` reads a file or a shipped name, applies ``--set`` overrides, and answers
every mistake with one sentence that names the key. Below ``jobs/`` nothing takes a recipe: functions take plain arguments.

Relative paths in a recipe file start at that file's folder, those in an override at the working directory. A model is a
shipped name (``tiny``), a path (it starts with ``.``, ``/`` or ``~``) or a hub name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stillhouse.jobs.recipe_file import anchor_paths, find_recipe, read_mapping, sentence, shipped_files, with_override
from stillhouse.pipeline.errors import RecipeError

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """What every part of a recipe has in common: frozen, no unknown key, no silent conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ReasoningGymSource(Section):
    """Problems that a ``reasoning-gym`` task generates, with that task's own verifier."""

    source: Literal["reasoning_gym"]
    task: Text
    """Name of the task, for example chain_sum."""
    size: PositiveInt
    """Number of problems."""
    seed: Seed
    """Seed of the generator; a split needs one of its own."""
    options: dict[str, Any] = {}
    """The task's own settings, for example {min_terms: 4}."""


class FileSource(Section):
    """Problems from a local JSONL or Parquet file, one row each."""

    source: Literal["file"]
    path: Text
    """The file; a relative path starts at the recipe's folder."""
    prompt_field: Text = "prompt"
    """Column with the question."""
    answer_field: Text = "answer"
    """Column with the gold answer."""
    answer_after: Text | None = None
    """Take the gold from behind the last occurrence of this marker, for example '#### ' for GSM8K; null takes the whole."""
    kind: Literal["math", "choice", "exact"] = "math"
    """Which verifier judges an answer."""
    limit: PositiveInt | None = None
    """At most this many rows, from the start; null takes all."""


class DatasetSource(Section):
    """Problems from a data set that ``datasets.load_dataset`` knows."""

    source: Literal["dataset"]
    name: Text
    """Name on the hub, or a local folder."""
    subset: Text | None = None
    """Configuration of the data set; null takes its default."""
    split: Text = "train"
    """Split of the data set."""
    revision: Text | None = None
    """Commit or tag of the data set; null takes the newest."""
    prompt_field: Text = "problem"
    """Column with the question."""
    answer_field: Text = "answer"
    """Column with the gold answer."""
    answer_after: Text | None = None
    """Take the gold from behind the last occurrence of this marker, for example '#### ' for GSM8K; null takes the whole."""
    kind: Literal["math", "choice", "exact"] = "math"
    """Which verifier judges an answer."""
    limit: PositiveInt | None = None
    """At most this many rows, from the start; null takes all."""


Source = Annotated[ReasoningGymSource | FileSource | DatasetSource, Field(discriminator="source")]


class Problems(Section):
    """Prompts with checkable answers, by split."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """What the teacher answers and the student learns from."""
    validation: tuple[Source, ...] = ()
    """Held out of training, for tuning a recipe; no figure of the report comes from it."""
    test: Annotated[tuple[Source, ...], Field(min_length=1)]
    """What the gate measures on; traces that contain a test problem are dropped."""

    @model_validator(mode="after")
    def _splits_differ(self) -> Problems:
        seen: dict[tuple[str, int], str] = {}
        for split in ("train", "validation", "test"):
            for source in getattr(self, split):
                if isinstance(source, ReasoningGymSource):
                    other = seen.setdefault((source.task, source.seed), split)
                    if other != split:
                        raise ValueError(
                            f"uses task {source.task} with seed {source.seed} in {other} and in {split}; "
                            "give each split a seed of its own"
                        )
        return self


class TeacherSampling(Section):
    """How the teacher's completions are drawn."""

    temperature: NonNegativeFloat = 0.6
    """0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Keep the smallest set of tokens whose probability reaches this."""
    max_new_tokens: PositiveInt = 32768
    """A completion is cut here, stored, and never trained on."""


class Teacher(Section):
    """What every teacher has, whatever serves it."""

    kind: str
    """What serves it: transformers, vllm or endpoint."""
    samples_per_problem: PositiveInt = 1
    """Completions drawn for each problem."""
    sampling: TeacherSampling = TeacherSampling()
    system_prompt: str | None = None
    """Sent before the problem; null sends none, as DeepSeek-R1 and its distillations ask for."""
    prompt_suffix: str = ""
    """Text that follows every problem after a blank line, for the teacher and for the student alike."""
    opens_think: bool = True
    """True where the teacher's generation prompt already ends with an opened think block."""


class TransformersTeacher(Teacher):
    """A teacher that transformers runs inside Ray actors."""

    kind: Literal["transformers"]
    model: Text
    """Shipped name (tiny), path or hub name."""
    revision: Text | None = None
    """Commit or tag on the hub; null takes the newest."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of weights and activations."""
    batch_size: PositiveInt = 16
    """Completions drawn at once by one actor."""


class VllmTeacher(Teacher):
    """A teacher that vLLM serves on GPU workers which Ray starts."""

    kind: Literal["vllm"]
    model: Text
    """Path or hub name."""
    revision: Text | None = None
    """Commit or tag on the hub; null takes the newest."""
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Type of weights and activations."""
    tensor_parallel: PositiveInt = 1
    """GPUs that share one replica's layers."""
    replicas: PositiveInt = 1
    """Copies of the model; problems are spread over them."""
    max_model_len: PositiveInt | None = None
    """Longest prompt and completion together, tokens; null takes the model's own."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that vLLM may take."""
    max_concurrent: PositiveInt = 256
    """Requests in flight per replica."""


class EndpointTeacher(Teacher):
    """A teacher behind an OpenAI-compatible HTTP endpoint."""

    kind: Literal["endpoint"]
    base_url: Text
    """For example https://api.example.com/v1, without user name or password."""
    model: Text
    """The name that the endpoint knows the model by."""
    revision: Text | None = None
    """What is known of the model's version; part of every trace's key."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; null sends none. The key itself never stands in a recipe."""
    price_per_million_input_tokens: NonNegativeFloat = 0.0
    """Dollars, for the plan."""
    price_per_million_output_tokens: NonNegativeFloat = 0.0
    """Dollars, for the plan."""
    max_concurrent: PositiveInt = 64
    """Requests in flight."""

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        if "@" in value:  # the value may hold a password: say what is wrong without repeating it
            raise ValueError("must not carry a user name or password; name an environment variable in teacher.api_key_env")
        if not re.match(r"https?://[^/\s]+", value):
            raise ValueError(f"has to start with http:// or https:// and name a host; got {value!r}")
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _a_name_and_not_a_key(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
            raise ValueError(
                "has to be the name of an environment variable in capitals, such as DEEPSEEK_API_KEY, never the key itself"
            )
        return value


class Filters(Section):
    """Which traces are dropped, beyond those whose answer is not verified as correct."""

    min_tokens: PositiveInt = 1
    """Shortest completion that is kept, in the teacher's tokens."""
    max_tokens: PositiveInt | None = None
    """Longest completion that is kept, in the teacher's tokens; null takes teacher.sampling.max_new_tokens."""
    decontaminate: bool = True
    """Drop traces whose prompt or completion contains a test problem."""

    @model_validator(mode="after")
    def _range(self) -> Filters:
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"keeps nothing: max_tokens={self.max_tokens} is below min_tokens={self.min_tokens}")
        return self


class Select(Section):
    """Which of the kept traces become training rows."""

    per_problem: PositiveInt = 1
    """At most this many traces of one problem."""
    strategy: Literal["shortest", "random"] = "shortest"
    """Which of a problem's correct traces are taken."""
    max_examples: PositiveInt | None = None
    """At most this many training rows, drawn with the recipe's seed; null takes all."""


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
    teacher: Annotated[TransformersTeacher | VllmTeacher | EndpointTeacher, Field(discriminator="kind")]
    filters: Filters = Filters()
    select: Select = Select()
    student: Student
    train: Train
    quantize: Quantize = Quantize()
    gate: Gate = Gate()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _selection_is_possible(self) -> Recipe:
        if self.select.per_problem > self.teacher.samples_per_problem:
            raise ValueError(
                f"select.per_problem={self.select.per_problem} asks for more than "
                f"teacher.samples_per_problem={self.teacher.samples_per_problem} draws"
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
        RecipeError: the file or name does not exist, is not YAML, or does not fit the schema. One sentence.
    """
    path = find_recipe(path_or_name)
    data = anchor_paths(read_mapping(path), path.resolve().parent)
    for override in overrides:
        data = with_override(data, override, Path.cwd())
    try:
        return Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        # No "from error": pydantic's text repeats the input, which may be a key that was refused because it is one.
        raise RecipeError(f"{path.name}: {sentence(error, Recipe)}") from None
