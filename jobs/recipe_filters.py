"""What of the teacher's traces becomes training rows: the recipe's filters and its selection."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from stillhouse.jobs.recipe_section import NonNegativeFloat, PositiveInt, Section, Share, Text
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.filters import settings
from stillhouse.pipeline.filters.settings import FilterSetting, make_filter
from stillhouse.pipeline.selection import Balance, Strategy


def _mode_of_switch(value: Any) -> Any:
    """YAML reads a bare ``off`` as false; true and false are understood as drop and off."""
    return {True: "drop", False: "off"}.get(value, value) if isinstance(value, bool) else value


Mode = Annotated[settings.Mode, BeforeValidator(_mode_of_switch)]


class FilterStep(Section):
    """One filter of the recipe's list."""

    name: Text
    """finished, think_block, answer_present, length, control_tokens, repetition, refusal, system_prompt_leak, language,
    contradiction, or your own as package.module:function, which takes a trace and gives None or (reason, evidence)."""
    mode: Mode = "drop"
    """shadow runs it without dropping, and reports what it would do."""
    options: dict[str, Any] = Field(default={})
    """The filter's own settings, for example {max_percentile: 95} for length."""


class EvaluationSet(Section):
    """A named set whose items are kept out of the training rows, beside the run's own test problems."""

    name: Text
    """A .jsonl or .parquet file, or a data set on the hub."""
    field: Text | Annotated[tuple[Text, ...], Field(strict=False, min_length=1)] | None = None
    """Column of the prompts, or a list of columns that make one together, [question, choices]; null finds it."""
    subset: Text | None = None
    """Configuration of the data set; null takes its default."""
    split: Text = "test"
    """Split of the data set."""
    revision: Text | None = None
    """Commit or tag of the data set; null takes the newest."""


class Filters(Section):
    """Which traces are dropped, beyond those whose answer is not verified as correct."""

    min_tokens: PositiveInt = 1
    """Shortest completion that is kept, in the teacher's tokens."""
    max_tokens: PositiveInt | None = None
    """Longest completion that is kept, in the teacher's tokens; null takes teacher.sampling.max_new_tokens."""
    verify_dropped: bool = True
    """Verify what a filter dropped as well, so that the report can say what the filter costs in right answers."""
    list: tuple[FilterStep, ...] = ()
    """The filters in their order, with their settings; empty takes the default ones, whose length has the bounds above. Where
    the list has no finished, it comes first: a cut-off trace is never trained on."""
    near_duplicates: Mode = "shadow"
    """What becomes of near duplicates among one problem's traces; exact ones are always dropped."""
    near_prompts: Mode = "shadow"
    """What becomes of traces whose prompt nearly repeats another problem's."""
    decontaminate: Mode = "drop"
    """What becomes of traces whose prompt or completion contains an item of the test problems or of evaluation_sets."""
    evaluation_sets: tuple[EvaluationSet, ...] = ()
    """Further sets whose items no training row may show."""

    @model_validator(mode="after")
    def _range(self) -> Filters:
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"keeps nothing: max_tokens={self.max_tokens} is below min_tokens={self.min_tokens}")
        if self.decontaminate == "off" and self.evaluation_sets:
            raise ValueError(
                "names evaluation_sets, and decontaminate is off: leave one of them out, or set it to drop or shadow"
            )
        if (
            self.list
            and {"min_tokens", "max_tokens"} & self.model_fields_set
            and (self.min_tokens, self.max_tokens) != (1, None)
        ):
            raise ValueError("has a list, whose length filter takes the bounds as options; leave min_tokens and max_tokens out")
        names = [step.name for step in self.list]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"list: {repeated[0]} is there twice; give each filter once, with all its options")
        if any(step.name == "finished" and step.mode != "drop" for step in self.list):
            raise ValueError("list: finished cannot be switched off or only watch: a cut-off trace teaches no end of turn")
        for step in self.list:
            try:
                make_filter(FilterSetting(step.name, step.mode, step.options))
            except RecipeError as error:
                raise ValueError(f"list: {error}") from error
        return self


Band = Annotated[tuple[Share, Share], Field(strict=False)]


class Select(Section):
    """Which of the kept traces become training rows."""

    per_problem: PositiveInt = 1
    """At most this many traces of one problem."""
    strategy: Strategy = "shortest"
    """Which of a problem's correct traces are taken; mixed takes short and long ones in turn."""
    teacher_band: Band | None = None
    """[lowest, highest] share of a problem's traces that are right; others are too hard or too easy. null takes all."""
    student_band: Band | None = None
    """[lowest, highest] share of the base student's own answers to a problem that are right: what it solves already teaches it
    nothing. Has the base answer every problem that has traces, before filtering; null takes all and asks it nothing."""
    student_samples: PositiveInt = 4
    """Answers of the base student to each problem, for student_band. A share is exact to 1 / student_samples."""
    student_temperature: NonNegativeFloat = 1.0
    """How those answers are sampled; top_p, max_new_tokens and the rest are the gate's. At 1, the base's own distribution, the
    share of right ones estimates the probability that training is to raise; lower values push it towards 0 and 1."""
    per_source: PositiveInt | None = None
    """At most this many traces of one source of problems, its topics in turn; null takes all."""
    max_examples: PositiveInt | None = None
    """At most this many training rows, shared over the sources and their topics; null takes all."""
    balance: Balance = "proportional"
    """How max_examples is shared over the topics of all sources: as they stand, or equally as far as each has enough."""

    @model_validator(mode="after")
    def _bands_hold_something(self) -> Select:
        for name in ("teacher_band", "student_band"):
            band = getattr(self, name)
            if band is not None and band[0] > band[1]:
                raise ValueError(f"{name}={list(band)} keeps nothing: the lowest share is above the highest")
        if self.student_band is None:
            return self
        low, high = self.student_band
        if not any(low <= right / self.student_samples <= high for right in range(self.student_samples + 1)):
            raise ValueError(
                f"student_band={[low, high]} keeps nothing: no share of {self.student_samples} answers lies in it; raise "
                "student_samples or widen the band"
            )
        if self.student_temperature == 0 and self.student_samples > 1:
            raise ValueError(
                f"student_temperature=0 gives the same answer {self.student_samples} times; raise it, or set student_samples=1"
            )
        return self
