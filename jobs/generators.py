"""Completions on Ray: a pool of actors, each with a model in it, and work handed to whichever is free.

`GeneratorSpec` says which model and how it is run; `GeneratorPool` starts the actors and yields batches as they finish,
in whatever order they finish. The teacher's traces and every evaluation go through the same pool.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from stillhouse.jobs.cluster import meant_error
from stillhouse.pipeline.errors import ClusterError, PartialTeacherError, RecipeError, first_line
from stillhouse.pipeline.records import Completion, Sampling

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class GeneratorSpec:
    """What one actor loads.

    Args:
        kind: ``transformers`` (in process), ``vllm`` (an engine in the actor) or ``endpoint`` (an HTTP client).
        model: folder, hub name, or the endpoint's name for the model.
        batch_size: completions under way at once in one actor.
        num_gpus: GPUs one actor asks Ray for.
        kernels: run a 4-bit checkpoint's layers on our own kernels instead of the loader's.
    """

    kind: Literal["transformers", "vllm", "endpoint"]
    model: str
    revision: str | None = None
    dtype: str = "bfloat16"
    batch_size: int = 16
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    base_url: str = ""
    api_key_env: str | None = None
    tensor_parallel: int = 1
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    kernels: bool = False


def build_generator(spec: GeneratorSpec) -> Any:
    """Load what ``spec`` names, in this process. The result has ``complete(prompts, seeds, sampling)``."""
    if spec.kind == "endpoint":
        from stillhouse.teachers.endpoint import EndpointGenerator

        return EndpointGenerator(spec.base_url, spec.model, api_key_env=spec.api_key_env, max_concurrent=spec.batch_size)
    if spec.kind == "vllm":
        from stillhouse.teachers.vllm_engine import VllmGenerator

        return VllmGenerator(
            spec.model,
            dtype=spec.dtype,
            revision=spec.revision,
            tensor_parallel=spec.tensor_parallel,
            max_model_len=spec.max_model_len,
            gpu_memory_utilization=spec.gpu_memory_utilization,
        )
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


def describe_generator(spec: GeneratorSpec, generator: Any) -> dict[str, str]:
    """Which code computes a generator's completions, and where: ``path`` and ``device``, in words."""
    if spec.kind == "endpoint":
        return {"path": f"endpoint at {spec.base_url}", "device": "not known"}
    if spec.kind == "vllm":
        from importlib.metadata import version

        return {"path": f"vLLM {version('vllm')}", "device": "GPU"}
    from stillhouse.students.served import describe_device, describe_path

    return {"path": describe_path(generator.model), "device": describe_device(generator.model)}


class _GeneratorActor:
    """Lives in a Ray worker; holds one loaded generator.

    The model is loaded by the first call and not by the constructor: what a constructor raises reaches the driver as text
    only, and a restarted actor loads again by itself.
    """

    def __init__(self, spec: GeneratorSpec, num_threads: int):
        self._spec = spec
        self._num_threads = num_threads
        self._generator: Any = None

    def load(self, api_key: str = "") -> None:
        """Load the model. The driver hands an endpoint's key over: the worker's node need not have it, nor a log show it."""
        if self._generator is None:
            if api_key and self._spec.api_key_env:
                os.environ[self._spec.api_key_env] = api_key
            if self._spec.kind == "transformers":
                import torch

                torch.set_num_threads(self._num_threads)
            self._generator = build_generator(self._spec)

    def complete(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling
    ) -> tuple[dict[int, Completion], float, PartialTeacherError | None]:
        """Completions by their index, seconds, and the error that kept the rest from being completed."""
        self.load()
        started = time.monotonic()
        failure = None
        try:
            completed = dict(enumerate(self._generator.complete(prompts, seeds, sampling)))
        except PartialTeacherError as error:
            completed, failure = dict(error.completed), error
        return completed, time.monotonic() - started, failure

    def served(self) -> dict[str, str]:
        """`describe_generator` of what this worker holds: the driver's machine may be another."""
        self.load()
        return describe_generator(self._spec, self._generator)


class GeneratorPool:
    """``num_actors`` Ray actors with the same model. Use as a context manager; actors end with it.

    In the place of an actor that died a new one is started, and the batch it had is handed out again.
    """

    def __init__(self, ray: Any, spec: GeneratorSpec, *, num_actors: int):
        self._ray = ray
        self._spec = spec
        self._api_key = os.environ.get(spec.api_key_env, "") if spec.api_key_env else ""
        self._actors = [self._start() for _ in range(num_actors)]
        self._worked: list[Any] = []

    def _start(self) -> Any:
        # The model is loaded by its first call: see _GeneratorActor.
        actor_class = self._ray.remote(num_cpus=self._spec.num_cpus, num_gpus=self._spec.num_gpus)(_GeneratorActor)
        return actor_class.remote(self._spec, max(1, round(self._spec.num_cpus)))

    def __enter__(self) -> GeneratorPool:
        try:
            self._ray.get([actor.load.remote(self._api_key) for actor in self._actors])
        except Exception as error:  # whatever a worker raises while it loads: said in the user's terms
            self.__exit__()
            raise meant_error(error) from error
        return self

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
        batches: Iterable[Sequence[Item]],
        *,
        prompts: Callable[[Sequence[Item]], Sequence[str]],
        seeds: Callable[[Sequence[Item]], Sequence[int]],
        sampling: Sampling,
        before: Callable[[Sequence[Item]], None] | None = None,
        attempts: int = 3,
    ) -> Iterator[tuple[Sequence[Item], list[Completion], float]]:
        """Complete batches; yields ``(batch, completions, seconds)`` as each finishes.

        After a failure nothing new is handed out; what was under way, and what the failed batch had in it, is yielded before
        the error is raised: it was paid for.

        One batch an actor is under way, so that a crash of everything loses at most ``num_actors`` batches.

        Args:
            before: called when a batch is about to be handed out, for a ledger.
            attempts: how often a batch is handed out when its actor dies under it.
        """
        waiting = iter(batches)
        free = list(self._actors)
        under_way: dict[Any, tuple[Any, Sequence[Item], int]] = {}

        def hand_out(actor: Any, batch: Sequence[Item], attempt: int) -> None:
            if before:
                before(batch)
            reference = actor.complete.remote(list(prompts(batch)), list(seeds(batch)), sampling)
            under_way[reference] = (actor, batch, attempt)

        stopped: Exception | None = None
        while True:
            while stopped is None and free and (batch := next(waiting, None)) is not None:
                hand_out(free.pop(), batch, 1)
            if not under_way:
                if stopped is not None:
                    raise stopped
                return
            done, _ = self._ray.wait(list(under_way), num_returns=1)
            actor, batch, attempt = under_way.pop(done[0])
            try:
                completed, seconds, failure = self._ray.get(done[0])
            except self._ray.exceptions.RayActorError:
                self._actors.remove(actor)
                self._actors.append(actor := self._start())
                actor.load.remote(self._api_key)
                if attempt < attempts:
                    hand_out(actor, batch, attempt + 1)
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
            stopped = failure or stopped
            if completed:
                yield [batch[index] for index in completed], list(completed.values()), seconds


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Cut a sequence into pieces of ``size``, the last one shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
