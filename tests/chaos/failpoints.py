"""Watches every durable operation of this process from outside of the code that does it: fsync, rename, create, commit, PUT.

The product knows nothing of it: the standard library's functions (and s3fs's one door to the server) are wrapped in the
process that is to die. ``observe`` is called before and after each operation with the name of the place in the code.
"""

from __future__ import annotations

import functools
import os
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

When = Literal["before", "after"]
Observe = Callable[[str, When], None]

_WATCHED_CODE = f"{os.sep}trace_store{os.sep}"
_READING = ("SELECT", "PRAGMA", "BEGIN", "EXPLAIN")
_OBJECT_WRITES = ("put_object", "delete_object", "delete_objects", "upload_part", "complete_multipart_upload", "copy_object")


def watch(observe: Observe, *, object_store: bool = False) -> None:
    """Wrap the durable operations of this process; there is no way back."""
    for name in ("fsync", "fdatasync", "replace", "rename", "link", "unlink"):
        setattr(os, name, _watched(getattr(os, name), name, observe))
    os.mkdir = _watched(os.mkdir, "mkdir", observe, applies=lambda path, *_, **__: not os.path.exists(path))
    os.open = _watched(os.open, "create", observe, applies=_creates)
    sqlite3.connect = _watched_connect(sqlite3.connect, observe)
    if object_store:
        _watch_s3(observe)


def _place(operation: str) -> str:
    """Who in the trace store asks for the running operation: ``sealing.seal > store.commit > folder.create > fsync``.

    "" where nobody in the trace store does.
    """
    callers = []
    frame = sys._getframe(1)
    while frame is not None:
        if _WATCHED_CODE in frame.f_code.co_filename:
            caller = f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
            callers += [caller] if caller not in callers else []
        frame = frame.f_back
    return " > ".join([*reversed(callers[:3]), operation]) if callers else ""


def _watched(function: Any, operation: str, observe: Observe, applies: Callable[..., bool] = lambda *_, **__: True) -> Any:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        place = _place(operation) if applies(*arguments, **named) else ""
        if not place:
            return function(*arguments, **named)
        observe(place, "before")
        result = function(*arguments, **named)
        observe(place, "after")
        return result

    return call


def _creates(path: Any, flags: int = 0, *_: Any, **__: Any) -> bool:
    return bool(flags & os.O_EXCL)


def _watched_connect(connect: Any, observe: Observe) -> Any:
    class WatchedConnection(sqlite3.Connection):
        """Reports what ends a transaction: COMMIT in any of its forms, and a write outside of one."""

        def _report(self, work: Callable[[], Any], statement: str) -> Any:
            words = statement.split(None, 1)
            operation = words[0].upper() if words else ""
            if operation in _READING or (self.in_transaction and operation not in ("COMMIT", "END")):
                return work()
            place = _place(f"sqlite {operation.lower()}")
            observe(place, "before")
            result = work()
            observe(place, "after")
            return result

        def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
            return self._report(lambda: sqlite3.Connection.execute(self, statement, *arguments), statement)

        def executemany(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
            return self._report(lambda: sqlite3.Connection.executemany(self, statement, *arguments), statement)

        def executescript(self, script: str) -> sqlite3.Cursor:
            return self._report(lambda: sqlite3.Connection.executescript(self, script), script)

        def commit(self) -> None:
            self._report(lambda: sqlite3.Connection.commit(self), "COMMIT" if self.in_transaction else "SELECT")

        def __exit__(self, *error: Any) -> Any:
            return self._report(
                lambda: sqlite3.Connection.__exit__(self, *error), "COMMIT" if self.in_transaction else "SELECT"
            )

    @functools.wraps(connect)
    def call(*arguments: Any, **named: Any) -> sqlite3.Connection:
        return connect(*arguments, **{"factory": WatchedConnection} | named)

    return call


def _watch_s3(observe: Observe) -> None:
    import s3fs
    from fsspec.asyn import sync_wrapper

    ask = s3fs.S3FileSystem._call_s3

    async def call(self: Any, method: str, *arguments: Any, **named: Any) -> Any:
        if method not in _OBJECT_WRITES:
            return await ask(self, method, *arguments, **named)
        # The request runs in fsspec's own thread: the object's folder tells which of the store's writes it is.
        key = str(named.get("Key", ""))
        place = f"s3:{method}:{next((part for part in ('shards', 'calls', 'commits') if f'/{part}/' in f'/{key}'), 'root')}"
        observe(place, "before")
        result = await ask(self, method, *arguments, **named)
        observe(place, "after")
        return result

    s3fs.S3FileSystem._call_s3 = call
    s3fs.S3FileSystem.call_s3 = sync_wrapper(call)
