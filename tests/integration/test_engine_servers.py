"""Real engine servers on this machine's CPU: started, asked through our client, stopped, killed.

``transformers serve`` in every run; llama.cpp's server and vLLM's CPU build where STILLHOUSE_LLAMA_CPP_PYTHON and
STILLHOUSE_VLLM_PYTHON name an interpreter that has them (teachers/README.md says how to make one).
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from stillhouse.pipeline.errors import TeacherError
from stillhouse.pipeline.records import Sampling
from stillhouse.teachers import engine_process, engine_watch
from stillhouse.teachers.endpoint import Endpoints
from stillhouse.teachers.engine_commands import EngineSpec
from stillhouse.teachers.engine_process import EngineServer
from tests.chaos.engines import TINY, correct, demo_problems, engine_spec, serve, through_endpoints

SPEC = EngineSpec("transformers_serve", str(TINY), dtype="float32")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(SPEC, tmp_path_factory.mktemp("engine")) as server:
        yield server


def ask(spec, server, problems, sampling, **settings):
    endpoints = Endpoints([server.url])
    return asyncio.run(through_endpoints(spec, endpoints, problems, sampling, max_concurrent=4, **settings))


def assert_traces_are_whole(spec, server, count, stream):
    """Reasoning and answer apart, tokens counted by the server, and answers that are mostly right."""
    problems, sampling = demo_problems(count)
    traces = ask(spec, server, problems, sampling, stream=stream)
    finished = [trace for trace in traces if trace.finish_reason == "stop"]
    assert len(finished) >= 0.9 * count
    # llama.cpp's server sends no usage with a stream, whatever it is asked.
    assert all(trace.usage_counted for trace in traces) is not (stream and spec.engine == "llama_cpp")
    assert all(trace.num_prompt_tokens > 10 for trace in traces)
    assert sum(trace.reasoning is not None for trace in traces) >= 0.7 * count
    assert all(trace.completion.startswith("<think>\n") for trace in traces if trace.reasoning is not None)
    # The teacher is right 88 % of the time; fewer than half of 6 would be one in 300.
    assert sum(correct(problems, [trace.completion for trace in traces]).values()) >= 0.5 * count


def assert_top_k_holds(spec, server):
    """With top-k 1 every seed writes the same, with none of it they differ: both settings reach the sampler."""
    problems, _ = demo_problems(3)
    greedy = ask(spec, server, problems[:1], Sampling(1.5, 1.0, 24, top_k=1), samples=4)
    free = ask(spec, server, problems[:1], Sampling(1.5, 1.0, 24), samples=4)
    assert len({trace.completion for trace in greedy}) == 1
    assert len({trace.completion for trace in free}) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_transformers_serve_writes_whole_traces(server, stream):
    """Its answers would otherwise come without their reasoning, or as lengths that the filters drop."""
    assert_traces_are_whole(SPEC, server, 6, stream)


def test_transformers_serve_samples_as_it_is_asked(server):
    """It refuses top_k as a field, and without being told adds top-k 50."""
    assert_top_k_holds(SPEC, server)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["llama_cpp", "vllm"])
def test_the_other_engines_servers(engine, tmp_path):
    """The same promises on llama.cpp and on vLLM, whose flags and defaults are others."""
    try:
        spec = engine_spec(engine, tmp_path)
    except LookupError as error:
        pytest.skip(str(error))
    with serve(spec, tmp_path) as server:
        family = psutil.Process(server.server_pid).children(recursive=True)
        assert_traces_are_whole(spec, server, 30, stream=False)
        assert_traces_are_whole(spec, server, 30, stream=True)
        assert_top_k_holds(spec, server)
        # As when it runs out of memory. vLLM's engine process goes on without it, and would keep the GPU.
        os.kill(server.server_pid, signal.SIGKILL)
        assert psutil.wait_procs(family, timeout=60)[1] == []
        deadline = time.monotonic() + 60
        while server.state() != "dead":
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_an_interpreter_that_is_not_there(tmp_path):
    """A path that holds on the driver and not on the node is a common mistake."""
    with pytest.raises(TeacherError, match=r"'/no/python' cannot be started on .*No such file"):
        EngineServer(replace(SPEC, python="/no/python"), log_folder=tmp_path).launch()


@pytest.mark.slow
def test_a_server_that_dies_says_why(tmp_path):
    """An error without the end of the log sends a user to another machine to look for it."""
    spec = EngineSpec("transformers_serve", str(tmp_path / "no-such-model"))
    with pytest.raises(TeacherError, match=r"status 1 before it answered a chat(.|\n)*no-such-model"), serve(spec, tmp_path):
        pass


@pytest.mark.slow
def test_a_taken_port_is_no_failure(tmp_path, monkeypatch, server):
    """Between choosing a free port and listening on it somebody else can take it, on a node full of engines often."""
    port = int(server.url.split(":")[-1].removesuffix("/v1"))
    free = engine_process.free_port("127.0.0.1")
    ports = iter([port, free])
    monkeypatch.setattr(engine_process, "free_port", lambda host: next(ports))
    with serve(SPEC, tmp_path) as second:
        assert second.url == f"http://127.0.0.1:{free}/v1"


FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])                          # in its group
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)  # out of its group
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def family(tmp_path):
    """A stubborn server with two children, watched for a parent that is a process of its own; (parent, all of them)."""
    log = tmp_path / "log"
    watched = [sys.executable, "-I", engine_watch.__file__, str(log), "--", sys.executable, "-c", FAMILY]
    holder = f"import subprocess, time; subprocess.Popen({watched!r}, stdin=subprocess.PIPE); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (log.exists() and "ready" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes = psutil.Process(parent.pid).children(recursive=True)
    assert len(processes) == 4
    yield parent, processes
    parent.kill()
    parent.wait()
    for process in processes:
        if process.is_running():
            process.kill()


def test_nothing_outlives_a_killed_parent(family):
    """An engine left behind by a killed Ray worker holds its GPU until somebody finds it by hand."""
    parent, processes = family
    parent.kill()
    assert psutil.wait_procs(processes, timeout=60)[1] == []


def test_nothing_outlives_a_killed_server(family):
    """vLLM's server can die and its engine process go on."""
    _, processes = family
    server = next(process for process in processes if process.cmdline()[1:] == ["-c", FAMILY])
    its_own = [server, *server.children(recursive=True)]
    server.kill()
    assert psutil.wait_procs(its_own, timeout=60)[1] == []


def test_stop_ends_a_server_that_will_not(tmp_path, monkeypatch):
    """A shutdown that waits for a hanging server for ever keeps the run from ending."""
    monkeypatch.setattr(engine_process, "command", lambda spec, port, host: [sys.executable, "-c", FAMILY])
    server = EngineServer(SPEC, log_folder=tmp_path)
    server.launch()
    server_process = psutil.Process(server.server_pid)
    deadline = time.monotonic() + 60
    while len(family := server_process.children(recursive=True)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.stop(drain_s=0.5)
    assert psutil.wait_procs([server_process, *family], timeout=60)[1] == []
    assert server.state() == "dead"
