"""A contender in a process of its own: asked by lines of JSON, it measures itself and answers.

What needs one: whatever brings its own OpenMP runtime or its own copy of the weights (llama.cpp), and every peak of memory,
which belongs to a process. A worker lives through all rounds, so contenders still take turns. Memory is read from Linux's
/proc, where the high-water mark can be reset: what building the model took is not counted against the step.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class Worker:
    """A running worker; use as a context manager, so that it ends with the measurement.

    Args:
        module: run as ``python -m module``; it calls :func:`serve`.
        arguments: its command line.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self.name = " ".join((module, *arguments))
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed in __exit__)
        # -P: the working directory stays off the path; a folder there called `kernels` would hide a package of that name.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            RuntimeError: the worker ended instead of answering; its last lines on stderr are in the message.
        """
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self._stderr.seek(0)
            tail = self._stderr.read()[-1500:].decode(errors="replace")
            raise RuntimeError(f"the benchmark's worker ({self.name}) ended with code {code} instead of answering:\n{tail}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.stdin.close()  # its loop ends
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer requests from stdin until it closes; whatever else the process prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line))) + "\n")
        replies.flush()


def can_measure_memory() -> bool:
    """Whether this system tells a process's memory and lets the peak be reset (Linux)."""
    return _STATUS.is_file() and os.access(_CLEAR_REFS, os.W_OK)


def resident_bytes() -> int:
    """Memory of this process that is in use now, after everything that was freed has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> None:
    """Let :func:`peak_bytes` count from here."""
    _CLEAR_REFS.write_text("5")


def peak_bytes() -> int:
    """The most memory that this process held since :func:`reset_peak`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
