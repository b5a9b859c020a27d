"""How far a run is and what its traces cost, read from its folder alone: no Ray, no effect on a run that is at work."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.jobs.recipe import load_recipe
from stillhouse.jobs.recipe_teacher import EngineTeacher, ReplayTeacher
from stillhouse.jobs.sources import teacher_resources
from stillhouse.jobs.traces import spool_of, trace_root_of
from stillhouse.pipeline.cost import Cost
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.trace_store.live import look_into_spool
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.pipeline.trace_store.totals import Totals

LEDGER = frozenset(Totals().to_json())
"""Counts of a stage that the line of the cost says."""


@dataclass(frozen=True)
class Status:
    """One run's state.

    Args:
        at_work: a process holds the run's lock.
        stages: committed stages with their counts and seconds, in the order in which they were committed.
        num_traces: traces on disk, sealed or still in the spool, of all settings that the folder was run with.
        num_under_way: calls under way; lost ones, if nothing is at work.
        cost: what the traces cost so far.
        caps: the recipe's budget, by name; only the caps that are set.
    """

    run: str
    at_work: bool
    stages: dict[str, dict[str, Any]]
    num_traces: int
    num_under_way: int
    cost: Cost
    caps: dict[str, float]


def read_status(folder: Path) -> Status:
    """Read a run's folder.

    Raises:
        RecipeError: it is none.
    """
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"{folder} is not a run's folder: it has no recipe.yaml; give what `stillhouse run` got as --out")
    recipe = load_recipe(folder / "recipe.yaml")
    manifests = sorted((folder / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime)
    stages = {path.stem: json.loads(path.read_text()) for path in manifests}
    root, totals, num_traces, under_way = trace_root_of(recipe, folder), Totals(), 0, 0
    if TraceStore.exists(root):
        store = TraceStore(root)
        totals, num_traces = store.totals(), store.num_rows
    if (spool := look_into_spool(spool_of(recipe, folder))) is not None:
        # The spool's counters go back to its first call; those in the store end with the last seal.
        totals = spool.totals if recipe.teacher.store or totals.num_calls <= spool.totals.num_calls else totals
        num_traces, under_way = num_traces + spool.num_unsealed, spool.num_under_way
    kept = stages.get("filter", {}).get("counts", {}).get("num_kept")
    caps = {} if isinstance(recipe.teacher, ReplayTeacher) else recipe.teacher.budget.model_dump()
    return Status(
        run=str(folder),
        at_work=_locked(folder / ".lock"),
        stages={name: {"counts": stage["counts"], "seconds": stage["seconds"]} for name, stage in stages.items()},
        num_traces=num_traces,
        num_under_way=under_way,
        cost=cost_of(recipe, totals, None if kept is None else int(kept)),
        caps={name: cap for name, cap in caps.items() if cap is not None},
    )


def cost_of(recipe: Any, totals: Totals, num_kept: int | None) -> Cost:
    """The cost of a recipe's traces: tokens by the endpoint's prices, GPU hours by the engine's."""
    actors, _, gpus = teacher_resources(recipe)
    rate = recipe.teacher.dollars_per_gpu_hour if isinstance(recipe.teacher, EngineTeacher) else 0.0
    return Cost.of(totals, num_kept=num_kept, num_gpus=actors * gpus, dollars_per_gpu_hour=rate)


def _locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def counts_text(counts: Mapping[str, float]) -> str:
    """What a stage counted, without what is zero and what the line of the cost says."""
    shown = {key: value for key, value in counts.items() if value and key not in LEDGER}
    return ", ".join(f"{key.removeprefix('num_').replace('_', ' ')} {value:,.6g}" for key, value in shown.items())


def status_text(status: Status) -> str:
    """The state as lines for a terminal."""
    lines = [f"{status.run}: {'at work' if status.at_work else 'nothing is at work'}", ""]
    for name, stage in status.stages.items():
        lines.append(f"{name:28} {stage['seconds']:8.1f} s  {counts_text(stage['counts'])}")
    lines += [""] if status.stages else ["no stage is committed yet", ""]
    under_way = f", {status.num_under_way:,} calls {'under way' if status.at_work else 'lost in flight'}"
    lines.append(f"traces  {status.num_traces:,} on disk{under_way if status.num_under_way else ''}")
    lines.append(f"cost    {status.cost.line()}")
    spent = {
        "max_dollars": f"${status.cost.dollars + status.cost.dollars_lost:,.2f}",
        "max_tokens": f"{status.cost.prompt_tokens + status.cost.completion_tokens + status.cost.tokens_lost:,}",
        "max_hours": f"{status.cost.hours:.2f}",
    }
    lines += [f"budget  {spent[name]} of {name}={cap:,g}" for name, cap in status.caps.items()]
    return "\n".join(lines)
