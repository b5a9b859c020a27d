"""The chat servers of a recipe's teacher for as long as they are needed: an endpoint, or engines that Ray starts on workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.jobs.engines import EnginePool
from stillhouse.jobs.recipe_teacher import EndpointTeacher, EngineTeacher
from stillhouse.jobs.run_state import RunState
from stillhouse.jobs.serve_llm import serving, serving_arguments
from stillhouse.jobs.sources import resolve_teacher, teacher_sampling
from stillhouse.pipeline.errors import ClusterError
from stillhouse.pipeline.records import Sampling
from stillhouse.pipeline.trace_store.writer import TraceWriter
from stillhouse.teachers.api_key import key_from_environment, key_from_file
from stillhouse.teachers.endpoint import ChatClient, Endpoints, TimeLimits
from stillhouse.teachers.engine_commands import EngineSpec, model_name, request_sampling
from stillhouse.teachers.loops import LoopDetector


@dataclass(frozen=True, slots=True)
class Servers:
    """A client that reaches the teacher's servers.

    Args:
        sampling: what the client is to ask them for, so that they draw as the recipe says.
        max_in_flight: requests that all servers together take at once.
        served: which code computes completions, and where, in words.
        failed: done, with the error, when none of them will come up again.
    """

    client: ChatClient
    sampling: Sampling
    max_in_flight: int
    served: dict[str, str]
    failed: asyncio.Future[None]


@asynccontextmanager
async def running_servers(run: RunState, writer: TraceWriter) -> AsyncIterator[Servers]:
    """Start what has to be started, wait until it answers, and stop it again.

    Raises:
        TeacherError: no key, or a server that does not come up.
    """
    teacher, sampling = run.recipe.teacher, teacher_sampling(run.recipe)
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    stop_when = LoopDetector() if teacher.stream and teacher.stop_loops else None

    def note(sentence: str) -> None:
        run.reporter.note(f"  {sentence}")

    if isinstance(teacher, EndpointTeacher):
        limits = TimeLimits(
            teacher.connect_timeout_s, teacher.first_byte_timeout_s, teacher.idle_timeout_s, teacher.total_timeout_s
        )
        async with ChatClient(
            Endpoints([teacher.base_url]),
            teacher.model,
            ledger=writer,
            api_key=read_key(teacher),
            max_concurrent=teacher.max_concurrent,
            limits=limits,
            max_attempts=teacher.max_attempts,
            stream=teacher.stream,
            stop_when=stop_when,
            extra_body=teacher.extra_body,
            note=note,
        ) as client:
            served = {"path": f"endpoint at {teacher.base_url}", "device": "not known"}
            yield Servers(client, sampling, teacher.max_concurrent, served, failed)
        return
    spec, endpoints = engine_spec(teacher), Endpoints([])
    plain, extra_body = request_sampling(spec, sampling)
    # An engine that answers one request after another gets the next one before it is done, and not hundreds to let wait.
    at_once = teacher.max_concurrent if spec.answers_side_by_side else min(teacher.max_concurrent, 2)
    max_in_flight = at_once * teacher.replicas
    async with (
        _engines(run, teacher, spec, endpoints, failed) as served,
        ChatClient(
            endpoints,
            model_name(spec),
            ledger=writer,
            max_concurrent=max_in_flight,
            stream=teacher.stream,
            stop_when=stop_when,
            extra_body=extra_body,
            note=note,
        ) as client,
    ):
        yield Servers(client, plain, max_in_flight, served, failed)


def engine_spec(teacher: EngineTeacher) -> EngineSpec:
    """What an engine's server is started with."""
    return EngineSpec(
        engine=teacher.kind,
        model=resolve_teacher(teacher.model),
        revision=teacher.revision,
        dtype=teacher.dtype,
        tensor_parallel=teacher.tensor_parallel,
        pipeline_parallel=teacher.pipeline_parallel,
        max_model_len=teacher.max_model_len,
        gpu_memory_utilization=teacher.gpu_memory_utilization,
        max_concurrent=teacher.max_concurrent,
        python=teacher.engine_python,
        extra_args=teacher.engine_args,
    )


def ray_serve_arguments(teacher: EngineTeacher) -> dict[str, Any]:
    """What Ray Serve LLM is asked for."""
    return serving_arguments(
        engine_spec(teacher), replicas=teacher.replicas, gpus=bool(teacher.num_gpus), accelerator_type=teacher.accelerator
    )


@asynccontextmanager
async def _engines(
    run: RunState, teacher: EngineTeacher, spec: EngineSpec, endpoints: Endpoints, failed: asyncio.Future[None]
) -> AsyncIterator[dict[str, str]]:
    """The recipe's engines; ``endpoints`` is told which of them are up."""
    loop, ray = asyncio.get_running_loop(), run.ray

    def give_up(error: ClusterError) -> None:
        loop.call_soon_threadsafe(lambda: failed.done() or failed.set_exception(error))

    engines: Any
    if teacher.on_ray_serve:
        engines = serving(ray, ray_serve_arguments(teacher), spec)
    else:
        engines = EnginePool(
            ray,
            spec,
            replicas=teacher.replicas,
            gpus_per_replica=teacher.num_gpus,
            cpus_per_replica=run.recipe.cluster.cpus_per_teacher_actor,
            on_up=lambda url: loop.call_soon_threadsafe(endpoints.add, url),
            on_down=lambda url: loop.call_soon_threadsafe(endpoints.remove, url),
            on_failed=give_up,
            note=lambda sentence: run.reporter.note(f"  {sentence}"),
            start_limit_s=teacher.startup_timeout_s,
        )
    # Loading takes minutes; in a thread, so that an interrupt is heard.
    started = await asyncio.to_thread(engines.__enter__)
    if teacher.on_ray_serve:
        endpoints.add(started)
    through = "Ray Serve LLM" if teacher.on_ray_serve else "its own server"
    width = teacher.num_gpus or 1
    try:
        yield {
            "path": f"{teacher.kind} through {through}, {teacher.replicas} × {width} {'GPU' if teacher.num_gpus else 'CPU'}",
            "device": "GPU" if teacher.num_gpus else "CPU",
        }
    finally:
        await asyncio.to_thread(engines.__exit__, None, None, None)


def read_key(teacher: EndpointTeacher) -> str:
    """The endpoint's key, from where the recipe says; "" where it says nothing.

    Raises:
        TeacherError: it is not there, or holds what cannot be a key. The message never repeats it.
    """
    if teacher.api_key_file:
        return key_from_file(Path(teacher.api_key_file), base_url=teacher.base_url)
    if teacher.api_key_env:
        return key_from_environment(teacher.api_key_env, base_url=teacher.base_url)
    return ""
