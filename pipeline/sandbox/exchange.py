"""Let two sandboxes talk, the program's and the tests', and take the tests' verdict: ``judge_calls``.

This process only carries lines: from the tests' sandbox to the program's the calls, back the answers, and out the verdict,
which the program's sandbox has no way to write.
"""

from __future__ import annotations

import json
import os
import selectors
import time
from dataclasses import dataclass
from pathlib import Path

from stillhouse.pipeline.sandbox.probe import require
from stillhouse.pipeline.sandbox.process import SandboxProcess
from stillhouse.pipeline.sandbox.records import KilledFor, Limits, Tier
from stillhouse.pipeline.sandbox.run import WATCH_S

_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Exchange:
    """How a function-style check ended.

    Args:
        outcome: what the tests' side said, or "" where it could not say.
        reason: its words.
        program_status: exit status of the program's process where that ended before it had answered; None otherwise.
        killed_for: the limit that ended it.
    """

    outcome: str
    reason: str
    program_status: int | None
    killed_for: KilledFor


def judge_calls(program: str, tests: str, entry_point: str, setup: str, *, limits: Limits, tier: Tier = "strict") -> Exchange:
    """Run tests against a program, each in its own sandbox; ``tests_side.py`` says what can cross.

    Args:
        program: the source that a model wrote.
        tests: Python with asserts; it may define ``check(candidate)`` or ``test_*`` functions, which are then called.
        entry_point: the expression that is handed to ``check``: a name, or ``Solution().method``. May be "".
        setup: source that both sides run first, for classes that cross between them.
        limits: for each of the two; ``wall_s`` for both together, from the moment both have started.

    Raises:
        SandboxUnavailable: this machine does not give the tier.
    """
    route = require(tier)
    folder = Path(__file__).parent
    # The work folder is on the interpreter's path there: these modules keep the names that they have here.
    ours = {
        side: {
            f"stillhouse/pipeline/sandbox/{name}.py": (folder / f"{name}.py").read_text()
            for name in (*names, "wire", "crossing")
        }
        for side, names in {"program": ("program_side",), "tests": ("tests_side", "tests_found")}.items()
    }
    both = {"setup.py": setup, "entry_point.txt": entry_point}
    program_files = ours["program"] | both | {"program.py": program}
    tests_files = ours["tests"] | both | {"tests.py": tests}
    tests_files["pytest.py"] = (folder / "pytest_in_tests.py").read_text()
    with (
        SandboxProcess(program_files, _argv("program_side", "serve"), limits=limits, tier=tier, route=route) as server,
        SandboxProcess(tests_files, _argv("tests_side", "judge"), limits=limits, tier=tier, route=route) as judge,
    ):
        server.wait_until_started()
        judge.wait_until_started()
        return _Conversation(server, judge, limits).run()


def _argv(module: str, function: str) -> tuple[str, str]:
    return "-c", f"from stillhouse.pipeline.sandbox.{module} import {function}; {function}()"


class _Conversation:
    def __init__(self, server: SandboxProcess, judge: SandboxProcess, limits: Limits):
        self.server, self.judge, self.limits = server, judge, limits
        self.waiting = {"server": bytearray(), "judge": bytearray()}  # what each is still to be given
        self.line = bytearray()
        self.carried = 0
        self.verdict: dict[str, object] | None = None
        self.judge_ended = False
        self.selector = selectors.DefaultSelector()

    def run(self) -> Exchange:
        with self.selector:
            for name in ("server", "judge"):
                process = getattr(self, name)
                self.selector.register(process.stdout, selectors.EVENT_READ, (name, "out"))
                self.selector.register(process.stderr, selectors.EVENT_READ, (name, "err"))
            killed_for = self._carry_until_over()
        if killed_for:
            return Exchange("", "", None, killed_for)
        if self.verdict is None:
            return Exchange("", f"the process that runs the tests ended by itself, status {self.judge.wait(5)}", None, "")
        if "ended" in self.verdict:
            status = self.server.wait(5)
            return Exchange("", "", status, "cpu" if self.server.out_of_cpu(status) else "")
        return Exchange(str(self.verdict["outcome"]), str(self.verdict["reason"]), None, "")

    def _carry_until_over(self) -> KilledFor:
        deadline = time.monotonic() + self.limits.wall_s
        look_again = 0.0
        while self.verdict is None and not self.judge_ended:
            now = time.monotonic()
            if now >= deadline:
                return "time"
            if now >= look_again:
                look_again = now + WATCH_S
                if self.server.over_memory() or self.judge.over_memory():
                    return "memory"
                if self.server.over_files():
                    return "files"
            if self.carried > self.limits.output_bytes:
                return "output"
            for key, _ in self.selector.select(min(WATCH_S, deadline - now)):
                name, direction = key.data
                if direction == "in":
                    self._write(name, key.fd)
                else:
                    self._read(name, direction, key)
        return ""

    def _read(self, name: str, direction: str, key: selectors.SelectorKey) -> None:
        chunk = os.read(key.fd, _CHUNK)
        if name == "server":
            self.carried += len(chunk)
        if not chunk:
            self.selector.unregister(key.fileobj)
            if direction == "out":
                self._ended(name)
        elif direction == "out" and name == "server":
            self._give("judge", chunk)
        elif direction == "out":
            *lines, rest = (self.line + chunk).split(b"\n")
            self.line = bytearray(rest)
            for line in lines:
                if line[:1] == b"v":
                    self.verdict = json.loads(line[1:])
                else:
                    self._give("server", line[1:] + b"\n")

    def _ended(self, name: str) -> None:
        if name == "judge":
            self.judge_ended = True
        elif not self.waiting["judge"]:
            self.judge.stdin.close()  # otherwise once it has been given the rest: see _write

    def _give(self, name: str, data: bytes) -> None:
        stdin = getattr(self, name).stdin
        if stdin.closed:
            return
        if not self.waiting[name]:
            self.selector.register(stdin, selectors.EVENT_WRITE, (name, "in"))
        self.waiting[name] += data

    def _write(self, name: str, fd: int) -> None:
        waiting = self.waiting[name]
        try:
            del waiting[: os.write(fd, waiting[:_CHUNK])]
        except BrokenPipeError:  # it has ended; its outputs say the rest
            waiting.clear()
        if not waiting:
            stdin = getattr(self, name).stdin
            self.selector.unregister(stdin)
            if name == "judge" and self.server.stdout not in self.selector.get_map():
                stdin.close()
