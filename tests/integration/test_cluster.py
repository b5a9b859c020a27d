"""A real cluster on loopback, two node processes: ``run --address`` joins it, ``submit`` sends the run to it as a job."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stillhouse.pipeline.report import read_report
from stillhouse.teachers.engine_process import free_port
from tests.small_demo import SMALL_DEMO, command, small_demo


def wait_for(what: str, check, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.5)


def alive_nodes(address: str, environment: dict[str, str], folder: Path) -> int:
    """How many nodes the head knows of, some seconds after their processes answer; 0 while it cannot be asked."""
    ask = (
        "from stillhouse.jobs.cluster import ray_session\n"
        f"with ray_session({address!r}) as ray:\n    print(sum(node['Alive'] for node in ray.nodes()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask], env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    return int(done.stdout.split()[-1]) if done.returncode == 0 else 0


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, cluster_environment):
    """A head and a second node, each with one CPU, so that two actors have to be on two nodes."""
    environment = cluster_environment
    folder = tmp_path_factory.mktemp("c")
    port, dashboard = free_port("127.0.0.1"), free_port("127.0.0.1")
    ray = str(Path(sys.executable).with_name("ray"))
    # A node's agent takes jobs, at one fixed port unless told otherwise; another Ray of this machine may have that.
    agents = [f"--dashboard-agent-listen-port={free_port('127.0.0.1')}" for _ in range(2)]
    head = [
        *(ray, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=1"),
        *("--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"),
        agents[0],
    ]
    second = [
        *(ray, "start", "--block", f"--address=127.0.0.1:{port}", "--num-cpus=1", "--node-ip-address=127.0.0.1"),
        *("--object-store-memory=100000000", agents[1]),
    ]
    log = (folder / "ray.log").open("w")
    processes = [subprocess.Popen(head, env=environment, stdout=log, stderr=log, cwd=folder)]
    try:
        wait_for("the head", lambda: answers(port) and answers(dashboard))
        processes.append(subprocess.Popen(second, env=environment, stdout=log, stderr=log, cwd=folder))
        wait_for("the second node", lambda: alive_nodes(f"127.0.0.1:{port}", environment, folder) == 2)
        yield f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment
    finally:
        for process in reversed(processes):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()
        log.close()


@pytest.mark.slow
def test_a_run_joins_a_cluster(cluster, tmp_path):
    """The recipe that ran on a laptop runs on a cluster's nodes."""
    address, _, environment = cluster
    done = subprocess.run(
        [*small_demo(tmp_path / "run", "cluster.cpus_per_train_worker=3", verb="generate"), "--address", address],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "traces" in done.stdout
    # Ray would wait for such a node in silence.
    assert "cluster.cpus_per_train_worker=3 for 1 of them, and there are 2 CPUs, 1 on the largest node" in done.stderr
    assert "(2 nodes, 2 CPUs, 0 GPUs)" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_submitted_run_is_the_same_run(cluster, tmp_path):
    """``submit --follow`` ends with the job's own exit code (Ray flattens it to 0 or 1) and leaves the report."""
    _, dashboard, environment = cluster
    out = tmp_path / "run"

    def submit(*extra: str) -> subprocess.CompletedProcess[str]:
        settings = [part for value in (*SMALL_DEMO, *extra) for part in ("--set", value)]
        whole = command("submit", "demo", "--address", dashboard, "--out", str(out), "--follow", *settings)
        return subprocess.run(whole, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False)

    done = submit()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4-bit checkpoint" in done.stdout
    assert read_report(out / "report.json").exit_code == 0
    refused = submit("gate.min_accuracy=1.0")
    assert refused.returncode == 1, refused.stdout + refused.stderr
    wrong = submit("filters.min_tokens=5000", "filters.max_tokens=6000")
    assert wrong.returncode == 1, wrong.stdout + wrong.stderr
    assert "none of 96 traces" in wrong.stdout


def test_a_relative_out_is_refused_before_anything_is_sent(stillhouse):
    """A job's working folder is thrown away: results in it would be lost."""
    done = stillhouse("submit", "demo", "--address", "http://127.0.0.1:1", "--out", "runs/demo")
    assert done.returncode == 2
    assert "absolute" in done.stderr


def test_a_dashboard_that_is_not_there(stillhouse, tmp_path):
    """Exit code 4, and what to look at."""
    done = stillhouse("submit", "demo", "--address", "http://127.0.0.1:1", "--out", str(tmp_path))
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
