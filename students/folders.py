"""A folder that is either there in full or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside ``path`` to write into; at the end sync every file and rename it to ``path``.

    A folder that was at ``path`` is replaced. After an exception, or a kill, ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    yield temporary
    umask = os.umask(0)
    os.umask(umask)
    for file in temporary.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)  # safetensors leaves 0600, which a server under another user cannot read
    for written in [*temporary.rglob("*"), temporary]:
        descriptor = os.open(written, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if path.exists():
        shutil.rmtree(path)
    temporary.replace(path)
