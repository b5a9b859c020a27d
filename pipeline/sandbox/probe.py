"""Find out what this machine gives by trying to get out (``probe``), and refuse to run anything where that is not enough."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillhouse.pipeline.sandbox.cgroup import pids_cgroup_parent
from stillhouse.pipeline.sandbox.landlock import landlock_version
from stillhouse.pipeline.sandbox.packages import VARIABLE as PACKAGES
from stillhouse.pipeline.sandbox.packages import ShownPackages, shown_packages
from stillhouse.pipeline.sandbox.records import Check, Limits, Route, SandboxResult, SandboxUnavailable, Tier, TierReport

_log = logging.getLogger(__name__)
_LIMITS = Limits(wall_s=20, memory_bytes=192 << 20, disk_bytes=4 << 20, processes=12)
# What a tier may let through. The strict one nothing; without namespaces the kernel's own names and processes stay in sight.
_TOLERATED = {
    "strict": frozenset[str](),
    "unsafe-confined": frozenset({"signal a process outside", "write more than allowed", "run a binary it wrote"}),
}
_LEFT_BEHIND = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
os.wait()
"""
_HANGS = _LEFT_BEHIND + "time.sleep(600)"
_SHARES_OUT_MEMORY = """
import os, time
for _ in range(4):
    if os.fork() == 0:
        hold = bytearray(os.urandom(1 << 20)) * (110)
        time.sleep(600)
time.sleep(600)
"""


def require(tier: Tier = "strict") -> Route | None:
    """Make sure that this machine gives a tier, and return who makes its namespaces (None in the unsafe tiers).

    The probe runs once a process. An unsafe tier is taken at the caller's word, with a warning in the log.

    Raises:
        SandboxUnavailable: the strict tier was asked for and is not there, or a package that is named cannot be shown or
            does not import inside.
    """
    if tier != "strict":
        _warn_once(tier)
        return None
    packages = shown_packages()
    report = probed()
    if report.tier != "strict":
        raise SandboxUnavailable(
            f"programs that a model wrote are not run here, because this machine cannot shut them off: {report.missing}. Allow "
            "user namespaces (sysctl user.max_user_namespaces and, on Debian and Ubuntu, kernel.unprivileged_userns_clone or "
            "kernel.apparmor_restrict_unprivileged_userns; in a container a seccomp profile that lets unshare and mount "
            "through), or install bubblewrap. Where they can be run elsewhere, set STILLHOUSE_SANDBOX to the "
            "address of a service that speaks SandboxFusion's /run_code. Where the programs can be trusted, set it to the name "
            f"of an unsafe tier (here {report.tier or 'none works'})."
        )
    _import_inside(packages, report.route)
    return report.route


def probed() -> TierReport:
    """What `probe` finds here, asked once a process."""
    return _probed_with(os.geteuid(), os.environ.get(PACKAGES, ""))


@functools.cache
def _probed_with(euid: int, packages: str) -> TierReport:
    return probe()


@functools.cache
def _import_inside(packages: ShownPackages, route: Route | None) -> None:
    """Import each package that is shown once, so that what it lacks is heard of before the first program."""
    for module in packages.imports:
        result = _run({}, ("-c", f"import {module}"), "", "strict", route, Limits(wall_s=60))
        if result.exit_status:
            said = result.stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"status {result.exit_status}"
            raise SandboxUnavailable(
                f"{PACKAGES} shows {packages}, and `import {module}` fails inside the sandbox: {said[:200]}. Name what it "
                "needs there too, or leave it out"
            )


@functools.cache
def _warn_once(tier: Tier) -> None:
    _log.warning("programs that a model wrote run in the tier %s: they are not shut off from this machine", tier)


def probe(*, routes: tuple[Route, ...] = ("bubblewrap", "own")) -> TierReport:
    """Try an escape of each kind in each tier, strongest first, and report the first tier that held.

    Takes about a second. ``routes`` are the ways to make namespaces, tried in order.
    """
    missing = []
    for route in routes:
        if route == "bubblewrap" and not shutil.which("bwrap"):
            missing.append("bubblewrap is not installed")
            continue
        checks, why = _try("strict", route)
        if not why:
            return TierReport("strict", route, _layers("strict", route), checks, "; ".join(missing))
        missing.append(f"{'bubblewrap' if route == 'bubblewrap' else 'own namespaces'}: {why}")
    for tier in ("unsafe-confined", "unsafe-limits"):
        checks, why = _try(tier, None)
        if not why:
            return TierReport(tier, None, _layers(tier, None), checks, "; ".join(missing))
        missing.append(f"{tier}: {why}")
    return TierReport(None, None, (), (), "; ".join(missing))


def _try(tier: Tier, route: Route | None) -> tuple[tuple[Check, ...], str]:
    """Run the escapes in one tier: the checks, and why the tier is not there ("" when it is)."""
    try:
        checks = tuple(_escapes(tier, route))
    except SandboxUnavailable as error:
        return (), str(error)
    except OSError as error:  # no folder for temporary files, no process more for this user
        return (), f"the probe itself cannot be set up: {error}"
    tolerated = _TOLERATED.get(tier)
    through = [check for check in checks if not check.refused and (tolerated is not None and check.name not in tolerated)]
    return checks, "; ".join(f"a program could {check.name} ({check.seen})" for check in through)


