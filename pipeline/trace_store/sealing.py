"""From the spool into the store: settled calls become Parquet files, then one commit makes them part of the store.

Files and commit are the same however often a seal is tried: the set of rows is fixed before, rows are in the order of
their call ids, and files are named by content. A seal that was cut off is done again; one whose commit is there already
is recognised by its ``seal_id``.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.pipeline.errors import IntegrityError, SpoolError, StillhouseError
from stillhouse.pipeline.records import Trace, arrow_schema, to_table
from stillhouse.pipeline.trace_store.answers import Parse, priced, read_answer, read_beginning
from stillhouse.pipeline.trace_store.spool import PendingSeal, Spool
from stillhouse.pipeline.trace_store.store import Commit, FileEntry, TraceStore

ROW_GROUP_BYTES = 8 << 20
"""Of answers as they came: what a seal holds in memory at a time, several times over as Python and Arrow objects."""
SPAN_CALLS = 4096
CALL_SCHEMA = pa.schema(
    [
        ("call_id", pa.int64()),
        ("key", pa.string()),
        ("endpoint", pa.string()),
        ("state", pa.string()),
        ("status", pa.int32()),
        ("error", pa.string()),
        ("sent_at", pa.float64()),
        ("done_at", pa.float64()),
        ("reserved_prompt_tokens", pa.int64()),
        ("reserved_completion_tokens", pa.int64()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("dollars", pa.float64()),
        ("dollars_reserved", pa.float64()),
        ("raw", pa.binary()),
    ]
)
"""The ledger in the store. ``status`` is HTTP's, 200 for every whole answer, null where none came. Times are seconds since
1970. ``prompt_tokens`` is null where the usage is not known: then ``dollars_reserved`` counts, and ``dollars`` is at most an
estimate. ``raw`` is what came where no trace came of it."""
_REPEATING = ["problem_id", "teacher", "teacher_revision", "finish_reason", "sampling_extras", "served_model", "origin"]


@dataclass(frozen=True, slots=True)
class SpooledCall:
    """A call that has ended and is still in the spool."""

    call_id: int
    key: str
    endpoint: str
    state: str
    status: int | None
    error: str
    sent_at: float
    done_at: float
    reserved_prompt_tokens: int
    reserved_completion_tokens: int
    prompt_tokens: int | None
    completion_tokens: int | None
    dollars: float | None
    dollars_reserved: float
    request: bytes
    raw: bytes | None

    def trace(self, parse: Parse, *, writer: str) -> Trace | None:
        """Its trace; None where none came of it.

        Raises:
            IntegrityError: it was read when it came, and ``parse`` cannot read it now.
        """
        if self.state not in ("answered", "truncated"):
            return None
        raw = self.raw or b""
        try:
            if self.state == "answered":
                trace = read_answer(parse, self.key, self.request, raw)
            else:
                trace = read_beginning(parse, self.key, self.request, raw, writer=writer, call_id=self.call_id)
        except ValueError as error:
            raise IntegrityError(
                f"the answer of call {self.call_id} ({self.key[:16]}) could be read when it came and cannot be now: {error}. "
                "It is kept in the spool; go on with the version of Stillhouse that wrote it until the run ends."
            ) from error
        return priced(trace, self.dollars or 0.0)


class SpoolReader:
    """A read-only connection to a spool that another thread or process may be writing.

    A query answers in one row: sqlite3 lets go of the interpreter lock for every row, and each time a busy event loop may
    hold it for 5 ms before this thread gets it back (sealing beside 1,000 calls in flight took 1.4 times as long row by row).
    Numbers come as JSON, texts as one concatenated blob, cut by their lengths.
    """

    def __init__(self, path: Path):
        self._connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False, timeout=30.0
        )

    def keys(self) -> list[str]:
        """Keys of the answers that became traces."""
        query = "SELECT json_group_array(c.key) FROM outcomes o JOIN calls c USING (call_id) WHERE o.state = 'answered'"
        return json.loads(self._connection.execute(query).fetchone()[0])

    def calls(self, last_seq: int) -> Iterator[list[SpooledCall]]:
        """Calls whose outcome has a number up to ``last_seq``, by call id, in lists of about ROW_GROUP_BYTES of answers.

        Every list is a read of its own, so that the spool's log can be emptied meanwhile.
        """
        query = """
            SELECT json_group_array(json_array(
                    call_id, c.key, c.endpoint, o.state, o.status, o.error, c.sent_at, o.done_at, c.reserved_prompt_tokens,
                    c.reserved_completion_tokens, o.prompt_tokens, o.completion_tokens, o.dollars, c.dollars_reserved,
                    length(c.request), length(a.raw))),
                CAST(group_concat(CAST(c.request AS TEXT), '') AS BLOB), CAST(group_concat(CAST(a.raw AS TEXT), '') AS BLOB)
            FROM outcomes o JOIN calls c USING (call_id) LEFT JOIN answers a USING (call_id)
            WHERE call_id BETWEEN ? AND ? AND o.seq <= ?"""
        for first, last in self._spans(last_seq):
            numbers, requests, raws = self._connection.execute(query, (first, last, last_seq)).fetchone()
            calls, request_at, raw_at = [], 0, 0
            for *columns, request_bytes, raw_bytes in json.loads(numbers):
                request = requests[request_at : request_at + request_bytes]
                raw = None if raw_bytes is None else raws[raw_at : raw_at + raw_bytes]
                request_at, raw_at = request_at + request_bytes, raw_at + (raw_bytes or 0)
                calls.append(SpooledCall(*columns, request, raw))
            yield sorted(calls, key=lambda call: call.call_id)

    def _spans(self, last_seq: int) -> Iterator[tuple[int, int]]:
        """First and last call id of each list."""
        query = """
            SELECT json_group_array(json_array(call_id, num_bytes)) FROM (
                SELECT call_id, coalesce(length(a.raw), 0) AS num_bytes FROM outcomes o LEFT JOIN answers a USING (call_id)
                WHERE call_id > ? AND o.seq <= ? ORDER BY call_id LIMIT ?)"""
        before, first, size = 0, 0, 0
        while sizes := sorted(json.loads(self._connection.execute(query, (before, last_seq, SPAN_CALLS)).fetchone()[0])):
            for call_id, num_bytes in sizes:
                first = first or call_id
                size += num_bytes
                if size >= ROW_GROUP_BYTES:
                    yield first, call_id
                    first, size = 0, 0
            before = sizes[-1][0]
            if first:
                yield first, before
                first, size = 0, 0

    def close(self) -> None:
        self._connection.close()


class _Parts:
    """Writes tables into Parquet files of a bounded size and brings each finished one into the store."""

    def __init__(self, store: TraceStore, kind: str, schema: pa.Schema, scratch: Path, *, part_bytes: int):
        self._store, self._kind, self._schema, self._path = store, kind, schema, scratch / f"{kind}.parquet"
        self._part_bytes = part_bytes
        self._file: pq.ParquetWriter | None = None
        self._num_rows = self._num_bytes = 0
        self.entries: list[FileEntry] = []

    def write(self, table: pa.Table, num_bytes: int) -> None:
        if not len(table):
            return
        if self._file is None:
            names = [name for name in _REPEATING if name in self._schema.names] or ["endpoint", "state"]
            self._file = pq.ParquetWriter(self._path, self._schema, compression="zstd", use_dictionary=names)
        self._file.write_table(table, row_group_size=len(table))
        self._num_rows += len(table)
        self._num_bytes += num_bytes
        if self._num_bytes >= self._part_bytes:
            self.finish()

    def finish(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        self.entries.append(self._store.add_shard(self._path, self._kind, self._num_rows))
        self._path.unlink()
        self._num_rows = self._num_bytes = 0


def seal_id(seal: PendingSeal, writer: str) -> str:
    """What a seal's commit is known by; a writer never uses a ``last_seq`` twice."""
    return f"{writer}-{seal.last_seq}"


