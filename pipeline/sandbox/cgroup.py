"""A pids cgroup for one sandboxed run, where this user may make one; RLIMIT_NPROC counts in the user namespace in any case."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path


def pids_cgroup_parent() -> Path | None:
    """The folder in which this process may make a cgroup with a pids limit, or None (not root, or not delegated)."""
    membership = Path("/proc/self/cgroup")
    for row in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = row.split(":", 2)
        version_2 = not controllers
        folder = Path(("/sys/fs/cgroup" if version_2 else "/sys/fs/cgroup/pids") + path)
        handed_down = folder / "cgroup.subtree_control"  # version 2: the controllers that children get
        if version_2:
            enabled = handed_down.exists() and "pids" in handed_down.read_text().split()
        else:
            enabled = "pids" in controllers.split(",")
        if enabled and os.access(folder, os.W_OK) and (folder / "cgroup.procs").exists():
            return folder
    return None


@contextlib.contextmanager
def pids_cgroup(limit: int) -> Iterator[str]:
    """Make a cgroup of at most ``limit`` processes and threads; yields its folder, for the launcher to join and to remove.

    Yields "" where this user cannot make one.
    """
    parent = pids_cgroup_parent()
    if parent is None:
        yield ""
        return
    folder = parent / f"stillhouse-{secrets.token_hex(6)}"
    folder.mkdir()
    try:
        (folder / "pids.max").write_text(str(limit))
        yield str(folder)
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a cgroup that a launcher which was killed has left; its processes may take a moment to end."""
    for pause_s in (0.01, 0.1, 1.0, 0):
        if not folder.exists():
            return
        try:
            folder.rmdir()
        except OSError:
            if not pause_s:
                raise
            time.sleep(pause_s)
