"""A fault server in a process of its own, so that it takes no time from the client that it drills."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.pipeline.errors import TeacherError
from stillhouse.teachers.fault_plan import FaultPlan

_START_S = 30


@dataclass(frozen=True)
class RunningFaultServer:
    """A fault server in a process of its own."""

    base_url: str
    pid: int

    def endpoint(self, name: str) -> str:
        """The base URL of one more endpoint of this server, with Retry-After gates of its own."""
        return f"{self.base_url.removesuffix('/v1')}/{name}/v1"


@contextlib.contextmanager
def running_fault_server(
    plan: FaultPlan, *, ledger: Path | None = None, upstream: str | None = None, options: Mapping[str, Any] | None = None
) -> Iterator[RunningFaultServer]:
    """Run a fault server in a process of its own while the context lasts.

    Args:
        options: more of the command's options by name, such as ``{"mean-characters": 500, "latency-ms": 5}``.

    Raises:
        TeacherError: it did not start.
    """
    said = {
        "fault-rate": plan.rate,
        "seed": plan.seed,
        "faults": ",".join(f"{name}:{weight!r}" for name, weight in plan.weights.items()),
        "retry-after-s": "-".join(map(repr, plan.retry_after_s)),
        "stall-s": plan.stall_s,
        "slow-s": plan.slow_s,
        **({"ledger": ledger} if ledger else {}),
        **({"upstream": upstream} if upstream else {}),
        **(options or {}),
    }
    command = [
        sys.executable,
        "-m",
        "stillhouse.teachers.fault_server",
        "--ends-with-parent",
        *(f"--{name}={value}" for name, value in said.items()),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            if not line:
                raise TeacherError(f"the fault server ended with {process.wait(_START_S)} before it served; run {command}")
            started = json.loads(line)
            yield RunningFaultServer(started["base_url"], process.pid)
        finally:
            process.terminate()
            try:
                process.wait(_START_S)
            except subprocess.TimeoutExpired:
                process.kill()
