"""One sandboxed process: started by ``launcher.py``, spoken to over pipes, killed as a whole."""

from __future__ import annotations

import fcntl
import marshal
import math
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from stillhouse.pipeline.sandbox.cgroup import pids_cgroup
from stillhouse.pipeline.sandbox.landlock import landlock_version
from stillhouse.pipeline.sandbox.packages import VARIABLE as PACKAGES
from stillhouse.pipeline.sandbox.python_view import loader_environment, python_view
from stillhouse.pipeline.sandbox.records import Limits, Route, SandboxUnavailable, Tier
from stillhouse.pipeline.sandbox.seccomp import seccomp_filter

NOBODY = 65534
_START_LIMIT_S = 60.0
# The launcher by its own name, without site-packages and the search for them, which would take longer than the launcher itself.
_LAUNCH = f"""
import sys
for name in ("stillhouse", "stillhouse.pipeline", "stillhouse.pipeline.sandbox"):
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = []
sys.modules[name].__path__ = [{str(Path(__file__).parent)!r}]
from stillhouse.pipeline.sandbox.launcher import launch
launch()
"""


class SandboxProcess:
    """A program in a sandbox; a context manager that kills what is left. `wait_until_started` comes before all else.

    Args:
        files: path relative to the work folder and content; the folder is the program's current one.
        argv: what follows the interpreter on its command line, for example ``("main.py",)``.
        stdin: what the program reads, as a file that it cannot change; None for a pipe that the caller writes to.
        limits: ``wall_s``, ``output_bytes`` and ``error_bytes`` are the caller's to watch.
        tier: see ``records.Tier``.
        route: who makes the namespaces of the strict tier.

    Raises:
        ValueError: a file name that is absolute or leads out of the work folder.
        SandboxUnavailable: the tier needs something that this machine does not have.
    """

    def __init__(
        self,
        files: Mapping[str, bytes | str],
        argv: Sequence[str],
        stdin: bytes | None = None,
        *,
        limits: Limits,
        tier: Tier,
        route: Route | None,
    ):
        with ExitStack() as stack:
            order = _order(files, argv, limits, tier, route) | {"stdin_bytes": len(stdin or b"")}
            if tier != "strict":
                order["work"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="stillhouse-"))
                os.chmod(order["work"], 0o700)
                if order["as_root"]:
                    os.chown(order["work"], NOBODY, NOBODY)
            order["cgroup"] = stack.enter_context(pids_cgroup(limits.processes + 2))
            spec = stack.enter_context(_sealed(marshal.dumps(order)))
            given = subprocess.PIPE if stdin is None else stack.enter_context(_sealed(stdin)).fileno()
            self._report, report = os.pipe()
            stack.callback(os.close, self._report)
            control, self._control = os.pipe()
            stack.callback(os.close, self._control)
            began = time.monotonic()
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-B", "-c", _LAUNCH, *map(str, (spec.fileno(), report, control))],
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=(spec.fileno(), report, control),
                    env=loader_environment(),
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as error:  # no process more for this user, no memory
                raise SandboxUnavailable(f"the sandbox's launcher does not start: {error}") from error
            finally:
                os.close(report)
                os.close(control)
            stack.callback(self._end)
            for pipe in filter(None, (self._process.stdin, self._process.stdout, self._process.stderr)):
                stack.callback(pipe.close)
                os.set_blocking(pipe.fileno(), False)
            self.stdin, self.stdout, self.stderr = self._process.stdin, self._process.stdout, self._process.stderr
            self._memory_bytes, self._max_files, self._route = limits.memory_bytes, limits.files, order["route"]
            self._cpu_s = order["limits"]["cpu_s"]
            self._began = self.started = began
            self._stack = stack.pop_all()

    def __enter__(self) -> SandboxProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def setup_seconds(self) -> float:
        """How long the sandbox took to make."""
        return self.started - self._began

    def wait_until_started(self) -> None:
        """Wait until the program runs; its clock (``started``) begins here.

        Raises:
            SandboxUnavailable: the sandbox cannot be made on this machine; the message says at which step.
        """
        said = b""
        poll = select.poll()
        poll.register(self._report, select.POLLIN)
        # To the end of the pipe: the program's exec closes it, so that a failed exec is heard of.
        while chunk := self._next_report(poll):
            said += chunk
        if said != b"ready\n":
            lines = said.decode(errors="replace").strip().splitlines()
            why = next((line for line in lines if line.startswith("failed: ")), "") or self._last_words()
            raise SandboxUnavailable(why.removeprefix("failed: "))
        self.started = time.monotonic()

    def _next_report(self, poll: select.poll) -> bytes:
        left_s = self._began + _START_LIMIT_S - time.monotonic()
        if not poll.poll(max(0, left_s * 1000)):
            raise SandboxUnavailable(f"the sandbox was not ready after {_START_LIMIT_S:g} s")
        return os.read(self._report, 4096)

    def _last_words(self) -> str:
        self._process.wait(_START_LIMIT_S)
        text = (self.stderr.read() or b"").decode(errors="replace").strip()
        return text.rpartition("\n")[2][:300] or f"it ended without a word, status {self._process.returncode}"

    def over_memory(self) -> bool:
        """Whether the memory of all processes of the sandbox together, resident or swapped out, is past the limit.

        A sum of pages first, which count a page shared after a fork once for each process; only past the limit the exact sum.
        """
        pids = _descendants(self._process.pid)
        if sum(_used_bytes(pid) for pid in pids) <= self._memory_bytes:
            return False
        return sum(_proportional_bytes(pid) for pid in pids) > self._memory_bytes

    def over_files(self) -> bool:
        """Whether /tmp holds more files than allowed, where bubblewrap mounted it: it cannot limit their number itself."""
        if self._route != "bubblewrap":
            return False
        ours = os.stat("/proc/self/ns/mnt")
        for pid in _descendants(self._process.pid):
            try:
                if os.path.samestat(os.stat(f"/proc/{pid}/ns/mnt"), ours):
                    continue  # bubblewrap's own process, which stays outside
                work = os.statvfs(f"/proc/{pid}/root/tmp")
            except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended
                continue
            return work.f_files - work.f_ffree > self._max_files
        return False

    def out_of_cpu(self, status: int | None) -> bool:
        """Whether a program that ended so has used up its processor time: only then is the status not one of its own choice."""
        took_s = time.monotonic() - self.started
        return status == 128 + signal.SIGXCPU and took_s * (os.cpu_count() or 1) >= self._cpu_s

    def poll(self) -> int | None:
        """Exit status once every process of the sandbox is dead; None before."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the end for at most so long; as ``poll``."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def kill(self) -> int:
        """Kill every process of the sandbox, wait until they are dead, and return the exit status."""
        try:
            os.write(self._control, b"k")
        except BrokenPipeError:  # it has ended already
            return self._process.wait()
        try:
            return self._process.wait(10)
        except subprocess.TimeoutExpired:  # the launcher itself hangs; its children die with it
            self._process.kill()
            return self._process.wait()

    def _end(self) -> None:
        if self._process.poll() is None:
            self.kill()


def _sealed(content: bytes) -> BinaryIO:
    """A file in memory that nobody can change any more, at its beginning."""
    file = os.fdopen(os.memfd_create("stillhouse", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+b", buffering=0)
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
    file.seek(0)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return file


def _order(
    files: Mapping[str, bytes | str], argv: Sequence[str], limits: Limits, tier: Tier, route: Route | None
) -> dict[str, Any]:
    """What the launcher needs to know, as plain values."""
    view = python_view()
    as_root = os.geteuid() == 0
    contents = {}
    for name, content in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"a sandboxed program's file needs a path inside its work folder, got {name!r}")
        contents[str(path)] = content.encode() if isinstance(content, str) else bytes(content)
    numbers = asdict(limits) | {"cpu_s": limits.cpu_s or math.ceil(2 * limits.wall_s) + 1}
    confined = tier != "unsafe-limits"
    filter_code = seccomp_filter(platform.machine()) if confined else None
    landlock = landlock_version() if confined else 0
    if confined and filter_code is None:
        raise SandboxUnavailable(f"there is no list of system calls for {platform.machine()}; x86_64 and aarch64 have one")
    if tier == "unsafe-confined" and not landlock:
        raise SandboxUnavailable("this kernel has no Landlock, so that without namespaces no file can be shut off")
    if tier != "strict" and view.packages:
        raise SandboxUnavailable(f"{PACKAGES} shows packages in the tier strict only, and the tier is {tier}")
    if tier != "strict" and as_root and (closed := _closed_to_others(view.executable)):
        raise SandboxUnavailable(
            f"started as root, a program runs as uid {NOBODY}, which cannot start {view.executable}: {closed} is closed to "
            "others"
        )
    return {
        "route": (route or "own") if tier == "strict" else "none",
        "as_root": as_root,
        "uid": NOBODY if as_root or tier == "strict" else os.geteuid(),
        "python": view.executable,
        "bubblewrap": shutil.which("bwrap") or "bwrap",
        "read_only": view.read_only,
        "masked": view.masked,
        "devices": view.devices,
        "packages": view.packages,
        "work": "/tmp",
        "files": contents,
        "argv": list(argv),
        # The same program gives the same output each time; threads reserve less address space.
        "environment": {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "2"} | loader_environment() | dict(view.environment),
        "limits": numbers,
        # Before 5.14 the kernel counts a user's processes outside the namespace as well.
        "count_threads": tier != "strict" or _kernel_version() < (5, 14),
        "filter": filter_code or b"",
        "landlock": landlock,
    }


def _closed_to_others(path: str) -> str:
    """The first folder on the way to a file that others may not enter, "" when there is none."""
    return next((str(p) for p in reversed(Path(path).parents) if not p.stat().st_mode & 0o001), "")


def _kernel_version() -> tuple[int, ...]:
    numbers = platform.release().partition("-")[0].split(".")
    return tuple(int(number) for number in numbers[:2] if number.isdigit())


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for parent in found:  # grows while it is walked
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{thread}/children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
    return found[1:]


def _used_bytes(pid: int) -> int:
    try:
        rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(row.split()[1]) * 1024 for row in rows if row.startswith(("VmRSS:", "VmSwap:")))


def _proportional_bytes(pid: int) -> int:
    try:
        rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except PermissionError:  # hidden from us: count all that is resident
        return _used_bytes(pid)
    return sum(int(row.split()[1]) * 1024 for row in rows if row.startswith(("Pss:", "SwapPss:")))
