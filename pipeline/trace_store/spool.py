"""The spool: one SQLite file on the driver's disk in which every call is durable before it goes out and after it is answered.

Rows are only ever added, until a seal has carried them into the store and deletes them. ``calls`` gets a row before a
request goes out, ``answers`` the raw answer before anything parses it, ``outcomes`` how the call ended, in the order of
``seq``. Write-ahead logging with ``synchronous=FULL``: what was committed survives kill -9 and a power cut.

One process writes (`SpoolLock`); any number read (`SpoolReader`). A `Spool` belongs to one thread at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from stillhouse.pipeline.errors import IntegrityError, SpoolError
from stillhouse.pipeline.store import fsync_folder
from stillhouse.pipeline.trace_store.spool_lock import SpoolLock
from stillhouse.pipeline.trace_store.totals import Totals

SPOOL_VERSION = 1
FILE_NAME = "spool.sqlite"
PAGE_BYTES = 8 << 10  # two or three answers of 2–3 kB a page: 1.7 times the rows a second of 4 KiB; a lone call writes 60 kB
CHECKPOINT_BYTES = 32 << 20
ROWS_A_STATEMENT = 128
DROP_ROWS = 4096

SCHEMA = """
CREATE TABLE calls (
    call_id INTEGER PRIMARY KEY, key TEXT NOT NULL, problem_id TEXT NOT NULL, endpoint TEXT NOT NULL,
    reserved_prompt_tokens INTEGER NOT NULL, reserved_completion_tokens INTEGER NOT NULL, dollars_reserved REAL NOT NULL,
    sent_at REAL NOT NULL, request BLOB NOT NULL);
CREATE TABLE answers (call_id INTEGER PRIMARY KEY, raw BLOB NOT NULL);
CREATE TABLE outcomes (
    call_id INTEGER PRIMARY KEY, seq INTEGER NOT NULL, state TEXT NOT NULL, status INTEGER, error TEXT NOT NULL,
    done_at REAL NOT NULL, prompt_tokens INTEGER, completion_tokens INTEGER, dollars REAL);