def _escapes(tier: Tier, route: Route | None) -> Iterator[Check]:
    program = Path(__file__).with_name("probe_program.py").read_text()
    with _things_to_reach_for() as (aim, untouched):
        limits = {"processes": _LIMITS.processes, "memory_bytes": _LIMITS.memory_bytes, "disk_bytes": _LIMITS.disk_bytes}
        limits["environment"] = list(shown_packages().environment)
        result = _run({"main.py": program}, ("main.py",), json.dumps(aim | limits), tier, route)
        try:
            reported = json.loads(result.stdout)
        except json.JSONDecodeError as error:
            tail = (result.stderr or result.stdout)[-300:].decode(errors="replace")
            raise SandboxUnavailable(f"the probe ended with status {result.exit_status} {result.killed_for}: {tail}") from error
        for name, refused, seen in reported:
            yield Check(name, refused, seen)
        for name, seen in untouched():
            yield Check(name, not seen, seen or "seen from outside: nothing happened")
    for name, program, wall_s, expected in (
        ("leave a process behind", _LEFT_BEHIND, 10.0, ""),
        ("outlive the deadline", _HANGS, 0.5, "time"),
        ("share out more memory than allowed", _SHARES_OUT_MEMORY, 10.0, "memory"),
    ):
        mark = secrets.token_hex(8)
        result = _run({}, ("-c", program, mark), "", tier, route, replace(_LIMITS, wall_s=wall_s))
        left = _processes_with(mark)
        held = result.killed_for == expected and not left
        yield Check(name, held, f"killed for {result.killed_for or 'nothing'}, {len(left)} processes left")


def _run(
    files: dict[str, str], argv: tuple[str, ...], stdin: str, tier: Tier, route: Route | None, limits: Limits = _LIMITS
) -> SandboxResult:
    from stillhouse.pipeline.sandbox.run import run_by_route  # run.py asks this module first

    return run_by_route(files, argv, stdin, limits=limits, tier=tier, route=route)


@contextlib.contextmanager
def _things_to_reach_for() -> Iterator[tuple[dict[str, Any], Any]]:
    """A file, listening sockets and a process outside the sandbox, and a look at whether anything happened to them."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="stillhouse-probe-"))
        os.chmod(folder, 0o777)
        secret = Path(folder, "secret")
        secret.write_text("not for you")
        secret.chmod(0o666)
        name = f"stillhouse-{secrets.token_hex(8)}"
        listeners = {}
        for kind, family, address in (
            ("TCP", socket.AF_INET, ("127.0.0.1", 0)),
            ("a unix socket", socket.AF_UNIX, f"{folder}/socket"),
            ("an abstract unix socket", socket.AF_UNIX, f"\0{name}"),
        ):
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.bind(address)
            listener.listen()
            listener.setblocking(False)
            listeners[kind] = listener
        os.chmod(f"{folder}/socket", 0o777)
        sleeper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        stack.callback(sleeper.wait)
        stack.callback(sleeper.kill)
        stack.callback(sleeper.stdin.close)

        def untouched() -> Iterator[tuple[str, str]]:
            yield "change a file outside", "" if secret.read_text() == "not for you" else "the planted file has changed"
            yield "signal a process outside", "" if sleeper.poll() is None else "the planted process has ended"
            for kind, listener in listeners.items():
                yield f"reach {kind}", "a connection came in" if _has_connection(listener) else ""

        aim = {"secret": str(secret), "port": listeners["TCP"].getsockname()[1], "unix": f"{folder}/socket", "abstract": name}
        yield aim | {"pid": sleeper.pid}, untouched


def _has_connection(listener: socket.socket) -> bool:
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def _processes_with(mark: str) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                found.append(int(name))
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
    return found


def _layers(tier: Tier, route: Route | None) -> tuple[str, ...]:
    version = landlock_version()
    layers = []
    if tier == "strict":
        maker = "bubblewrap" if route == "bubblewrap" else "ourselves"
        layers.append(f"user, mount, pid, net, ipc, uts and cgroup namespaces, made by {maker}")
    if tier != "unsafe-limits":
        layers.append("seccomp: an allow list")
        layers.append(f"Landlock, ABI version {version}" if version else "no Landlock in this kernel")
    layers.append("no_new_privs, no capabilities, rlimits")
    if tier == "strict" and (packages := shown_packages()).read_only:
        layers.append(f"packages shown: {packages}")
    cgroup = pids_cgroup_parent()
    layers.append(f"pids cgroup under {cgroup}" if cgroup else "no cgroup to make here: processes are limited by RLIMIT_NPROC")
    layers.append("uid 65534, outside as well" if os.geteuid() == 0 else "the caller's own uid outside")
    return tuple(layers)
