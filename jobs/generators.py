"""Completions on Ray: a pool of actors, each with a model in it, and work handed to whichever is free.

`GeneratorSpec` says which model and how it is run; `GeneratorPool` starts the actors and yields batches as they finish,
in whatever order they finish. The teacher's traces and every evaluation go through the same pool.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from stillhouse.jobs.cluster import meant_error
from stillhouse.pipeline.errors import ClusterError, RecipeError, first_line
from stillhouse.pipeline.records import Completion, Sampling

if TYPE_CHECKING:
    from stillhouse.teachers.local import TransformersGenerator

Item = TypeVar("Item")
LOAD_ATTEMPTS = 5
"""Deaths of one actor while it loads its model, after which something must be wrong with it."""


@dataclass(frozen=True, slots=True)
class GeneratorSpec:
    """What one actor loads.

    Args:
        model: folder or hub name.
        batch_size: completions under way at once in one actor.
        num_gpus: GPUs one actor asks Ray for.
        kernels: run a 4-bit checkpoint's layers on our own kernels instead of the loader's.
    """

    model: str
    revision: str | None = None
    dtype: str = "bfloat16"
    batch_size: int = 16
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    kernels: bool = False


def build_generator(spec: GeneratorSpec) -> TransformersGenerator:
    """Load what ``spec`` names, in this process."""
    from stillhouse.teachers.local import TransformersGenerator

    return TransformersGenerator(
        spec.model,
        dtype=spec.dtype,
        batch_size=spec.batch_size,
        revision=spec.revision,
        adapt=_put_on_kernels if spec.kernels else None,
    )


def _put_on_kernels(model: Any) -> None:
    from stillhouse.kernels.swap import swap_to_kernels

    try:
        swap_to_kernels(model)
    except ValueError as error:
        raise RecipeError(
            f"the checkpoint cannot run on our kernels: {first_line(error)}. Set gate.kernels=false to measure it as "
            "transformers loads it, and not on our kernels"
        ) from error


class _GeneratorActor:
    """Lives in a Ray worker; holds one loaded generator.

    The model is loaded by the first call and not by the constructor: what a constructor raises reaches the driver as text
    only, and a restarted actor loads again by itself.
    """

    def __init__(self, spec: GeneratorSpec, num_threads: int):
        self._spec = spec
        self._num_threads = num_threads
        self._generator: TransformersGenerator | None = None

    def load(self) -> None:
        """Load the model, once."""
        if self._generator is None:
            import torch

            torch.set_num_threads(self._num_threads)
            self._generator = build_generator(self._spec)

    def complete(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> tuple[list[Completion], float]:
        """Completions in the prompts' order, and seconds."""
        self.load()
        started = time.monotonic()
        return self._generator.complete(prompts, seeds, sampling), time.monotonic() - started

    def served(self) -> dict[str, str]:
        """Which code computes completions in this worker, and where, in words: the driver's machine may be another."""
        from stillhouse.students.served import describe_device, describe_path

        self.load()
        return {"path": describe_path(self._generator.model), "device": describe_device(self._generator.model)}


