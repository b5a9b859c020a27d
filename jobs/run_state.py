"""What every stage of one run shares: the recipe, the store, Ray when it is needed, and where progress goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.jobs.cluster import meant_error, ray_session
from stillhouse.jobs.progress import Reporter
from stillhouse.jobs.recipe import Recipe
from stillhouse.jobs.sources import teacher_resources
from stillhouse.pipeline.errors import ClusterError, RecipeError
from stillhouse.pipeline.records import Problem
from stillhouse.pipeline.store import RunStore, StageManifest, fingerprint

COMMAND_OF_STAGE = {
    "problems": "generate",
    "traces": "generate",
    "probe": "filter",
    "filter": "filter",
    "examples": "train",
    "train": "train",
    "quantize": "quantize",
    "evaluate": "validate",
    "report": "report",
}
"""Which command runs a stage, for the message when an earlier one is missing."""


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What a stage's work gives back: the files it wrote and what it counted."""

    files: tuple[Path, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)


class RunState:
    """One run under way.

    Args:
        recipe: the resolved recipe.
        store: the run's folder.
        reporter: where progress is shown.
        address: the Ray cluster to join; None starts a local one when the first stage needs it.
        only: stages that may do work; None allows all. A stage outside it must be committed already.
    """

    def __init__(
        self, recipe: Recipe, store: RunStore, reporter: Reporter, *, address: str | None = None, only: set[str] | None = None
    ):
        self.recipe = recipe
        self.store = store
        self.reporter = reporter
        self.manifests: dict[str, StageManifest] = {}
        self._address = address
        self._only = only
        self._stack = ExitStack()
        self._ray: Any = None

    def __enter__(self) -> RunState:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    @property
    def ray(self) -> Any:
        """Ray, started or joined at first use: a run whose stages are all committed needs none."""
        if self._ray is None:
            cluster = self.recipe.cluster
            actors, cpus, _ = teacher_resources(self.recipe)
            wanted = max(
                actors * cpus,
                max(1, cluster.train_workers) * cluster.cpus_per_train_worker,
            )
            session = ray_session(self._address, object_store_mb=cluster.object_store_mb, num_cpus=wanted)
            self._ray = self._stack.enter_context(session)
            self._look_at_resources()
        return self._ray

    def _look_at_resources(self) -> None:
        """Say what Ray would wait for in silence: here that is an error, on a cluster a larger node may yet join."""
        cluster, workers = self.recipe.cluster, max(1, self.recipe.cluster.train_workers)
        actors, cpus, gpus = teacher_resources(self.recipe)
        asked = {
            "cluster.cpus_per_teacher_actor": ("CPU", cpus, actors),
            "cluster.gpus_per_teacher_actor": ("GPU", gpus, actors),
            "cluster.cpus_per_train_worker": ("CPU", cluster.cpus_per_train_worker, workers),
            "cluster.gpus_per_train_worker": ("GPU", cluster.gpus_per_train_worker, workers),
        }
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if self._address is not None:
            total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
            head = self._ray.get_runtime_context().gcs_address
            self.reporter.note(f"Ray: joined {head} ({len(nodes)} nodes, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs)")
        for key, (resource, amount, count) in asked.items():
            most = max((node.get(resource, 0) for node in nodes), default=0)
            whole = sum(node.get(resource, 0) for node in nodes)
            if amount <= most and amount * count <= whole:
                continue
            has = f"{key}={amount:g} for {count} of them, and there are {whole:g} {resource}s, {most:g} on the largest node"
            if self._address is None:
                raise ClusterError(f"{has}: this machine cannot run that; lower {key} or their number, or give --address")
            self.reporter.note(f"{has}: the run waits until more join; lower {key} or their number if none will")

    def on_worker(self, function: Callable[..., Any], *arguments: Any, num_cpus: float = 1, num_gpus: float = 0) -> Any:
        """Call a function in a Ray task and wait; what it raises comes back as the user's error."""
        task = self.ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=1)(function)
        try:
            return self.ray.get(task.remote(*arguments))
        except self.ray.exceptions.RayError as error:
            raise meant_error(error) from error

    def stage(
        self,
        name: str,
        *,
        kind: str,
        code_version: int,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        work: Callable[[str], StageOutput],
    ) -> StageManifest:
        """Run one stage unless its output is committed under the same fingerprint.

        Args:
            name: the manifest's name; ``kind`` its entry in `COMMAND_OF_STAGE`.
            settings: what of the recipe decides the output, and nothing else.
            inputs: fingerprints of what it reads.
            work: does it; gets the fingerprint.

        Raises:
            RecipeError: the stage may not run in this command and is not committed.
        """
        print_ = fingerprint(name, code_version, settings, inputs)
        manifest = self.store.committed_stage(name, print_)
        if manifest is not None:
            self.reporter.note(f"{name}: committed already")
        else:
            if self._only is not None and kind not in self._only:
                stale = self.store.path("stages", f"{name}.json").exists()
                why = "was made with other settings or inputs" if stale else "has not been made"
                command = COMMAND_OF_STAGE[kind]
                paid = ", which asks its teacher for no trace that is there," if command == "generate" and stale else ""
                raise RecipeError(
                    f"{self.store.root} has no {name} for this recipe: it {why}. Run `stillhouse {command}`{paid} with the "
                    "same recipe and --out first, or `stillhouse run` for all stages"
                )
            # What is on disk is about to change: the old manifest must not vouch for it any longer.
            self.store.revoke_stage(name)
            started = time.monotonic()
            with self.reporter.stage(name):
                output = work(print_)
            manifest = StageManifest(
                stage=name,
                fingerprint=print_,
                outputs=self.store.outputs(output.files),
                counts=dict(output.counts),
                seconds=round(time.monotonic() - started, 3),
            )
            self.store.commit_stage(manifest)
        self.manifests[name] = manifest
        return manifest


def read_problems(run: RunState) -> list[Problem]:
    """The problems of every split, as the problems stage committed them."""
    return run.store.read("problems", Problem)