CREATE TABLE seals (last_seq INTEGER PRIMARY KEY, totals TEXT NOT NULL);
CREATE TABLE writer (id TEXT NOT NULL, next_call_id INTEGER NOT NULL, last_seq INTEGER NOT NULL, totals TEXT NOT NULL);
"""
_WIDTHS = {"calls": 9, "answers": 2, "outcomes": 9}


@dataclass(frozen=True, slots=True)
class PendingSeal:
    """Outcomes up to ``last_seq`` are on their way into the store, in one commit that will say ``totals``."""

    last_seq: int
    totals: Totals


@dataclass(frozen=True, slots=True)
class OpenCall:
    """A call that has no outcome yet; ``raw`` where its answer is here."""

    call_id: int
    key: str
    reserved_prompt_tokens: int
    reserved_completion_tokens: int
    dollars_reserved: float
    request: bytes
    raw: bytes | None


class Spool:
    """The one writing connection to a spool, made with its folder where it is not there.

    Raises:
        SpoolError: another process has it open, the folder is on a network file system, the file cannot be opened,
            or it was written by another version.
        IntegrityError: the file is no sound SQLite database.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpoolError(f"the spool's folder {folder} cannot be made: {error}") from error
        self._lock = SpoolLock(folder)
        try:
            with self._errors_in_words("opened"):
                self._connection = _connect(self.path)
                self._prepare()
                row = self._connection.execute("SELECT id, next_call_id, last_seq, totals FROM writer").fetchone()
        except BaseException:
            self._lock.release()
            raise
        self.writer: str = row[0]
        self.next_call_id: int = row[1]
        self.last_seq: int = row[2]
        self.totals = Totals.from_json(json.loads(row[3]))

    def _prepare(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (num_tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version == 0 and num_tables == 0:
            with self.transaction():
                for statement in SCHEMA.split(";")[:-1]:
                    self._connection.execute(statement)
                row = (secrets.token_hex(8), 1, 0, json.dumps(Totals().to_json()))
                self._connection.execute("INSERT INTO writer VALUES (?, ?, ?, ?)", row)
                self._connection.execute(f"PRAGMA user_version = {SPOOL_VERSION}")
            fsync_folder(self.path.parent)
        elif version != SPOOL_VERSION:
            age = "a newer" if version > SPOOL_VERSION else "an older"
            raise SpoolError(
                f"the spool {self.path} has layout {version} and this Stillhouse reads and writes layout {SPOOL_VERSION}: "
                f"it is of {age} version. Answers in it may not be in the store yet: go on with the version that wrote it "
                "until the run ends (closing seals everything), or take another folder for the spool."
            )

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is durable together when this ends, or nothing is.

        Raises:
            SpoolError: it could not be written, for example because the disk is full.
        """
        with self._errors_in_words("written"):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _errors_in_words(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise SpoolError(
                f"the spool {self.path} could not be {what}: {error} (free on its disk: {_free_mib(self.path.parent)} MiB). "
                "Nothing that was acknowledged is lost; make room and start the same run again."
            ) from error
        except sqlite3.DatabaseError as error:
            raise IntegrityError(
                f"the spool {self.path} is not a sound SQLite file: {error}. Keep the folder for rescue (sqlite3 {FILE_NAME} "
                '".recover") and take another one for the spool; what was sealed is in the store.'
            ) from error

    def add(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Insert rows, in their column order, inside a transaction.

        Many rows a statement: sqlite3 lets go of the interpreter lock for every step, and each time a busy thread may hold
        it for milliseconds before we get it back.
        """
        start, size = 0, ROWS_A_STATEMENT
        while start < len(rows):
            while size > len(rows) - start:
                size //= 2
            self._connection.execute(_insert_statement(table, size), list(chain.from_iterable(rows[start : start + size])))
            start += size

    def set_progress(self, totals: Totals) -> None:
        """Keep the counters, inside a transaction."""
        self._connection.execute(
            "UPDATE writer SET next_call_id = ?, last_seq = ?, totals = ?",
            (self.next_call_id, self.last_seq, json.dumps(totals.to_json())),
        )

    def open_calls(self) -> Iterator[OpenCall]:
        """Calls without an outcome: what a dead process had under way, or had not parsed."""
        rows = self._connection.execute(
            "SELECT c.call_id, c.key, c.reserved_prompt_tokens, c.reserved_completion_tokens, c.dollars_reserved, "
            "c.request, a.raw FROM calls c LEFT JOIN answers a USING (call_id) LEFT JOIN outcomes o USING (call_id) "
            "WHERE o.call_id IS NULL ORDER BY c.call_id"
        )
        for row in rows:
            yield OpenCall(*row)

    def unsealed_bytes(self) -> int:
        """Bytes of the answers that are here."""
        (size,) = self._connection.execute("SELECT coalesce(sum(length(raw)), 0) FROM answers").fetchone()
        return size

    def pending_seal(self) -> PendingSeal | None:
        """The seal that was begun and whose rows are still here."""
        row = self._connection.execute("SELECT last_seq, totals FROM seals").fetchone()
        return row and PendingSeal(row[0], Totals.from_json(json.loads(row[1])))

    def begin_seal(self, totals: Totals) -> PendingSeal | None:
        """Mark every outcome that is here for one seal; None where there is none."""
        (num_outcomes,) = self._connection.execute("SELECT count(*) FROM (SELECT 1 FROM outcomes LIMIT 1)").fetchone()
        if not num_outcomes:
            return None
        with self.transaction():
            row = (self.last_seq, json.dumps(totals.to_json()))
            self._connection.execute("INSERT INTO seals VALUES (?, ?)", row)
        return PendingSeal(self.last_seq, totals)

    def drop_sealed(self, last_seq: int) -> bool:
        """Delete some of the rows of a seal that is committed; True while there are more. The last call ends the seal."""
        some = "SELECT call_id FROM outcomes WHERE seq <= ? ORDER BY call_id LIMIT ?"
        with self.transaction():
            row = self._connection.execute(f"SELECT min(call_id), max(call_id) FROM ({some})", (last_seq, DROP_ROWS)).fetchone()
            if row[0] is None:
                self._connection.execute("DELETE FROM seals WHERE last_seq = ?", (last_seq,))
                return False
            sealed = "SELECT call_id FROM outcomes WHERE call_id BETWEEN ? AND ? AND seq <= ?"
            for table in ("answers", "calls", "outcomes"):
                self._connection.execute(
                    f"DELETE FROM {table} WHERE call_id BETWEEN ? AND ? AND call_id IN ({sealed})", (*row, *row, last_seq)
                )
        return True

    def close(self) -> None:
        """Close the file; where nothing is left in it, give its space back."""
        try:
            with self._errors_in_words("closed"):
                (num_calls,) = self._connection.execute("SELECT count(*) FROM (SELECT 1 FROM calls LIMIT 1)").fetchone()
                if not num_calls:
                    self._connection.execute("VACUUM")
        finally:
            self._connection.close()
            self._lock.release()


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30.0)
    connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_BYTES // PAGE_BYTES}")
    connection.execute(f"PRAGMA journal_size_limit = {2 * CHECKPOINT_BYTES}")
    return connection


def _insert_statement(table: str, num_rows: int) -> str:
    row = f"({', '.join('?' * _WIDTHS[table])})"
    return f"INSERT INTO {table} VALUES {', '.join([row] * num_rows)}"


def _free_mib(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize >> 20
