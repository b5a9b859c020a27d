"""What goes into a sandboxed run and what comes out: limits, result, tier, and the report of what this machine gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.pipeline.errors import StillhouseError

Tier = Literal["strict", "unsafe-confined", "unsafe-limits"]
"""``strict``: everything in this package's docstring. ``unsafe-confined``: seccomp, Landlock and limits, but the machine's own
namespaces. ``unsafe-limits``: limits and an empty environment only; the program can read and write what its user can."""

Route = Literal["own", "bubblewrap"]
"""Who makes the namespaces of the strict tier."""

KilledFor = Literal["", "time", "cpu", "memory", "files", "output"]


class SandboxUnavailable(StillhouseError, RuntimeError):
    """This machine cannot shut a program off as asked; the message says what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a program may use.

    Args:
        wall_s: seconds from its start to SIGKILL, for it and whatever it started.
        cpu_s: whole seconds of processor time a process; None is a second more than ``wall_s``, for each of 2 threads.
        memory_bytes: address space of a process, and resident memory of all of them together, which is looked at
            50 times a second.
        disk_bytes: size of /tmp, and of any one file.
        files: files in /tmp; where bubblewrap mounts it, watched from outside and not refused by the kernel.
        processes: processes and threads at the same time, the sandbox's own first process among them.
        open_files: file descriptors a process.
        output_bytes: of stdout; past it the program is killed.
        error_bytes: of stderr, likewise.
    """

    wall_s: float = 10.0
    cpu_s: int | None = None
    memory_bytes: int = 1 << 30
    disk_bytes: int = 64 << 20
    files: int = 4096
    processes: int = 32
    open_files: int = 128
    output_bytes: int = 16 << 20
    error_bytes: int = 16 << 20


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """How a program ended.

    Args:
        stdout, stderr: what it wrote, at most ``Limits.output_bytes`` and ``Limits.error_bytes``.
        exit_status: as a shell gives it, 128 + n where signal n ended it.
        timed_out: the wall clock or the processor time ran out.
        killed_for: which limit ended it: ``time``, ``cpu``, ``memory`` (of all processes together), ``files`` or ``output``; ""
            for none. A single process over its own memory or file limit gets an error from the kernel and ends as it likes.
        seconds: wall time from the program's start.
        setup_seconds: wall time before that, spent on the sandbox.
    """

    stdout: bytes
    stderr: bytes
    exit_status: int
    timed_out: bool
    killed_for: KilledFor
    seconds: float
    setup_seconds: float


@dataclass(frozen=True, slots=True)
class Check:
    """One escape that the probe tried: refused or not, and what was seen."""

    name: str
    refused: bool
    seen: str


@dataclass(frozen=True, slots=True)
class TierReport:
    """What this machine gives, found by trying.

    Args:
        tier: the strongest tier whose every check passed; None where nothing works.
        route: who makes the namespaces of the strict tier, None in a weaker one.
        layers: what stands in the way of a program, in words, absent layers with the reason.
        checks: each escape tried in the tier obtained.
        missing: why a stronger tier, or bubblewrap, was not taken; "" when nothing is missing.
    """

    tier: Tier | None
    route: Route | None
    layers: tuple[str, ...]
    checks: tuple[Check, ...]
    missing: str
