"""One engine server on this machine: started, waited for until it answers a chat, watched, stopped with all it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import psutil

from stillhouse.pipeline.errors import TeacherError, first_line
from stillhouse.teachers.engine_commands import EngineSpec, command, environment, health_path, probe_body

State = Literal["starting", "up", "dead"]

_WATCH = Path(__file__).with_name("engine_watch.py")
_POLL_S = 0.2
_HEALTH_TIMEOUT_S = 5.0
_LAST_LINES = 15
_PORT_TRIES = 5
_NOT_YET = (0, 503)
"""A chat is asked again after these: no answer, and "still loading"."""
_PORT_IS_TAKEN = ("address already in use", "Errno 98")
# No proxy gets to see a request to a server of our own.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EngineServer:
    """A server process for ``spec``. Use as a context manager, or `launch` and `stop` it.

    Args:
        host: address of this machine that it listens on. The server asks nobody for a key.
        log_folder: gets ``engine-<engine>-<port>.log`` with all that the process writes.
        start_limit_s: seconds from start to the first answered chat; loading a large model takes many minutes.
        variables: environment to start from; None takes this process's.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        log_folder: Path,
        host: str = "127.0.0.1",
        start_limit_s: float = 1800.0,
        variables: Mapping[str, str] | None = None,
    ):
        self._spec = spec
        self._host = host
        self._log_folder = log_folder
        self._start_limit_s = start_limit_s
        self._variables = os.environ if variables is None else variables
        self._watch: subprocess.Popen[str] | None = None
        self._server_pid = 0
        self._port = 0
        self._stopping = False
        self._starting = threading.Lock()
        self._answered = threading.Event()
        self._failure = ""
        self._log_path = log_folder

    @property
    def url(self) -> str:
        """Base URL for a chat client."""
        return f"http://{self._host}:{self._port}/v1"

    @property
    def server_pid(self) -> int:
        """Process id of the engine's own server, which leads a process group of its own."""
        return self._server_pid

    def launch(self) -> None:
        """Start the process, and begin to wait for it in the background; see `state`."""
        self._start_process()
        threading.Thread(target=self._bring_up, name="engine-start", daemon=True).start()

    def wait_until_up(self) -> str:
        """Wait until a chat was answered; gives the base URL.

        Raises:
            TeacherError: the server died or took too long; with the end of its log.
        """
        while (state := self.state()) == "starting":
            time.sleep(_POLL_S)
        if state == "dead":
            raise TeacherError(self.why_dead())
        return self.url

    def state(self) -> State:
        """``starting`` until a chat of one token was answered, then ``up``; ``dead`` once the process has ended."""
        if self._failure:
            return "dead"
        if not self._answered.is_set():
            return "starting"  # the thread that waits for it says when it has died
        return "up" if self.alive() else "dead"

    def why_dead(self) -> str:
        """What ended it, in a sentence, with the last lines of its log."""
        return self._failure or self._describe(f"ended with status {self._status()}")

    def alive(self) -> bool:
        """Whether the server's process runs; it may hang all the same, see `healthy`."""
        return self._watch is not None and self._watch.poll() is None

    def healthy(self) -> bool:
        """Whether the server answers its health path."""
        return is_healthy(self._spec, self.url)

    def stop(self, drain_s: float = 10.0) -> None:
        """End the server: SIGTERM, so that it can answer what it has, and SIGKILL for its whole group after ``drain_s``."""
        with self._starting:
            self._stopping = True
        watch = self._watch
        if watch is None:
            return
        if watch.poll() is None:
            try:
                watch.stdin.write(f"stop {drain_s}\n")
                watch.stdin.flush()
                watch.wait(timeout=drain_s + 10)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                watch.kill()
        watch.wait()
        watch.stdin.close()
        self._sweep()

    def __enter__(self) -> EngineServer:
        self.launch()
        try:
            self.wait_until_up()
        except BaseException:
            self.stop(drain_s=0)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start_process(self) -> None:
        self._port = free_port(self._host)
        self._log_folder.mkdir(parents=True, exist_ok=True)
        self._log_path = self._log_folder / f"engine-{self._spec.engine}-{self._port}.log"
        whole = command(self._spec, self._port, host=self._host)
        self._watch = subprocess.Popen(
            [sys.executable, "-I", str(_WATCH), str(self._log_path), "--", *whole],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(self._spec, self._variables),
            start_new_session=True,
        )
        line = self._watch.stdout.readline()
        if not line:
            reason = self._watch.stderr.read().strip().splitlines() or ["no reason given"]
            raise TeacherError(f"{whole[0]!r} cannot be started on {socket.gethostname()}: {reason[-1]}")
        self._server_pid = int(line)

    def _bring_up(self) -> None:
        """Wait for a chat, on another port where somebody else took ours."""
        deadline = time.monotonic() + self._start_limit_s
        for _ in range(_PORT_TRIES):
            try:
                failure = self._wait_for_a_chat(deadline)
                if not failure:
                    self._answered.set()
                    return
                if not any(sign in self._last_lines() for sign in _PORT_IS_TAKEN):
                    break
                with self._starting:
                    if self._stopping:
                        break
                    self._sweep()
                    self._start_process()
            except (TeacherError, OSError, psutil.Error) as error:
                self._failure = f"{self._spec.engine} cannot be started: {error}"
                return
        self._failure = self._describe(failure)

    def _wait_for_a_chat(self, deadline: float) -> str:
        """Wait until the process answers a chat of one token; gives the reason where it never will."""
        while self.alive():
            if self._stopping:
                return "was stopped before it answered a chat"
            if time.monotonic() > deadline:
                return f"had not answered a chat after {self._start_limit_s:g} s"
            if self._listens() and self.healthy():
                code, reason = ask_one_token(self._spec, self.url, timeout_s=max(1.0, deadline - time.monotonic()))
                if code == 200:
                    return ""
                if code not in _NOT_YET:
                    return f"is up and does not answer a chat ({reason})"
            time.sleep(_POLL_S)
        return f"ended with status {self._status()} before it answered a chat"

    def _listens(self) -> bool:
        """Whether it is our server that listens on the port, and not one that took it before ours could."""
        try:
            server = psutil.Process(self._server_pid)
            sockets = [s for process in (server, *server.children(recursive=True)) for s in process.net_connections("tcp")]
        except psutil.NoSuchProcess:
            return False
        return any(s.status == psutil.CONN_LISTEN and s.laddr.port == self._port for s in sockets)

    def _sweep(self) -> None:
        """Kill the server's group where the process that watched it was itself killed and could not."""
        if self._server_pid and (self._status() or 0) < 0:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server_pid, signal.SIGKILL)

    def _status(self) -> int | None:
        return None if self._watch is None else self._watch.poll()

    def _last_lines(self) -> str:
        try:
            with self._log_path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
                return "\n".join(file.read().decode(errors="replace").splitlines()[-_LAST_LINES:])
        except OSError as error:
            return f"(its log cannot be read: {error})"

    def _describe(self, what: str) -> str:
        return (
            f"the {self._spec.engine} server for {self._spec.model!r} on {socket.gethostname()} {what}; "
            f"the end of {self._log_path}:\n{self._last_lines()}"
        )


def free_port(host: str) -> int:
    """A TCP port of ``host`` that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def is_healthy(spec: EngineSpec, url: str, *, timeout_s: float = _HEALTH_TIMEOUT_S) -> bool:
    """Whether the server with base URL ``url`` answers its health path with 200."""
    try:
        with _OPENER.open(url.removesuffix("/v1") + health_path(spec), timeout=timeout_s) as response:
            return response.status == 200
    except OSError:  # refused, reset, timed out, or another status
        return False


def ask_one_token(spec: EngineSpec, url: str, *, timeout_s: float) -> tuple[int, str]:
    """Ask the server with base URL ``url`` for a chat of one token: a server can be healthy and have no model, or no memory.

    Returns:
        the status (0 where no answer came, -1 where it is no chat completion), and "" or what is wrong.
    """
    request = urllib.request.Request(
        f"{url}/chat/completions", data=json.dumps(probe_body(spec)).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, f"{error.code}: {error.read(500).decode(errors='replace')}"
    except (OSError, ValueError) as error:
        return 0, f"{type(error).__name__}: {first_line(error)}"
    if not isinstance(answer, dict) or not answer.get("choices"):
        return -1, f"its answer has no choices: {str(answer)[:200]}"
    return 200, ""