def find_commit(store: TraceStore, seal: PendingSeal, writer: str) -> Commit | None:
    """The commit of a seal, where it was published."""
    wanted = (writer, seal_id(seal, writer))
    return next((commit for commit in store.commits() if (commit.writer, commit.seal_id) == wanted), None)


def drop_if_committed(store: TraceStore, spool: Spool) -> None:
    """Delete the rows of a seal that was published before its process died."""
    seal = spool.pending_seal()
    if seal is not None and find_commit(store, seal, spool.writer) is not None:
        while spool.drop_sealed(seal.last_seq):
            pass


def publish(
    store: TraceStore, seal: PendingSeal, *, spool: Path, writer: str, parse: Parse, scratch: Path, shard_bytes: int
) -> Commit:
    """Write the rows of a seal into the store and commit them; the rows stay in the spool.

    Args:
        spool: the spool's file.
        scratch: a local folder for files that are being built.
        shard_bytes: a shard is closed when it holds this many bytes of answers as they came.

    Raises:
        StillhouseError: the store cannot be written, an answer cannot be read any more, or the disk is full.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    shards = _Parts(store, "shards", arrow_schema(Trace), scratch, part_bytes=shard_bytes)
    calls = _Parts(store, "calls", CALL_SCHEMA, scratch, part_bytes=shard_bytes)
    reader = SpoolReader(spool)
    try:
        for rows in reader.calls(seal.last_seq):
            traces = [row.trace(parse, writer=writer) for row in rows]
            num_bytes = sum(len(row.raw or b"") for row in rows)
            shards.write(to_table(Trace, [trace for trace in traces if trace is not None]), num_bytes)
            calls.write(_call_table(rows, traces), 256 * len(rows))
        shards.finish()
        calls.finish()
    except StillhouseError:
        raise
    except (sqlite3.Error, OSError) as error:
        raise SpoolError(f"the spool {spool} could not be sealed: {error}. Its answers stay in it.") from error
    finally:
        reader.close()
    return store.commit(
        writer=writer, shards=shards.entries, calls=calls.entries, totals=seal.totals, seal_id=seal_id(seal, writer)
    )


def _call_table(rows: Sequence[SpooledCall], traces: Sequence[Trace | None]) -> pa.Table:
    columns: list[list[Any]] = [[getattr(row, name) for row in rows] for name in CALL_SCHEMA.names[:-1]]
    columns.append([row.raw if trace is None else None for row, trace in zip(rows, traces)])
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, CALL_SCHEMA)], schema=CALL_SCHEMA)
