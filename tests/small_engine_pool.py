"""Engine pools with the tiny teacher, as small as they get, and a client that asks while something happens to them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from stillhouse.jobs.engines import EnginePool
from stillhouse.teachers.endpoint import Endpoints
from stillhouse.teachers.engine_commands import EngineSpec
from tests.chaos.engines import TINY, demo_problems, through_endpoints

SPEC = EngineSpec("transformers_serve", str(TINY), dtype="float32")


def servers(folder: Path) -> list[psutil.Process]:
    """The engines' own servers that log into ``folder``, wherever they were started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            if len(words) > 3 and words[2].endswith("engine_watch.py") and words[3].startswith(str(folder)):
                found += process.children()
    return found


def pool_of(
    ray: Any, folder: Path, endpoints: Endpoints, *, replicas: int = 1, spec: EngineSpec = SPEC, **settings: Any
) -> EnginePool:
    """A pool whose URLs a client gets, with short beats."""
    return EnginePool(
        ray,
        spec,
        replicas=replicas,
        gpus_per_replica=0,
        cpus_per_replica=1,
        on_up=endpoints.add,
        on_down=endpoints.remove,
        on_failed=lambda error: endpoints.stop(str(error)),
        log_folder=str(folder),
        beat_s=0.3,
        **settings,
    )


def ask_while(endpoints: Endpoints, count: int, happens: Callable[[], object], *, after: int = 1) -> None:
    """Ask for ``count`` traces; when ``after`` of them are there, ``happens`` once. All have to come."""
    problems, sampling = demo_problems(count)
    happened = []

    def on_trace(number: int) -> None:
        if number == after:
            happens()
            happened.append(number)

    asking = through_endpoints(SPEC, endpoints, problems, sampling, max_concurrent=4, on_trace=on_trace)
    traces = asyncio.run(asking)
    assert happened
    assert len({trace.key for trace in traces}) == len(problems)
