"""Engine servers on a real local Ray: what dies is started again, and the client's requests all come through."""

from __future__ import annotations

import signal

import psutil
import pytest

from stillhouse.pipeline.errors import ClusterError
from stillhouse.teachers.endpoint import Endpoints
from stillhouse.teachers.engine_commands import EngineSpec
from tests.small_engine_pool import ask_while, pool_of, servers


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    assert servers(tmp_path) == [], "an engine was left behind"


def test_a_killed_server_is_started_again(ray, folder):
    """One crash in a night's generation would otherwise end it."""
    endpoints = Endpoints()
    with pool_of(ray, folder, endpoints) as pool:
        ask_while(endpoints, 6, lambda: servers(folder)[0].kill())
        assert pool.num_restarts == 1
        assert pool.urls == endpoints.urls


@pytest.mark.slow
def test_a_killed_worker_takes_its_server_along_and_both_come_back(ray, folder):
    """Ray kills workers without asking; the engine must neither stay behind with the GPU nor be missed."""
    endpoints = Endpoints()

    def kill_worker():
        server = servers(folder)[0]
        worker = server.parent().parent()
        assert worker.name().startswith("ray::")
        worker.kill()
        assert psutil.wait_procs([server], timeout=60)[1] == []

    with pool_of(ray, folder, endpoints, replicas=2) as pool:
        ask_while(endpoints, 24, kill_worker)
        assert pool.num_restarts == 1


@pytest.mark.slow
def test_a_server_that_hangs_is_started_again(ray, folder):
    """A process that is there and answers nobody holds its requests until their time limits, hours later."""
    endpoints = Endpoints()
    with pool_of(ray, folder, endpoints) as pool:
        stopped = servers(folder)[0]
        stopped.send_signal(signal.SIGSTOP)
        ask_while(endpoints, 6, lambda: None, after=0)
        assert pool.num_restarts == 1
        assert not stopped.is_running()


@pytest.mark.slow
def test_a_server_that_never_comes_up_ends_the_run(ray, folder):
    """Starting a model that is not there for ever costs GPU hours; the error quotes the server's own words."""
    endpoints = Endpoints()
    notes = []
    spec = EngineSpec("transformers_serve", "/no/such/model")
    started = pool_of(ray, folder, endpoints, replicas=2, spec=spec, max_failures=2, note=notes.append)
    with pytest.raises(ClusterError, match=r"failed 2 times in a row(.|\n)*/no/such/model"), started:
        pass
    assert "failed 2 times in a row" in endpoints.stopped
    assert sum("is started again" in note for note in notes) == 2
