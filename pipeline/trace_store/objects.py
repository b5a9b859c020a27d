"""A folder in an object store, through fsspec: a PUT is whole or absent, and on S3 the server can refuse a second one."""

from __future__ import annotations

import contextlib
import errno
import io
import secrets
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.trace_store.folder import StorageError, in_words

CONDITIONAL_SCHEMES = {"s3"}
"""Where the package passes an exclusive create on to the server (``If-None-Match: *``) and does not just look first."""
LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "adlfs", "azure"}
"""Whose exceptions are about the store or the network and are no OSError."""


class ObjectFolder:
    """A prefix in a bucket. Use `stillhouse.pipeline.trace_store.folder.open_folder`.

    Args:
        scheme: fsspec's name of the store, such as ``s3``.
        url: the whole URL without a slash at its end.
        install: the command that brings the scheme's package.
    """

    is_local = False

    def __init__(self, scheme: str, url: str, *, install: str):
        import fsspec

        self.url = url
        self._scheme = scheme
        try:
            # No listing is remembered: another writer's commit has to be seen. No instance is shared: the environment counts.
            self._files = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            raise RecipeError(f"{scheme}:// needs a package that is not installed: {install}") from error
        self._root = self._files._strip_protocol(url)

    @cached_property
    def exclusive(self) -> bool:
        if self._scheme not in CONDITIONAL_SCHEMES:
            return False
        name = f"commits/.probe-{secrets.token_hex(8)}"
        try:
            return self.create(name, b"first") and not self.create(name, b"second")
        except StorageError as error:
            if getattr(error.__cause__, "errno", None) != errno.ENOSYS:
                raise
            return False  # some S3-compatible servers answer 501 to the condition
        finally:
            self.delete(name)

    def write(self, name: str, data: bytes) -> None:
        with self._words(name, "written"):
            self._files.pipe_file(self._path(name), data)

    def write_file(self, name: str, local_path: Path) -> None:
        with self._words(name, "written"):
            self._files.put_file(str(local_path), self._path(name))

    def create(self, name: str, data: bytes) -> bool:
        for _ in range(10):
            with self._words(name, "written"):
                try:
                    self._files.pipe_file(self._path(name), data, mode="create")
                    return True
                except FileExistsError:
                    return self.read(name) == data
                except OSError as error:
                    if "ConditionalRequestConflict" not in repr(error.__cause__):
                        raise
            time.sleep(0.1)  # S3 answers 409 while another writer's request for the same name is under way
        return False

    def read(self, name: str) -> bytes:
        with self._words(name, "read"):
            return self._files.cat_file(self._path(name))

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        if not names:
            return []
        with self._words(names[0], "read"):
            contents = self._files.cat([self._path(name) for name in names], on_error="raise")
        return [contents[self._path(name)] for name in names]

    def open(self, name: str) -> BinaryIO:
        with self._words(name, "read"):
            # Parquet readers ask for the ranges that they need: reading ahead would fetch columns that nobody wants.
            file = self._files.open(self._path(name), "rb", cache_type="none")
        return io.BufferedReader(_InWords(file, f"{self.url}/{name} cannot be read"), 1 << 16)

    def size(self, name: str) -> int:
        return self._info(name)["size"]

    def modified(self, name: str) -> float:
        with self._words(name, "looked up"):
            return self._files.modified(self._path(name)).timestamp()

    def exists(self, name: str) -> bool:
        # Not fsspec's own exists(): for some stores it says "no" where the answer is "cannot tell".
        try:
            self._info(name)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str) -> list[str]:
        folder = self._path(prefix.strip("/")).rstrip("/")
        with self._words(prefix, "listed"):
            found = self._files.find(folder)
        names = (path.removeprefix(self._root).lstrip("/") for path in map(self._files._strip_protocol, found))
        return sorted(name for name in names if name.rpartition("/")[0] == prefix.strip("/"))

    def delete(self, name: str) -> None:
        with self._words(name, "removed"), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def _info(self, name: str) -> dict[str, Any]:
        with self._words(name, "looked up"):
            return self._files.info(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _words(self, name: str, doing: str) -> contextlib.AbstractContextManager[None]:
        return _in_words(f"{self.url}/{name} cannot be {doing}")


class _InWords(io.RawIOBase):
    """A remote file whose failed reads come in words. Closing it closes the remote one."""

    def __init__(self, file: Any, failed: str):
        self._file = file
        self._failed = failed

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        with _in_words(self._failed):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def _in_words(failed: str) -> Iterator[None]:
    try:
        with in_words(failed):
            yield
    except Exception as error:
        if type(error.__cause__).__name__ == "NoSuchBucket":
            raise StorageError(f"{failed}: there is no such bucket; make it, or correct the URL") from error
        if type(error).__module__.partition(".")[0] not in LIBRARIES:
            raise
        what = " ".join(str(error).split()) or type(error).__name__
        raise StorageError(f"{failed}: {what}; check the address, the keys in the environment and the network") from error
