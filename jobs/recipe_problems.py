"""The recipe's problems: where questions with checkable answers come from, by split."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillhouse.jobs.recipe_section import PositiveInt, Section, Seed, Text, VerifierKind


class ReasoningGymSource(Section):
    """Problems that a ``reasoning-gym`` task generates, with that task's own verifier."""

    source: Literal["reasoning_gym"]
    task: Text
    """Name of the task, for example chain_sum."""
    size: PositiveInt
    """Number of problems."""
    seed: Seed
    """Seed of the generator; a split needs one of its own."""
    options: dict[str, Any] = Field(default={})
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
    topic_field: Text | None = None
    """Column with a problem's topic, which the selection shares out over; null takes `topic` where a row has it as text."""
    kind: VerifierKind = "math"
    """Which verifier judges an answer: math, choice, exact, number, json, regex, code, or python:package.module:function. Rows
    bring along what it needs: number rel_tol, abs_tol, unit; json schema; regex pattern; code tests, entry_point, setup."""
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
    topic_field: Text | None = None
    """Column with a problem's topic, which the selection shares out over; null takes `topic` where a row has it as text."""
    kind: VerifierKind = "math"
    """Which verifier judges an answer: math, choice, exact, number, json, regex, code, or python:package.module:function. Rows
    bring along what it needs: number rel_tol, abs_tol, unit; json schema; regex pattern; code tests, entry_point, setup."""
    limit: PositiveInt | None = None
    """At most this many rows, from the start; null takes all."""


AnySource = ReasoningGymSource | FileSource | DatasetSource
Source = Annotated[AnySource, Field(discriminator="source")]


class Problems(Section):
    """Prompts with checkable answers, by split."""

    train: tuple[Source, ...] = ()
    """What the teacher answers and the student learns from; empty where traces are replayed, which bring theirs along."""
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