class GeneratorPool:
    """``num_actors`` Ray actors with the same model. Use as a context manager; actors end with it.

    In the place of an actor that died a new one is started, and the batch it had is handed out again.
    """

    def __init__(self, ray: Any, spec: GeneratorSpec, *, num_actors: int):
        self._ray = ray
        self._spec = spec
        self._actors = [self._start() for _ in range(num_actors)]
        self._worked: list[Any] = []

    def _start(self) -> Any:
        # The model is loaded by its first call: see _GeneratorActor.
        actor_class = self._ray.remote(num_cpus=self._spec.num_cpus, num_gpus=self._spec.num_gpus)(_GeneratorActor)
        return actor_class.remote(self._spec, max(1, round(self._spec.num_cpus)))

    def __enter__(self) -> GeneratorPool:
        try:
            self._load()
        except Exception as error:  # whatever a worker raises while it loads: said in the user's terms
            self.__exit__()
            raise meant_error(error) from error
        return self

    def _load(self) -> None:
        """Wait until every actor has its model; one whose worker or node dies meanwhile is replaced."""
        loading = [(actor, actor.load.remote(), 1) for actor in self._actors]
        while loading:
            actor, reference, attempt = loading.pop(0)
            try:
                self._ray.get(reference)
            except self._ray.exceptions.RayActorError:
                if attempt == LOAD_ATTEMPTS:
                    raise
                self._actors.remove(actor)
                self._actors.append(actor := self._start())
                loading.append((actor, actor.load.remote(), attempt + 1))

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor)

    def served(self) -> dict[str, str]:
        """Which code computed the completions, and where; asked in the workers that made some, so ask after the work.

        Workers on unlike machines are all named. One that died since cannot say, and its work stands.
        """
        found = []
        for actor in self._worked:
            try:
                found.append(self._ray.get(actor.served.remote()))
            except self._ray.exceptions.RayActorError:
                found.append({"path": "not known: the worker died after its work", "device": "not known"})
        return {key: " or ".join(dict.fromkeys(answer[key] for answer in found)) or "nothing" for key in ("path", "device")}

    def map(
        self,
        next_batch: Callable[[], Sequence[Item]],
        *,
        prompts: Callable[[Sequence[Item]], Sequence[str]],
        seeds: Callable[[Sequence[Item]], Sequence[int]],
        sampling: Sampling,
        begin_again: Callable[[Sequence[Item]], bool] | None = None,
        attempts: int = 6,
    ) -> Iterator[tuple[Sequence[Item], list[Completion], float]]:
        """Complete batches; yields ``(batch, completions, seconds)`` as each finishes.

        After a failure nothing new is handed out; what was under way is yielded before the error is raised: it was paid for.
        One batch an actor is under way, so that a crash of everything loses at most ``num_actors`` batches.

        Args:
            next_batch: called when an actor is free. An empty batch says that there is nothing now; it is asked again after the
                next batch has finished, and the work ends when it has nothing and none is under way.
            begin_again: called when a batch is about to be handed out once more, for a ledger; False drops it.
            attempts: how often a batch is handed out when its actor dies under it.
        """
        free = list(self._actors)
        under_way: dict[Any, tuple[Any, Sequence[Item], int]] = {}

        def hand_out(actor: Any, batch: Sequence[Item], attempt: int) -> None:
            reference = actor.complete.remote(list(prompts(batch)), list(seeds(batch)), sampling)
            under_way[reference] = (actor, batch, attempt)

        stopped: Exception | None = None
        while True:
            while stopped is None and free and (batch := next_batch()):
                hand_out(free.pop(), batch, 1)
            if not under_way:
                if stopped is not None:
                    raise stopped
                return
            done, _ = self._ray.wait(list(under_way), num_returns=1)
            actor, batch, attempt = under_way.pop(done[0])
            try:
                completed, seconds = self._ray.get(done[0])
            except self._ray.exceptions.RayActorError:
                self._actors.remove(actor)
                self._actors.append(actor := self._start())
                actor.load.remote()
                if attempt < attempts:
                    free.append(actor)
                    if begin_again is None or begin_again(batch):
                        hand_out(free.pop(), batch, attempt + 1)
                else:
                    stopped = ClusterError(
                        f"a worker with {self._spec.model!r} died {attempts} times on the same batch; it may be out of memory: "
                        "lower teacher.batch_size (or gate.batch_size), or give the actors more"
                    )
                continue
            except self._ray.exceptions.RayTaskError as error:
                stopped = meant_error(error)
                continue
            free.append(actor)
            if actor not in self._worked:
                self._worked.append(actor)
            yield batch, completed, seconds


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Cut a sequence into pieces of ``size``, the last one shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
