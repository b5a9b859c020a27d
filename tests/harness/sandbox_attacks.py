"""Run the attacks on the sandbox and say what leaked.

``python -m tests.harness.sandbox_attacks [--route own|bubblewrap] [--user nobody]`` runs every row of ``attack_table.py`` and
every scoring cheat in the strict tier and prints the count of attacks, leaks and false passes, and what a run costs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillhouse.pipeline.sandbox.probe import probe
from stillhouse.pipeline.sandbox.python_view import python_view
from stillhouse.pipeline.sandbox.records import Limits, Route, Tier
from stillhouse.pipeline.sandbox.run import run_by_route
from tests import as_nobody
from tests.harness.attack_table import CALLS, PRELUDE, RUN_CALLS, RUN_PROBES, Program, probes, programs
from tests.harness.scoring_cheats import run_cheats

LIMITS = Limits(wall_s=20, memory_bytes=256 << 20, disk_bytes=8 << 20, processes=16, output_bytes=1 << 20, error_bytes=1 << 20)


@dataclass(frozen=True)
class Outcome:
    kind: str
    name: str
    leaked: bool
    seen: str


class Outside:
    """What an attack can reach for: a file and a folder open to everyone, listening sockets, a sleeping process."""

    def __init__(self, stack: contextlib.ExitStack):
        self.folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="stillhouse-attack-"))
        os.chmod(self.folder, 0o777)
        self.secret = Path(self.folder, "secret")
        self.secret.write_text("not for you")
        self.secret.chmod(0o666)
        self.abstract = f"stillhouse-{secrets.token_hex(8)}"
        self.shared = Path("/dev/shm", self.abstract)
        stack.callback(self.shared.unlink, missing_ok=True)
        unix = [f"{self.folder}/socket", f"\0{self.abstract}"]
        self.listeners = []
        for family, address in [(socket.AF_INET, ("127.0.0.1", 0)), *((socket.AF_UNIX, path) for path in unix)]:
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.bind(address)
            listener.listen()
            listener.setblocking(False)
            self.listeners.append(listener)
        self.datagrams = [stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) for _ in unix]
        for receiver, path in zip(self.datagrams, (f"{self.folder}/datagrams", f"\0{self.abstract}-datagrams")):
            receiver.bind(path)
            receiver.setblocking(False)
        for name in ("socket", "datagrams"):
            os.chmod(f"{self.folder}/{name}", 0o777)
        command = [sys.executable, "-I", "-S", "-c", "input()"]
        self.sleeper = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        stack.callback(self.sleeper.wait)
        stack.callback(self.sleeper.kill)
        stack.callback(self.sleeper.stdin.close)
        self.hostname = socket.gethostname()

    def aim(self) -> str:
        return json.dumps(
            {
                "secret": str(self.secret),
                "folder": self.folder,
                "home": os.path.expanduser("~"),
                "repository": str(Path(__file__).parents[2]),
                "port": self.listeners[0].getsockname()[1],
                "unix": f"{self.folder}/socket",
                "abstract": self.abstract,
                "shared": str(self.shared),
                "datagrams": f"{self.folder}/datagrams",
                "abstract_datagrams": f"{self.abstract}-datagrams",
                "pid": self.sleeper.pid,
            }
        )

    def changed(self) -> str:
        """What has happened out here, "" when nothing has."""
        if self.secret.read_text() != "not for you" or sorted(os.listdir(self.folder)) != ["datagrams", "secret", "socket"]:
            return "a file outside has changed"
        ended = self.sleeper.poll() is not None  # whose entry below is gone then
        if ended or Path(f"/proc/{self.sleeper.pid}/stat").read_text().rpartition(")")[2].split()[0] in "TtZX":
            return "a process outside was signalled"
        if os.getpriority(os.PRIO_PROCESS, self.sleeper.pid) != os.getpriority(os.PRIO_PROCESS, 0):
            return "a process outside has another priority"
        for listener in self.listeners:
            with contextlib.suppress(BlockingIOError):
                listener.accept()[0].close()
                return "a connection came in"
        for receiver in self.datagrams:
            with contextlib.suppress(BlockingIOError):
                receiver.recv(1)
                return "a datagram came in"
        if self.shared.exists():
            return "a file is left in shared memory"
        return "" if socket.gethostname() == self.hostname else "the host has another name"


def processes_with(mark: str) -> int:
    found = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += mark.encode() in Path(f"/proc/{name}/cmdline").read_bytes()
    return found


def run_all(tier: Tier, route: Route | None, *, every: int = 1, num_workers: int = 3) -> list[Outcome]:
    """Run every row, of the programs one in ``every``; sandboxes run side by side, ``num_workers`` at a time."""
    with contextlib.ExitStack() as stack:
        outside = Outside(stack)
        jobs = [lambda k=kind, r=rows: _probes(k, r, RUN_PROBES, outside, tier, route) for kind, rows in probes().items()]
        jobs.append(lambda: _probes("kernel", CALLS, RUN_CALLS, outside, tier, route))
        jobs += [lambda p=program: [_program(p, outside, tier, route)] for program in programs()[::every]]
        with ThreadPoolExecutor(num_workers) as threads:
            return [outcome for outcomes in threads.map(lambda job: job(), jobs) for outcome in outcomes]


_lock = threading.Lock()


def _probes(kind: str, rows: dict[str, Any], runner: str, outside: Outside, tier: Tier, route: Route | None) -> list[Outcome]:
    source = f"{PRELUDE}\nrows = {rows!r}\n{runner}"
    result = run_by_route({"main.py": source}, ("main.py",), outside.aim(), limits=LIMITS, tier=tier, route=route)
    try:
        found = json.loads(result.stdout)
    except json.JSONDecodeError:
        raise AssertionError(f"the {kind} probes did not report: {result}") from None
    with _lock:
        changed = outside.changed()
    outcomes = [Outcome(kind, name, *found[name]) for name in rows]
    return [*outcomes, Outcome(kind, "(seen from outside)", True, changed)] if changed else outcomes


def _program(program: Program, outside: Outside, tier: Tier, route: Route | None) -> Outcome:
    mark = secrets.token_hex(8)
    limits = replace(LIMITS, **program.limits)
    files = {"main.py": f"{PRELUDE}\n{program.source}\n"}
    began = time.monotonic()
    result = run_by_route(files, ("main.py", mark), outside.aim(), limits=limits, tier=tier, route=route)
    over_s = time.monotonic() - began - result.setup_seconds - limits.wall_s
    with _lock:
        changed = outside.changed()
    why = [changed] if changed else []
    if b"LEAK" in result.stdout:
        why.append("it printed LEAK")
    if result.killed_for not in program.ends:
        why.append(
            f"killed for {result.killed_for or 'nothing'}, expected {' or '.join(e or 'its own end' for e in program.ends)}"
        )
    if over_s > 2:
        why.append(f"held up the caller {over_s:.1f} s beyond its limit")
    if left := processes_with(mark):
        why.append(f"{left} processes left behind")
    if len(result.stdout) > limits.output_bytes or len(result.stderr) > limits.error_bytes:
        why.append("more output than allowed")
    seen = f"status {result.exit_status}, killed for {result.killed_for or 'nothing'}, {result.seconds:.2f} s"
    return Outcome(program.kind, program.name, bool(why), "; ".join(why) or seen)


def overhead_ms(tier: Tier, route: Route | None, runs: int = 20) -> dict[str, float]:
    """Milliseconds that an empty program takes, in the sandbox and as a bare process: medians."""
    boxed, bare = [], []
    for _ in range(runs):
        began = time.perf_counter()
        run_by_route({"main.py": ""}, ("main.py",), "", limits=LIMITS, tier=tier, route=route)
        boxed.append(time.perf_counter() - began)
        began = time.perf_counter()
        subprocess.run([python_view().executable, "-s", "-B", "-c", ""], check=True)
        bare.append(time.perf_counter() - began)
    return {"sandboxed": 1000 * statistics.median(boxed), "bare": 1000 * statistics.median(bare)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--route", choices=("own", "bubblewrap"), default="own")
    parser.add_argument("--user", choices=("me", "nobody"), default="me", help="nobody: only when started as root")
    arguments = parser.parse_args()
    if arguments.user == "nobody":
        answer = as_nobody.run(["-m", "tests.harness.sandbox_attacks", "--route", arguments.route], timeout_s=600)
        print(answer.stdout, answer.stderr, sep="\n")
        return answer.returncode
    if arguments.route == "own":
        os.environ["PATH"] = os.devnull  # the scoring cheats take the route that the probe finds
    report = probe()
    if report.route != arguments.route:
        print(f"the route {arguments.route} is not there: {report.missing}")
        return 4
    print(f"uid {os.geteuid()}, tier {report.tier}, route {report.route}", *report.layers, report.missing, sep="; ")
    outcomes = run_all("strict", arguments.route)
    cheats = run_cheats()
    for outcome in (*outcomes, *cheats):
        if outcome.leaked:
            print(f"LEAK  {outcome.kind}: {outcome.name}: {outcome.seen}")
    leaks, passes = sum(o.leaked for o in outcomes), sum(o.leaked for o in cheats)
    costs = overhead_ms("strict", arguments.route)
    print(f"{len(outcomes)} attacks, {leaks} leaks; {len(cheats)} scoring cheats, {passes} false passes")
    print(f"an empty program: {costs['sandboxed']:.0f} ms sandboxed, {costs['bare']:.0f} ms bare (medians)")
    return 1 if leaks or passes else 0


if __name__ == "__main__":
    sys.exit(main())
