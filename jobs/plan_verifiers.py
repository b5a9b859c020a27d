"""The plan's word on the verifiers: how they do on the first problems of each source, before any teacher is asked."""

from __future__ import annotations

from pathlib import Path

from stillhouse.jobs.model_facts import is_path
from stillhouse.jobs.recipe import Recipe
from stillhouse.jobs.recipe_problems import AnySource, DatasetSource, FileSource, ReasoningGymSource
from stillhouse.jobs.recipe_teacher import ReplayTeacher
from stillhouse.jobs.sources import SPLITS, evaluation_set_identities, read_source, require_sound, self_checks
from stillhouse.pipeline.errors import StillhouseError

FIRST_PROBLEMS = 50
"""Problems of each source that the plan looks at; `stillhouse verify --self-test` and the run itself take all golds."""


def verifier_lines(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Let the verifiers prove themselves on the first problems of each source that is on this machine.

    Returns:
        a line for each source, and a line for each reason why a run would refuse them.
    """
    lines: list[str] = []
    refused: list[str] = []
    try:
        evaluation_set_identities(recipe)
    except StillhouseError as error:
        refused.append(str(error))
    for split in SPLITS:
        for source in getattr(recipe.problems, split):
            first = _first_of(source)
            if first is None:
                if isinstance(source, DatasetSource):
                    lines.append(f"{split}: {source.name}: not measured, as a plan downloads nothing")
                continue  # a file that is not there is among what is missing already
            try:
                checks = self_checks(read_source(first, split), split, max_mutated=FIRST_PROBLEMS)
                lines += [f"{name}: {check.line()}" for name, check in checks.items()]
                require_sound(checks, split)
            except StillhouseError as error:
                refused.append(str(error))
    if isinstance(recipe.teacher, ReplayTeacher):
        lines.append(
            "train: not measured, as its problems come with the traces; `stillhouse verify --self-test` reads them all"
        )
    return lines, refused


def _first_of(source: AnySource) -> AnySource | None:
    """The source cut to its first problems; None where it is not on this machine."""
    if isinstance(source, ReasoningGymSource):
        return source.model_copy(update={"size": min(source.size, FIRST_PROBLEMS)})
    if isinstance(source, FileSource) and not Path(source.path).is_file():
        return None
    if isinstance(source, DatasetSource) and not (is_path(source.name) and Path(source.name).exists()):
        return None
    return source.model_copy(update={"limit": min(source.limit or FIRST_PROBLEMS, FIRST_PROBLEMS)})
