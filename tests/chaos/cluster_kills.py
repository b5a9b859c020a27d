"""Workers, whole nodes and the driver of a generation run are killed on a real three-node Ray cluster on this machine.

    python -m tests.chaos.cluster_kills --worker-kills 20 --node-kills 5 --driver-kills 1

Each kill waits for progress since the last one, so that every life does some work. A killed node is replaced by a new one; a
killed driver is started again with the same command. At the end every planned trace is in the store once, the ledger knows
what was lost, and no more was paid again than was in flight at the kills. Prints one JSON object; exit code 1 where a
promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from stillhouse.pipeline.errors import StillhouseError
from stillhouse.pipeline.records import Planned, Trace
from stillhouse.pipeline.store import RunStore
from stillhouse.pipeline.trace_store.checks import verify_store
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.teachers.engine_process import free_port
from tests.small_demo import SMALL_DEMO, command

NUM_NODES = 3
BATCH = 8
HANGS_AFTER_S = 600.0


class Cluster:
    """A head and two more nodes on loopback, one CPU and so one teacher each."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CI"))} | {
            "HOME": str(folder),  # Ray writes a token there
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        self.port = free_port("127.0.0.1")
        self.nodes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        self._start("--head", f"--port={self.port}", "--include-dashboard=false")
        wait_for("the head", lambda: answers(self.port))
        for _ in range(NUM_NODES - 1):
            self.add_node()
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes):
            kill_tree(node.pid)
            node.wait()

    def add_node(self) -> None:
        self._start(f"--address=127.0.0.1:{self.port}")

    def tend(self) -> None:
        """Put a new node in the place of one that ended by itself: on a busy machine Ray gives up starting one."""
        for node in [node for node in self.nodes if node.poll() is not None]:
            if node is self.nodes[0]:
                raise SystemExit(f"the head ended; see {self.folder}/ray.log")
            kill_tree(node.pid)
            self.nodes.remove(node)
            self.add_node()

    def _start(self, *arguments: str) -> None:
        ray = str(Path(sys.executable).with_name("ray"))
        whole = [ray, "start", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
        log = (self.folder / "ray.log").open("ab")
        process = subprocess.Popen([*whole, *arguments], env=self.environment, stdout=log, stderr=log, cwd=self.folder)
        log.close()
        self.nodes.append(process)

    def teachers(self, node: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """The processes of a node that hold a teacher: Ray names them after their actor."""
        return [child for child in descendants(node.pid) if "_GeneratorActor" in name_of(child)]

    def kill_node(self, draw: random.Random) -> int:
        """Kill one of the nodes that are not the head, with all its processes; gives the number of its teachers."""
        node = draw.choice(self.nodes[1:])
        num_teachers = len(self.teachers(node))
        kill_tree(node.pid)
        node.wait()
        self.nodes.remove(node)
        return num_teachers


class Run:
    """``stillhouse generate`` on the cluster, its driver a process of ours."""

    def __init__(self, cluster: Cluster, out: Path, num_problems: int):
        settings = [
            *(value for value in SMALL_DEMO if not value.startswith(("problems.train", "teacher."))),
            *(f"problems.train.{family}.size={num_problems // 3}" for family in range(3)),
            f"teacher.batch_size={BATCH}",
            "teacher.samples_per_problem=2",
            f"cluster.num_teacher_actors={NUM_NODES}",
        ]
        flags = [part for value in settings for part in ("--set", value)]
        self.command = command("generate", "demo", "--address", f"127.0.0.1:{cluster.port}", "--out", str(out), *flags)
        self.cluster, self.out = cluster, out
        self.driver: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = (self.cluster.folder / "driver.log").open("ab")
        self.driver = subprocess.Popen(
            self.command, env=self.cluster.environment, stdout=log, stderr=log, cwd=self.cluster.folder
        )
        log.close()

    def kill_driver(self) -> None:
        kill_tree(self.driver.pid)
        self.driver.wait()

    def ended(self) -> bool:
        return self.driver.poll() is not None

    def progress(self) -> tuple[int, int]:
        """Answers, and calls under way, from the spool and the store as they are on disk."""
        spool = self.out / "traces" / "spool" / "spool.sqlite"
        if not spool.exists():
            return 0, 0
        connection = sqlite3.connect(f"{spool.as_uri()}?mode=ro", uri=True, timeout=30)
        try:
            (answered,) = connection.execute("SELECT count(*) FROM outcomes WHERE state = 'answered'").fetchone()
            (under_way,) = connection.execute(
                "SELECT count(*) FROM calls WHERE call_id NOT IN (SELECT call_id FROM outcomes)"
            ).fetchone()
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise
            return 0, 0  # it is being made
        finally:
            connection.close()
        try:
            sealed = TraceStore(self.out / "traces").num_rows
        except StillhouseError:
            sealed = 0
        return answered + sealed, under_way


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(what: str, check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANGS_AFTER_S
    while not check():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} did not come within {HANGS_AFTER_S:.0f} s")
        time.sleep(0.25)


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


def kill_tree(pid: int) -> None:
    victims = descendants(pid)
    for victim in [psutil.Process(pid), *victims] if psutil.pid_exists(pid) else victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue


def torment(run: Run, kinds: list[str], draw: random.Random) -> dict[str, Any]:
    """Do the kills in turn; returns how many there were, and how many calls were in flight at them."""
    cluster, done, in_flight = run.cluster, Counter(), 0
    run.start()
    for kind in kinds:
        before, _ = run.progress()

        def moved(before: int = before) -> bool:
            cluster.tend()
            return run.ended() or (run.progress()[0] > before and any(map(cluster.teachers, cluster.nodes)))

        wait_for(f"progress beyond {before} traces", moved)
        time.sleep(draw.uniform(0, 1.0))
        if run.ended():
            raise SystemExit(f"the run ended with {run.driver.returncode} after {dict(done)}; see {cluster.folder}/driver.log")
        _, under_way = run.progress()
        if kind == "driver":
            run.kill_driver()
            in_flight += under_way + NUM_NODES * BATCH  # a batch can begin between the look and the kill
            run.start()
        elif kind == "node":
            num_teachers = cluster.kill_node(draw)
            in_flight += max(1, num_teachers) * BATCH
            cluster.add_node()
        else:
            holding = [process for node in cluster.nodes for process in cluster.teachers(node)]
            if not holding:
                raise SystemExit("no process holds a teacher")
            draw.choice(holding).kill()
            in_flight += BATCH
        done[kind] += 1
        print(f"{dict(done)}: {run.progress()[0]} traces", file=sys.stderr, flush=True)
    deadline = time.monotonic() + 3600
    while not run.ended() and time.monotonic() < deadline:
        cluster.tend()
        time.sleep(1)
    return {"kills": dict(done), "in_flight_at_kills_at_most": in_flight, "exit_code": run.driver.returncode}


def judge(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    """The store and the ledger against the plan."""
    store = TraceStore(run.out / "traces")
    planned = {row.key for row in RunStore(run.out).read("planned", Planned)}
    keys: Counter[str] = Counter()
    for commit in store.commits():
        for entry in commit.shards:
            with store.parquet(entry) as parquet:
                keys.update(parquet.read(columns=["key"]).column("key").to_pylist())
    traces: list[Trace] = list(store.traces())
    totals = store.totals()
    paid_again = totals.num_calls - len(planned)
    check = verify_store(run.out / "traces")
    violations = [
        sentence
        for broken, sentence in (
            (found["exit_code"] != 0, f"the run ended with {found['exit_code']}"),
            (
                set(keys) != planned,
                f"{len(planned - set(keys))} planned traces are missing, {len(set(keys) - planned)} unplanned",
            ),
            (any(count != 1 for count in keys.values()), "a key is stored twice"),
            (len(traces) != len(planned), f"{len(traces)} traces are read, {len(planned)} were planned"),
            (totals.num_answered != len(planned), f"{totals.num_answered} answers for {len(planned)} planned traces"),
            (paid_again != totals.num_lost + totals.num_failed, f"calls do not add up: {totals}"),
            (paid_again > found["in_flight_at_kills_at_most"], f"{paid_again} calls were paid again"),
            (not check.sound, f"verify: {check}"),
        )
        if broken
    ]
    return found | {
        "num_planned": len(planned),
        "num_traces": len(traces),
        "num_calls": totals.num_calls,
        "num_paid_again": paid_again,
        "num_lost_in_flight": totals.num_lost,
        "num_failed": totals.num_failed,
        "violations": violations,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker-kills", type=int, default=20)
    parser.add_argument("--node-kills", type=int, default=5)
    parser.add_argument("--driver-kills", type=int, default=1)
    parser.add_argument("--problems", type=int, default=600, help="planned traces are twice as many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the run and the logs lie; a temporary folder unless given")
    options = parser.parse_args(arguments)
    draw = random.Random(options.seed)
    kinds = ["worker"] * options.worker_kills + ["node"] * options.node_kills + ["driver"] * options.driver_kills
    draw.shuffle(kinds)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ck-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with Cluster(folder) as cluster:
            run = Run(cluster, folder / "run", options.problems)
            try:
                found = torment(run, kinds, draw)
            finally:
                if run.driver and not run.ended():
                    run.kill_driver()
        result = judge(run, found) | {"seconds": round(time.monotonic() - started)}
    print(json.dumps(result, indent=2))
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
