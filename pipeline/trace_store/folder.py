"""One folder of whole files, on a disk or in an object store, with a create that only one writer can win.

A file is written whole or not at all: after kill -9, a power cut or a broken connection a name holds the old content, the
whole new one, or nothing. Names are relative to the folder, with forward slashes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol

from stillhouse.pipeline.errors import RecipeError, StillhouseError
from stillhouse.pipeline.store import fsync_folder

OBJECT_STORE_PACKAGES = {
    "s3": "pip install 'stillhouse[s3]'",
    "gs": "pip install gcsfs",
    "gcs": "pip install gcsfs",
    "az": "pip install adlfs",
    "abfs": "pip install adlfs",
    "memory": "",
}
"""Schemes that are understood beside ``file``, and what brings the package of each. ``memory`` dies with its process."""


class StorageError(StillhouseError, OSError):
    """The disk or object store does not do what it was asked: not there, not allowed, full, or not answering."""


class Folder(Protocol):
    """What the trace store needs of a disk or an object store. All methods raise `StorageError` where the store refuses."""

    url: str
    is_local: bool

    @property
    def exclusive(self) -> bool:
        """True where of two writers that create the same name exactly one succeeds. Probed once, by writing."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Make ``name`` hold ``data``, whole; whatever was there before is gone."""
        ...

    def write_file(self, name: str, local_path: Path) -> None:
        """Make ``name`` hold a copy of a local file, streamed; the local file stays."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Make ``name`` hold ``data`` unless there is such a file: then False. Only where ``exclusive``.

        True also where the file has exactly these bytes: a request that the network repeats must not lose against itself.
        Content that two writers could both produce therefore needs something of each writer's own in it.
        """
        ...

    def read(self, name: str) -> bytes:
        """All bytes of a file; FileNotFoundError where there is none."""
        ...

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """`read` of each name, at once where the store is far away."""
        ...

    def open(self, name: str) -> BinaryIO:
        """A seekable binary file for reading; FileNotFoundError where there is none."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file; FileNotFoundError where there is none."""
        ...

    def modified(self, name: str) -> float:
        """When a file was written, seconds since 1970 by the store's clock; FileNotFoundError where there is none."""
        ...

    def exists(self, name: str) -> bool: ...

    def list(self, prefix: str) -> list[str]:
        """Names of the files directly in a sub-folder (``""``: in the folder itself), sorted; none where there is no such
        sub-folder. Half-written files of a writer that died begin with a dot."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens where there is none."""
        ...


