"""Ask the checking processes (judge_worker.py): a small pool of persistent ones, a deadline and SIGKILL for each item.

Works the same from the main thread, other threads, after a fork and inside a Ray actor; no signal handler is used. One thread
uses one process; threads that ask at the same time get one each, up to ``MAX_WORKERS``, and wait beyond that. A process starts
with an environment that holds nothing but Python's own path, and without a network where the kernel allows to cut it
(``isolation`` says so).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import secrets
import select
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from stillhouse.pipeline.errors import StillhouseError

MAX_WORKERS = 4
_START_LIMIT_S = 120.0
_PATIENCE_S = 0.4
"""An item that takes longer may be hanging: the next worker is started beside it."""
_MAX_REPLY_BYTES = 1 << 16
_NO_REPLY = "something else than a reply came from the checking process"
_log = logging.getLogger(__name__)


def module_path() -> list[str]:
    """Our own path, and last the working folder: a verifier that the user keeps beside the recipe is found there."""
    return [*filter(None, sys.path), os.getcwd()]


class _Worker:
    """One judge_worker.py, spoken to through two pipes by one thread at a time."""

    def __init__(self) -> None:
        path = Path(__file__).with_name("judge_worker.py")
        # LD_LIBRARY_PATH: a Python that was built somewhere unusual does not start without it.
        environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(module_path()), "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # thread pools count against the memory limit
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the run, not for the check that it is waiting for
        )
        self.prepared: set[str] = set()
        self.preparing: tuple[str, str] | None = None
        self.network = "unknown"
        self.buffer = b""

    def send(self, message: dict[str, Any]) -> str:
        """Send one request and return its nonce; EOFError when the process ended."""
        nonce = secrets.token_hex(8)
        try:
            self.process.stdin.write(json.dumps({"id": nonce, **message}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise EOFError from error
        return nonce

    def receive(self, nonce: str, limit_s: float) -> dict[str, str]:
        """Wait for the reply to a request.

        Raises:
            TimeoutError: there is none within the limit.
            EOFError: the process ended, or something else came.
        """
        deadline = time.monotonic() + limit_s
        replies = select.poll()
        replies.register(self.process.stdout, select.POLLIN)
        while b"\n" not in self.buffer:
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0 or not replies.poll(left_ms):
                raise TimeoutError
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise EOFError
            self.buffer += chunk
            if len(self.buffer) > _MAX_REPLY_BYTES:
                raise EOFError(_NO_REPLY)
        first, _, self.buffer = self.buffer.partition(b"\n")
        try:
            reply = json.loads(first)
        except ValueError as error:
            raise EOFError(_NO_REPLY) from error
        if not isinstance(reply, dict) or reply.get("id") != nonce:
            raise EOFError(_NO_REPLY)  # what the text that is judged made the process write is worth nothing
        return reply

    def begin_to_prepare(self, message: dict[str, Any]) -> None:
        """Ask the worker to import what a message needs, and do not wait for it."""
        self.preparing = (_setup_name(message), self.send({"op": "prepare", **_setup(message)}))

    def prepare(self, message: dict[str, Any]) -> None:
        """Have the worker import what the message needs, once; imports do not count against an item's deadline."""
        name = _setup_name(message)
        why = ""
        try:
            while name not in self.prepared:
                if self.preparing is None:
                    self.begin_to_prepare(message)
                began, nonce = self.preparing
                self.preparing = None
                reply = self.receive(nonce, _START_LIMIT_S)
                self.network = reply["network"]
                if reply["outcome"] == "ready":
                    self.prepared.add(began)
                elif began == name:
                    why = reply["reason"]
                    break
        except TimeoutError:
            why = f"not ready after {_START_LIMIT_S:g} s"
        except EOFError:
            why = self.last_words() or "it ended without a word"
        if why:
            if message["what"] == "python":
                why += (
                    f"; {message['target']!r} has to name a function of a module that is installed, on PYTHONPATH, or in the "
                    f"working folder, {os.getcwd()}"
                )
            raise StillhouseError(f"the process that checks {message['what']} answers cannot start: {why}")

    def last_words(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace").strip().rpartition("\n")[2][:300]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):  # an unsent line to a process that is gone
                pipe.close()
        self.errors.close()


def _setup(message: dict[str, Any]) -> dict[str, Any]:
    return {key: message[key] for key in ("what", "task", "options", "target", "path") if key in message}


def _setup_name(message: dict[str, Any]) -> str:
    return json.dumps(_setup(message), sort_keys=True)


class _Pool:
    """The workers of this process: idle ones on a stack, and how many there are in all."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.idle: list[_Worker] = []
        self.num_workers = 0

    def take(self, message: dict[str, Any]) -> _Worker:
        """A worker for a message: an idle one, at best one that has imported what it needs, else a new one."""
        name = _setup_name(message)
        with self.condition:
            while not self.idle and self.num_workers >= MAX_WORKERS:
                self.condition.wait()
            self.idle.sort(key=lambda worker: name in worker.prepared)
            while self.idle:
                worker = self.idle.pop()
                if worker.process.poll() is None:
                    return worker
                worker.close()
                self.num_workers -= 1
            self.num_workers += 1
        return self.start()

    def start(self) -> _Worker:
        try:
            return _Worker()
        except BaseException:
            self.drop(None)
            raise

    def give_back(self, worker: _Worker) -> None:
        with self.condition:
            self.idle.append(worker)
            self.condition.notify()

    def drop(self, worker: _Worker | None) -> None:
        if worker is not None:
            worker.close()
        with self.condition:
            self.num_workers -= 1
            self.condition.notify()

    def start_spare(self, message: dict[str, Any]) -> None:
        """Start a worker beside one that may be hanging, so that it has imported everything by the time that one is killed."""
        with self.condition:
            if self.idle or self.num_workers >= 2 * MAX_WORKERS:
                return
            self.num_workers += 1
        spare = self.start()
        try:
            spare.begin_to_prepare(message)
        except BaseException:
            self.drop(spare)
            raise
        self.give_back(spare)

    def close_idle(self) -> None:
        with self.condition:
            while self.idle:
                self.idle.pop().close()
                self.num_workers -= 1
            self.condition.notify_all()


_pool = _Pool()
_hooks_set = False
_told_about_network = False


def _after_fork_in_child() -> None:
    """Forget the parent's workers: two processes must not share their pipes, nor a lock that another thread held."""
    global _pool
    _pool = _Pool()


def close_workers() -> None:
    """End the checking processes that are idle; the next verdict that needs one starts it again."""
    _pool.close_idle()


def worker_pids() -> list[int]:
    """The idle checking processes of this process."""
    return [worker.process.pid for worker in _pool.idle]


def isolation() -> str:
    """Say how the checking processes are shut off, after starting one: whether the network is cut, or why it is not."""
    pool = _pool
    worker = pool.take({"what": "math"})
    try:
        worker.prepare({"what": "math"})
    except BaseException:
        pool.drop(worker)
        raise
    pool.give_back(worker)
    return worker.network


def ask(message: dict[str, Any], timeout_s: float) -> tuple[str, str]:
    """Have one item judged in a checking process: (outcome, reason); undecided when the deadline passed or it died.

    A process that ends by itself or runs out of memory may have been spoilt by an earlier item: once, the item is given to
    another, with the time that is left.

    Raises:
        StillhouseError: the process does not start, or cannot import what the check needs.
    """
    global _hooks_set
    if not _hooks_set:
        _hooks_set = True
        atexit.register(close_workers)
        os.register_at_fork(after_in_child=_after_fork_in_child)
    pool, left_s = _pool, timeout_s  # a fork replaces the pool
    for is_last in (False, True):
        worker = pool.take(message)
        try:
            worker.prepare(message)
            _tell_about_network(worker)
            start = time.monotonic()
            reply = _exchange(pool, worker, message, left_s)
        except TimeoutError:
            pool.drop(worker)
            break
        except EOFError as error:
            pool.drop(worker)
            if is_last:
                return "undecided", str(error) or "the checking process ended by itself"
            left_s = max(_PATIENCE_S, left_s - (time.monotonic() - start))
        except BaseException:  # it cannot load what it needs, or we were interrupted: the pipe may be out of step
            pool.drop(worker)
            raise
        else:
            pool.give_back(worker)
            return reply["outcome"], reply["reason"]
    return "undecided", f"no verdict within {timeout_s:g} s; the check was killed"


def _exchange(pool: _Pool, worker: _Worker, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Send an item and wait for the reply; EOFError also where the process ran out of memory."""
    nonce = worker.send(message)
    try:
        reply = worker.receive(nonce, min(_PATIENCE_S, timeout_s))
    except TimeoutError:
        pool.start_spare(message)
        reply = worker.receive(nonce, max(0.0, timeout_s - _PATIENCE_S))
    if reply.get("spent"):
        raise EOFError(reply["reason"])
    return reply


def _tell_about_network(worker: _Worker) -> None:
    """Say once that the network is there, where the kernel does not allow to cut it."""
    global _told_about_network
    if worker.network != "cut off" and not _told_about_network:
        _told_about_network = True
        _log.warning("the processes that check answers keep the network: %s", worker.network)
