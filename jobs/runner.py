"""A run from its recipe to its report: the stages in order, each skipped where its output is committed already."""

from __future__ import annotations

import os
from pathlib import Path

from stillhouse.jobs.filtering import filter_stage
from stillhouse.jobs.probing import probe_stage
from stillhouse.jobs.progress import Reporter
from stillhouse.jobs.recipe import Recipe
from stillhouse.jobs.reporting import report_stage
from stillhouse.jobs.run_state import RunState
from stillhouse.jobs.stages import (
    evaluate_stages,
    examples_stage,
    problems_stage,
    quantize_stage,
    train_stage,
)
from stillhouse.jobs.traces import traces_stage
from stillhouse.pipeline.errors import ClusterError, RecipeError
from stillhouse.pipeline.report import Report
from stillhouse.pipeline.store import RunStore, write_atomic

STAGES = (
    problems_stage,
    traces_stage,
    probe_stage,
    filter_stage,
    examples_stage,
    train_stage,
    quantize_stage,
    evaluate_stages,
)

WORK_OF_COMMAND: dict[str, tuple[set[str], int]] = {
    "generate": ({"problems", "traces"}, 2),
    "filter": ({"probe", "filter"}, 4),
    "train": ({"examples", "train"}, 6),
    "quantize": ({"quantize"}, 7),
    "validate": ({"evaluate"}, 8),
    "report": (set(), 8),
}
"""What one command may do, and how many of the stages it walks."""


def run_recipe(
    recipe: Recipe, out: str | Path, reporter: Reporter, *, address: str | None = None, command: str = "run"
) -> Report | None:
    """Walk the stages of a recipe in the folder ``out``, all of them or those of one command.

    Args:
        out: the run's folder; with the folder of an earlier run, committed stages are not done again.
        address: the Ray cluster to join; None starts a local Ray.
        command: ``run`` for everything; else a key of `WORK_OF_COMMAND`: earlier stages must be committed.

    Returns:
        The report after ``run``, ``validate`` and ``report``; None after the others.

    Raises:
        StillhouseError: what stopped the run, in a sentence; everything committed stays.
    """
    only, num_stages = (None, len(STAGES)) if command == "run" else WORK_OF_COMMAND[command]
    if command not in ("run", "generate") and not Path(out).is_dir():
        raise RecipeError(f"{out} is not a run's folder; run `stillhouse generate` or `stillhouse run` first, or correct --out")
    store = RunStore(out)
    with _one_run_at_a_time(store), RunState(recipe, store, reporter, address=address, only=only) as run:
        for stage in STAGES[:num_stages]:
            stage(run)
            # After the first stage that fits: a recipe that does not belong here leaves the folder as it was.
            write_atomic(store.path("recipe.yaml"), recipe.to_yaml().encode())
        if command in ("run", "validate", "report"):
            return report_stage(run)
    return None


class _one_run_at_a_time:
    """A lock on the run's folder that a killed process gives back by dying."""

    def __init__(self, store: RunStore):
        self._path = store.path(".lock")

    def __enter__(self) -> None:
        import fcntl

        self._file = self._path.open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ClusterError(
                f"another run is at work in {self._path.parent}; wait for it, stop it, or give another folder with --out"
            ) from error
        self._file.write(str(os.getpid()))

    def __exit__(self, *_: object) -> None:
        self._file.close()