def open_folder(url: str | Path) -> Folder:
    """Open a folder by path or URL: ``runs/demo/traces``, ``file:///data/traces``, ``s3://bucket/traces``. Writes nothing.

    Endpoint and keys of an object store come from the environment (for S3 ``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``,
    ``AWS_SECRET_ACCESS_KEY``, ``AWS_PROFILE`` …), never from the URL.

    Raises:
        RecipeError: the scheme is not one of ours, the URL carries a user or password, or the scheme's package is missing.
    """
    text = str(url)
    scheme, separator, rest = text.partition("://")
    if isinstance(url, Path) and text.partition(":/")[0] in ("file", *OBJECT_STORE_PACKAGES):
        raise RecipeError(f"{text} was a URL before it was made a path; pass it as text")
    if isinstance(url, Path) or (not separator and "::" not in text):
        return LocalFolder(Path(url))
    known = ", ".join(["file", *(name for name in OBJECT_STORE_PACKAGES if name != "memory")])
    if "::" in text or (scheme != "file" and scheme not in OBJECT_STORE_PACKAGES):
        raise RecipeError(f"a trace store is a folder or a URL of one of {known}; got one that begins with {text[:16]!r}")
    authority, _, path = rest.partition("/")
    user, at, _ = authority.rpartition("@")
    if at and (scheme not in ("az", "abfs") or ":" in user):  # abfs://container@account is Azure's way of naming a container
        raise RecipeError(
            f"a URL with a user or password in it would end up in files and logs; give {scheme}://<bucket>/<path> and put the "
            "keys into the environment (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    if scheme == "file":
        if authority:
            raise RecipeError(f"file:///absolute/path has three slashes; got {text!r}")
        return LocalFolder(Path("/" + path))
    if not authority:
        raise RecipeError(f"{text!r} names no bucket; expected {scheme}://<bucket>/<path>")
    from stillhouse.pipeline.trace_store.objects import ObjectFolder

    return ObjectFolder(scheme, text.rstrip("/"), install=OBJECT_STORE_PACKAGES[scheme])


class LocalFolder:
    """A folder on a local or shared file system, made at the first write."""

    is_local = True

    def __init__(self, root: Path):
        self.root = root.absolute()
        self.url = str(self.root)

    @cached_property
    def exclusive(self) -> bool:
        # A file appears under its name by a hard link, which fails where the name exists. Some file systems (exFAT, many that
        # show a bucket as a folder) have none.
        probe = self.root / f".probe-{secrets.token_hex(6)}"
        with in_words(f"{self.root} cannot be written"), self._beside(probe, lambda file: file.write(b"")) as temporary:
            try:
                os.link(temporary, probe)
            except OSError:
                return False
            probe.unlink()
            return True

    def write(self, name: str, data: bytes) -> None:
        self._replace(name, lambda file: file.write(data))

    def write_file(self, name: str, local_path: Path) -> None:
        def copy(file: BinaryIO) -> None:
            with Path(local_path).open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)

        self._replace(name, copy)

    def create(self, name: str, data: bytes) -> bool:
        path = self.root / name
        with in_words(f"{path} cannot be written"), self._beside(path, lambda file: file.write(data)) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                if path.read_bytes() != data:
                    return False
            fsync_folder(path.parent)
            return True

    def read(self, name: str) -> bytes:
        with in_words(f"{self.root / name} cannot be read"):
            return (self.root / name).read_bytes()

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        return [self.read(name) for name in names]

    def open(self, name: str) -> BinaryIO:
        with in_words(f"{self.root / name} cannot be read"):
            return (self.root / name).open("rb")

    def size(self, name: str) -> int:
        return self._stat(name).st_size

    def modified(self, name: str) -> float:
        return self._stat(name).st_mtime

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def list(self, prefix: str) -> list[str]:
        folder = self.root / prefix
        with in_words(f"{folder} cannot be listed"):
            try:
                entries = list(os.scandir(folder))
            except FileNotFoundError:
                return []
        return sorted(Path(prefix, entry.name).as_posix() for entry in entries if entry.is_file())

    def delete(self, name: str) -> None:
        with in_words(f"{self.root / name} cannot be removed"):
            (self.root / name).unlink(missing_ok=True)

    def _stat(self, name: str) -> os.stat_result:
        with in_words(f"{self.root / name} cannot be looked up"):
            return (self.root / name).stat()

    def _replace(self, name: str, fill: Callable[[BinaryIO], object]) -> None:
        path = self.root / name
        with in_words(f"{path} cannot be written"), self._beside(path, fill) as temporary:
            os.replace(temporary, path)
            fsync_folder(path.parent)

    @contextlib.contextmanager
    def _beside(self, path: Path, fill: Callable[[BinaryIO], object]) -> Iterator[Path]:
        """A whole, fsynced file beside ``path`` under a name of its own, gone at the end."""
        make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        try:
            with temporary.open("xb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents so that they survive a power cut."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with in_words(f"{folder} cannot be made"):
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


@contextlib.contextmanager
def in_words(failed: str) -> Iterator[None]:
    """Turn what a file system raises into one sentence that begins with what failed; a missing file stays FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, StillhouseError):
        raise
    except PermissionError as error:
        raise StorageError(f"{failed}: access is denied ({_said(error)}); check the permissions of this user or key") from error
    except OSError as error:
        raise StorageError(f"{failed}: {_said(error)}") from error


def _said(error: OSError) -> str:
    return " ".join((error.strerror or str(error) or type(error).__name__).split())
