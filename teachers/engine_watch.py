"""Runs an engine's server for a parent that may be killed, and leaves nothing of it behind.

A script of its own, standard library only: ``python -I engine_watch.py LOG -- COMMAND…``. Standard input is the parent's
life line. ``stop SECONDS`` on it asks the server to end (SIGTERM) and kills it after so long; its end of file, which the
kernel sends whatever killed the parent, kills the server at once. Either way, and also when the server dies by itself,
every process that it started is killed: vLLM's engine processes outlive a server that is killed, and keep the GPU.

(PR_SET_PDEATHSIG in place of the life line would fire when the *thread* that started us ends, which in a Ray worker it may.)
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_POLL_S = 0.1


def _die_with_us() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _kill_all(group: int) -> None:
    """Kill the server's process group, and then whatever of its descendants had left the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    # As a subreaper we are the parent of what lost its own: when we have no child left, nothing is left.
    listing = f"/proc/self/task/{os.getpid()}/children"
    while os.path.exists(listing):
        with open(listing) as file:
            children = [int(child) for child in file.read().split()]
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def main(log_path: str, command: list[str]) -> int:
    """Run the command until it ends or has to; returns its exit status, negative for a signal."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with open(log_path, "ab") as log:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_die_with_us,  # this process has one thread, so it is safe here
        )
    print(server.pid, flush=True)
    deadline = None
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    try:
        while server.poll() is None and (deadline is None or time.monotonic() < deadline):
            if not selector.select(timeout=_POLL_S):
                continue
            words = sys.stdin.readline().split()
            if not words:  # end of file: the parent is gone
                break
            deadline = time.monotonic() + float(words[1])
            server.terminate()
    finally:
        _kill_all(server.pid)
    return server.returncode if server.returncode is not None else -signal.SIGKILL


if __name__ == "__main__":
    # 128 + signal, as a shell says it: an exit status cannot be negative.
    status = main(sys.argv[1], sys.argv[3:])
    sys.exit(128 - status if status < 0 else status)
