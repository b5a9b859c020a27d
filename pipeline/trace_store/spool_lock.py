"""One process a spool, and only on a disk of this machine."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from stillhouse.pipeline.errors import SpoolError

# SQLite's write-ahead log shares memory between processes and trusts fsync and locks: none of these keeps all three promises.
NETWORK_FILE_SYSTEMS = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "pvfs2"}
    | {"smb3", "smbfs", "wekafs"}
)
LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs"})


class SpoolLock:
    """Holds a spool's folder for this process until `release` or the process ends, however it ends.

    Raises:
        SpoolError: another process (or another writer of this one) holds it, or the folder is on a network file system.
    """

    def __init__(self, folder: Path):
        refuse_network_disk(folder)
        path = folder / "spool.lock"
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise SpoolError(f"the spool's folder {folder} cannot be written: {error}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._descriptor, 64).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise SpoolError(
                f"the spool in {folder} is open in process {holder or 'unknown'} of this machine, and only one may write it: "
                "wait until that run ends or stop it, or give this one another folder."
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let another process in. The file stays: deleting it would let two in."""
        os.close(self._descriptor)


def refuse_network_disk(folder: Path, mounts: str | None = None) -> None:
    """Raise SpoolError where ``folder`` is on a network file system.

    Args:
        mounts: a table in the form of /proc/mounts; read from there by default. Where a system has none (macOS) nothing
            can be told and nothing is refused.
    """
    if mounts is None:
        table = Path("/proc/mounts")
        if not table.exists():
            return
        mounts = table.read_text(errors="surrogateescape")
    kind = file_system_of(folder.resolve(), mounts)
    if kind in NETWORK_FILE_SYSTEMS or (kind.startswith("fuse.") and kind not in LOCAL_FUSE):
        raise SpoolError(
            f"the spool's folder {folder} is on a network file system ({kind}), where neither locks nor fsync can be trusted. "
            "Put the spool on a local disk of the driver; the store itself may be anywhere."
        )


def file_system_of(path: Path, mounts: str) -> str:
    """The type of the file system that an absolute path is on: that of the longest mount point above it, the last one wins."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        # Blanks are written as octal escapes.
        point = fields[1].replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
        if path.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), fields[2]
    return kind
