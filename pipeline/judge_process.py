"""Ask the checking process (judge_worker.py): one persistent process for each of ours, a deadline and SIGKILL for each item.

Works the same from the main thread, another thread, after a fork and inside a Ray actor; no signal handler is used.
"""

from __future__ import annotations

import atexit
import contextlib
import json
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

_START_LIMIT_S = 120.0


class _Worker:
    """One judge_worker.py, spoken to through two pipes; not safe for two threads at once (``ask`` holds the lock)."""

    def __init__(self) -> None:
        path = Path(__file__).with_name("judge_worker.py")
        keep = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG") if name in os.environ}
        keep |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONDONTWRITEBYTECODE": "1"}
        keep |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # thread pools would count against the memory limit
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=keep,
            start_new_session=True,  # Ctrl-C is for the run, not for the check that it is waiting for
        )
        self.prepared: set[str] = set()
        self.buffer = b""

    def request(self, message: dict[str, Any], limit_s: float) -> dict[str, str]:
        """Send one request and wait for its reply; TimeoutError past the limit, EOFError when the process ended."""
        nonce = secrets.token_hex(8)
        line = json.dumps({"id": nonce, **message}).encode() + b"\n"
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise EOFError from error
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
        first, _, self.buffer = self.buffer.partition(b"\n")
        reply = json.loads(first)
        if reply["id"] != nonce:
            raise EOFError  # somebody else wrote to the pipe; what it says is worth nothing
        return reply

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


_lock = threading.Lock()
_worker: _Worker | None = None
_hooks_set = False


def _after_fork_in_child() -> None:
    """Forget the parent's worker: two processes must not share its pipes, nor a lock that another thread held."""
    global _lock, _worker
    _lock, _worker = threading.Lock(), None


def close_worker() -> None:
    """End the checking process, if there is one; the next verdict that needs it starts another."""
    with _lock:
        _drop_worker()


def _drop_worker() -> None:
    global _worker
    if _worker is not None:
        _worker.close()
        _worker = None


def _ready_worker(message: dict[str, Any]) -> _Worker:
    """Return a live worker that has imported what the message needs; imports do not count against an item's deadline."""
    global _worker, _hooks_set
    if not _hooks_set:
        atexit.register(close_worker)
        os.register_at_fork(after_in_child=_after_fork_in_child)
        _hooks_set = True
    if _worker is not None and _worker.process.poll() is not None:
        _drop_worker()
    if _worker is None:
        _worker = _Worker()
    setup = {key: message[key] for key in ("what", "task", "options") if key in message}
    name = json.dumps(setup, sort_keys=True)
    if name not in _worker.prepared:
        why = ""
        try:
            reply = _worker.request({"op": "prepare", **setup}, _START_LIMIT_S)
            why = reply["reason"] if reply["outcome"] != "ready" else ""
        except TimeoutError:
            why = f"not ready after {_START_LIMIT_S:g} s"
        except EOFError:
            why = _worker.last_words() or "it ended without a word"
        if why:
            raise StillhouseError(f"the process that checks {setup['what']} answers cannot start: {why}")
        _worker.prepared.add(name)
    return _worker


def ask(message: dict[str, Any], timeout_s: float) -> tuple[str, str]:
    """Have one item judged in the checking process: (outcome, reason); undecided when the deadline passed or it died.

    Raises:
        StillhouseError: the process does not start, or cannot import what the check needs.
    """
    with _lock:
        try:
            reply = _ready_worker(message).request(message, timeout_s)
        except TimeoutError:
            _drop_worker()
            return "undecided", f"no verdict within {timeout_s:g} s; the check was killed"
        except EOFError:
            _drop_worker()
            return "undecided", "the checking process ended by itself"
        except BaseException:  # interrupted between request and reply: the pipe is out of step
            _drop_worker()
            raise
    return reply["outcome"], reply["reason"]
