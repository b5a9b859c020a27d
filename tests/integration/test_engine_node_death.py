"""A node of a real Ray cluster dies with the engine that runs there."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stillhouse.jobs.cluster import ray_session
from stillhouse.jobs.engines import EnginePool
from stillhouse.pipeline.errors import ClusterError, RecipeError
from stillhouse.teachers.endpoint import Endpoints
from stillhouse.teachers.engine_process import free_port
from tests.small_engine_pool import SPEC, ask_while, pool_of, servers


@pytest.fixture
def cluster(tmp_path, cluster_environment, monkeypatch):
    """A head with no CPU to give and two nodes; its address and the nodes' processes."""
    environment = cluster_environment
    monkeypatch.setenv("HOME", environment["HOME"])
    port = free_port("127.0.0.1")
    address = f"127.0.0.1:{port}"
    ray_command = str(Path(sys.executable).with_name("ray"))
    start = [ray_command, "start", "--block", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    processes = []

    with (tmp_path / "ray.log").open("w") as log:

        def begin(*arguments):
            whole = [*start, *arguments]
            processes.append(subprocess.Popen(whole, env=environment, stdout=log, stderr=log, cwd=tmp_path))

        begin("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false")
        try:
            deadline = time.monotonic() + 300
            for expected in (1, 2, 3):  # one after another: a busy machine lets two that start together time out
                while num_nodes(address) < expected:
                    assert time.monotonic() < deadline, (
                        f"{expected} nodes did not come: {(tmp_path / 'ray.log').read_text()[-500:]}"
                    )
                if expected < 3:
                    begin(f"--address={address}", "--num-cpus=1", "--num-gpus=2")
            yield address, processes[1:]
        finally:
            for process in reversed(processes):
                kill_tree(process.pid)
                process.wait()


def num_nodes(address):
    """Alive nodes of a cluster that may not be there yet."""
    time.sleep(1)
    with contextlib.suppress(ClusterError), ray_session(address) as ray:
        return sum(node["Alive"] for node in ray.nodes())
    return 0


def kill_tree(pid):
    """Kill a node: ``ray start``, its raylet, its workers and what they started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dead_nodes_server_moves_to_another_node(cluster, tmp_path):
    """Spot machines go away in the middle of a run; their share of the work has to move."""
    address, nodes = cluster
    endpoints = Endpoints()

    def kill_node():
        (server,) = servers(tmp_path)
        whose = {child.pid: node for node in nodes for child in psutil.Process(node.pid).children(recursive=True)}
        kill_tree(whose[server.pid].pid)

    with ray_session(address) as ray:
        with pytest.raises(RecipeError, match=r"4 GPUs is more than any node has \(2\)"):
            EnginePool(
                ray, SPEC, replicas=1, gpus_per_replica=4, cpus_per_replica=1, on_up=endpoints.add, on_down=endpoints.remove
            )
        with pool_of(ray, tmp_path, endpoints) as pool:
            ask_while(endpoints, 12, kill_node)
            # Twice where the first attempt went to the node that Ray did not know to be dead yet.
            assert pool.num_restarts in (1, 2)
    assert servers(tmp_path) == []
