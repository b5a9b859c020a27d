"""Run this Python as an unprivileged user, for tests that were started as root.

A Python under a folder that is closed to others (root's home) cannot be started by them. In a mount namespace of its own,
each closed folder on the way is replaced by an open, empty one into which only what Python needs is bound again.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NOBODY = 65534


def needed_folders() -> list[Path]:
    """What a Python process of these tests reads: interpreter, virtual environment, and every folder on sys.path."""
    folders = {Path(path).resolve() for path in (sys.base_prefix, sys.prefix, *sys.path, Path(__file__).parents[1]) if path}
    folders = {folder for folder in folders if folder.is_dir()}
    return sorted(folder for folder in folders if not any(other in folder.parents for other in folders))


def script(command: Sequence[str]) -> str:
    """The shell script that opens the way and becomes the unprivileged user."""
    lines = ["set -e"]
    closed: dict[Path, list[Path]] = {}
    for folder in needed_folders():
        for parent in reversed(folder.parents):
            if not parent.stat().st_mode & 0o001:
                closed.setdefault(parent, []).append(folder)
                break
    for number, (parent, folders) in enumerate(closed.items()):
        stage = f"/mnt/{number}"
        lines.append(f"mkdir -p {stage}")
        for place, folder in enumerate(folders):
            lines.append(f"mkdir -p {stage}/{place}; mount --rbind {shlex.quote(str(folder))} {stage}/{place}")
        lines.append(f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(parent))}")
        for place, folder in enumerate(folders):
            quoted = shlex.quote(str(folder))
            lines.append(f"mkdir -p {quoted}; mount --rbind {stage}/{place} {quoted}")
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    lines.append("exec " + shlex.join([*drop, *command]))
    return "\n".join(lines)


def why_not() -> str:
    """Why this cannot be done here, "" when it can."""
    if os.geteuid() != 0:
        return "not started as root: every other test runs as an unprivileged user already"
    if missing := [name for name in ("unshare", "setpriv", "mount") if shutil.which(name) is None]:
        return f"{', '.join(missing)} of util-linux not installed"
    tried = run(["-c", "import os; print(os.getuid())"], timeout_s=60)
    return "" if tried.stdout.strip() == str(NOBODY) else f"cannot become another user: {tried.stderr.strip()[-200:]}"


def run(arguments: Sequence[str], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` as nobody, with this process's sys.path."""
    whole = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt && " + script([sys.executable, *arguments])]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(whole, capture_output=True, text=True, timeout=timeout_s, env=environment, cwd="/", check=False)
