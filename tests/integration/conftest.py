"""What the whole-run tests share: a home of their own, and the command called in an empty folder."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.jobs.cluster import ray_session
from tests.small_demo import command


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """The variables a test's processes get: a home of their own, because Ray writes a token under HOME."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CI"))}
    return kept | {
        "HOME": str(home),
        # As in an activated environment: a job's `python` is the one that Ray runs in.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture(scope="module")
def cluster_environment(environment, tmp_path_factory) -> Iterator[dict[str, str]]:
    """`environment` for a cluster of several nodes, with a HOME of its own: a token of an earlier local Ray would be demanded.

    Several nodes on two cores take long to start, and time out beside another cluster: test processes take turns.
    """
    with Path(tempfile.gettempdir(), f"stillhouse-tests-cluster-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield environment | {"HOME": str(tmp_path_factory.mktemp("cluster-home"))}


@pytest.fixture(scope="module")
def ray(tmp_path_factory) -> Iterator[Any]:
    """A local Ray with a home of its own, because Ray writes a token there."""
    home = os.environ.get("HOME", "")
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    try:
        with ray_session(None, object_store_mb=100, num_cpus=4) as session:
            yield session
    finally:
        os.environ["HOME"] = home


@pytest.fixture
def stillhouse(environment, tmp_path):
    """Call the command in an empty folder; gives the finished process with its text."""

    def call(*arguments: str, timeout_s: float = 500) -> subprocess.CompletedProcess[str]:
        whole = list(arguments) if arguments[0] == sys.executable else command(*arguments)
        return subprocess.run(
            whole, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    return call
