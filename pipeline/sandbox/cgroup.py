"""A pids cgroup for one sandboxed run, where this user may make one; elsewhere RLIMIT_NPROC counts inside the user
namespace."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path


def pids_cgroup_parent() -> Path | None:
    """The folder in which this process may make a cgroup with a pids limit, or None (not root, or not delegated)."""
    for row in Path("/proc/self/cgroup").read_text().splitlines() if os.path.exists("/proc/self/cgroup") else []:
        _, controllers, path = row.split(":", 2)
        for mounted in (
            ("/sys/fs/cgroup/pids",) if "pids" in controllers.split(",") else ("/sys/fs/cgroup",) if not controllers else ()
        ):
            folder = Path(mounted + path)
            # version 2 hands a controller to children only where the parent says so
            enabled = controllers or (
                (folder / "cgroup.subtree_control").exists() and "pids" in (folder / "cgroup.subtree_control").read_text()
            )
            if enabled and os.access(folder, os.W_OK) and (folder / "cgroup.procs").exists():
                return folder
    return None


@contextlib.contextmanager
def pids_cgroup(limit: int) -> Iterator[list[str]]:
    """Make a cgroup of at most ``limit`` processes and threads; yields the files that a process writes "0" into to join it.

    Yields an empty list where this user cannot make one.
    """
    parent = pids_cgroup_parent()
    if parent is None:
        yield []
        return
    folder = parent / f"stillhouse-{secrets.token_hex(6)}"
    folder.mkdir()
    try:
        (folder / "pids.max").write_text(str(limit))
        yield [str(folder / "cgroup.procs")]
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove an emptied cgroup; the kernel may take a moment to notice that the last process is gone."""
    for pause_s in (0.001, 0.01, 0.1, 1.0):
        try:
            folder.rmdir()
        except OSError:
            time.sleep(pause_s)
        else:
            return
    folder.rmdir()
