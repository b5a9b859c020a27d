"""What runs inside Ray's workers, as functions of plain arguments; and what the driver asks of a model's folder.

Functions here import the heavy libraries themselves: the worker pays for them, not the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.pipeline.records import Example, Problem, Trace

if TYPE_CHECKING:
    pass

VERSIONED = ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "ray", "compressed-tensors", "reasoning-gym")


def library_versions() -> dict[str, str]:
    """Versions of what decides a run's result, as installed here."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in ("stillhouse", *VERSIONED):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def model_revision(model: str, revision: str | None) -> str:
    """What a student's base is known by: the content of a local folder, else the revision asked for on the hub."""
    from stillhouse.students.base_models import resolve_model
    from stillhouse.teachers.tracing import folder_revision

    folder = Path(resolve_model(model)).expanduser()
    return folder_revision(folder) if folder.is_dir() else revision or ""


def make_examples(
    base_model: str,
    revision: str | None,
    problems: Sequence[Problem],
    traces: Sequence[Trace],
    system_prompt: str | None,
    prompt_suffix: str,
    max_length: int,
) -> list[Example]:
    """Render kept traces for the student and refuse rows that would teach the wrong tokens."""
    from stillhouse.students.base_models import load_tokenizer
    from stillhouse.students.examples import make_examples as render_all

    tokenizer = load_tokenizer(base_model, revision=revision)
    return render_all(
        tokenizer,
        problems,
        traces,
        system_prompt=system_prompt,
        prompt_suffix=prompt_suffix,
        opens_think=False,
        max_length=max_length,
    )


def render_for_student(
    model: str, revision: str | None, problem_prompts: Sequence[str], system_prompt: str | None, prompt_suffix: str
) -> list[str]:
    """What a student is asked, as its own chat template renders it; it opens its think block itself."""
    from stillhouse.pipeline.prompts import render_prompt
    from stillhouse.students.base_models import load_tokenizer

    tokenizer = load_tokenizer(model, revision=revision)
    return [
        render_prompt(tokenizer, prompt, system_prompt=system_prompt, prompt_suffix=prompt_suffix, opens_think=False)
        for prompt in problem_prompts
    ]


def merge_and_emit(
    student: dict[str, Any],
    quantize: dict[str, Any],
    adapter_dir: str,
    student_dir: str,
    checkpoint_dir: str,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Merge the adapter into the base it was trained over, then write the 4-bit checkpoint; both folders appear whole."""
    from stillhouse.students.emitting import emit_checkpoint
    from stillhouse.students.merging import merge_adapter

    merge_adapter(student["base_model"], adapter_dir, student_dir, **base_arguments(student))
    result = emit_checkpoint(
        student_dir,
        checkpoint_dir,
        group_size=quantize["group_size"],
        symmetric=quantize["symmetric"],
        skip=quantize["skip"],
        provenance=provenance,
        card="The gate has not judged this checkpoint yet.",
    )
    return asdict(result) | {"path": Path(checkpoint_dir).name}


def base_arguments(student: dict[str, Any]) -> dict[str, Any]:
    """The recipe's student section as the arguments that say how the base is held."""
    return {name: student[name] for name in ("base_weights", "dtype", "group_size", "block_size", "double_quant", "revision")}
