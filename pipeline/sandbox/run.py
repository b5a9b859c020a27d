"""Run one program in the sandbox from start to end: ``run_sandboxed``."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Mapping, Sequence

from stillhouse.pipeline.sandbox.probe import require
from stillhouse.pipeline.sandbox.process import SandboxProcess
from stillhouse.pipeline.sandbox.records import KilledFor, Limits, Route, SandboxResult, Tier

WATCH_S = 0.02
"""How often the memory of all processes together is looked at, seconds."""


def run_sandboxed(
    files: Mapping[str, bytes | str],
    argv: Sequence[str],
    stdin: bytes | str = b"",
    *,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    tier: Tier = "strict",
) -> SandboxResult:
    """Run a Python program shut off from this machine and return what it wrote and how it ended.

    Args:
        files: path relative to the program's work folder, and content. The folder is its current one and the only writable one.
        argv: what follows the interpreter on the command line: ``("main.py",)``, ``("-c", "print(1)")``.
        stdin: what it can read from standard input, which is a file (not a pipe) as when a judge redirects one, and again
            under ``/dev/stdin``.
        limits: what it may use up; a program past a limit is killed with everything it started.
        tier: how it is shut off; anything but ``strict`` is unsafe and has to be asked for by name.

    Raises:
        SandboxUnavailable: this machine does not give the tier. Nothing has been run.
        ValueError: a file name that leads out of the work folder.
    """
    return run_by_route(files, argv, stdin, limits=limits, tier=tier, route=require(tier))


def run_by_route(
    files: Mapping[str, bytes | str],
    argv: Sequence[str],
    stdin: bytes | str,
    *,
    limits: Limits,
    tier: Tier,
    route: Route | None,
) -> SandboxResult:
    """As ``run_sandboxed``, by a given route and without asking the probe: what the probe itself runs by."""
    given = stdin.encode() if isinstance(stdin, str) else stdin
    outputs = {1: bytearray(), 2: bytearray()}
    killed_for: KilledFor = ""
    with (
        SandboxProcess(files, argv, given, limits=limits, tier=tier, route=route) as process,
        selectors.DefaultSelector() as selector,
    ):
        process.wait_until_started()
        selector.register(process.stdout, selectors.EVENT_READ, 1)
        selector.register(process.stderr, selectors.EVENT_READ, 2)
        deadline = process.started + limits.wall_s
        look_again = process.started + WATCH_S
        while process.poll() is None and not killed_for:
            now = time.monotonic()
            if now >= deadline:
                killed_for = "time"
            elif now >= look_again:
                look_again = now + WATCH_S
                killed_for = "memory" if process.over_memory() else "files" if process.over_files() else ""
            pause_s = min(WATCH_S, max(0, deadline - now))
            if selector.get_map():
                _read(selector, pause_s, outputs)
            else:  # a program may close its pipes and go on, so their end is not its end
                process.wait(pause_s)
            killed_for = killed_for or _flooded(outputs, limits)
        status = process.kill() if killed_for else process.poll()
        seconds = time.monotonic() - process.started
        if not killed_for:
            while selector.get_map():  # what is left in the pipes of a dead program
                _read(selector, 0, outputs)
    killed_for = killed_for or _flooded(outputs, limits)
    if not killed_for and process.out_of_cpu(status):
        killed_for = "cpu"
    stdout = bytes(outputs[1][: limits.output_bytes])
    stderr = bytes(outputs[2][: limits.error_bytes])
    return SandboxResult(stdout, stderr, status, killed_for in ("time", "cpu"), killed_for, seconds, process.setup_seconds)


def _flooded(outputs: dict[int, bytearray], limits: Limits) -> KilledFor:
    return "output" if len(outputs[1]) > limits.output_bytes or len(outputs[2]) > limits.error_bytes else ""


def _read(selector: selectors.BaseSelector, timeout_s: float, outputs: dict[int, bytearray]) -> None:
    """Read what the outputs have; one that has ended is forgotten."""
    for key, _ in selector.select(timeout_s):
        chunk = os.read(key.fd, 1 << 16)
        outputs[key.data] += chunk
        if not chunk:
            selector.unregister(key.fileobj)
