"""Bring traces of the first layout into the trace store: the same folder, the same keys, nothing asked again.

The first layout had shards in the folder itself (``part-*.parquet``, no column that came later) and ``ledger/*.json``, one
file a batch that was handed to a teacher. Its ledger knew keys and no single calls: what becomes of it are the totals of a
writer named `WRITER`, and no rows under ``calls/``.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.pipeline.errors import IntegrityError, first_line
from stillhouse.pipeline.records import Trace, arrow_schema, from_table, to_table
from stillhouse.pipeline.store import fsync_folder
from stillhouse.pipeline.trace_store.folder import make_folder
from stillhouse.pipeline.trace_store.keys import KeySet
from stillhouse.pipeline.trace_store.store import FileEntry, TraceStore, first_layout_shards
from stillhouse.pipeline.trace_store.totals import Totals

WRITER = "first_layout"
SHARD_BYTES = 128 << 20
ROW_GROUP_BYTES = 8 << 20


def migrate(traces: Path) -> int:
    """Move a run's ``traces`` folder into the present layout. Safe to kill and to repeat: old files go after the commit.

    Returns:
        How many traces came over; 0 where nothing was left to do.

    Raises:
        IntegrityError: an old shard or ledger entry cannot be read; nothing was removed.
    """
    root = Path(traces)
    shards, ledger = first_layout_shards(root), sorted(root.glob("ledger/*.json"))
    if not shards and not ledger:
        return 0
    store = TraceStore(root, migrating=True)
    counts = _Counts()
    entries = list(_rewrite(shards, store, counts))
    if entries:
        num_assigned = sum(len(_ledger_keys(path)) for path in ledger)
        num_lost = max(0, num_assigned - counts.num_rows)
        before = next((commit.totals for commit in reversed(store.commits()) if commit.writer == WRITER), Totals())
        totals = before + Totals(
            num_calls=counts.num_rows + num_lost,
            num_answered=counts.num_rows,
            num_lost=num_lost,
            prompt_tokens=counts.prompt_tokens,
            completion_tokens=counts.completion_tokens,
            seconds=counts.seconds,
        )
        store.commit(writer=WRITER, shards=entries, calls=[], totals=totals)
    for path in (*shards, *ledger):
        path.unlink()
    if (root / "ledger").is_dir() and not any((root / "ledger").iterdir()):
        (root / "ledger").rmdir()
    fsync_folder(root)
    return counts.num_rows


class _Counts:
    """What the old shards held that the store did not have yet."""

    def __init__(self) -> None:
        self.num_rows = self.prompt_tokens = self.completion_tokens = 0
        self.seconds = 0.0

    def add(self, rows: list[Trace]) -> None:
        self.num_rows += len(rows)
        self.prompt_tokens += sum(row.num_prompt_tokens for row in rows)
        self.completion_tokens += sum(row.num_completion_tokens for row in rows)
        self.seconds += sum(row.seconds for row in rows)


def _rewrite(shards: list[Path], store: TraceStore, counts: _Counts) -> Iterator[FileEntry]:
    """The old rows that are not in the store, in shards of the present schema."""
    scratch = Path(store.folder.url, "shards", f".migrating-{secrets.token_hex(6)}.tmp")
    make_folder(scratch.parent)
    groups = _row_groups(shards, store.keys(), counts)
    group = next(groups, None)
    try:
        while group is not None:
            num_rows = 0
            with scratch.open("wb") as file, pq.ParquetWriter(file, arrow_schema(Trace), compression="zstd") as writer:
                while group is not None and file.tell() < SHARD_BYTES:
                    writer.write_table(group)
                    num_rows += group.num_rows
                    group = next(groups, None)
            yield store.add_shard(scratch, "shards", num_rows)
    finally:
        scratch.unlink(missing_ok=True)


def _row_groups(shards: list[Path], known: KeySet, counts: _Counts) -> Iterator[pa.Table]:
    tables: list[pa.Table] = []
    for path in shards:
        try:
            rows = [row for row in from_table(Trace, pq.ParquetFile(path).read()) if row.key not in known]
        except (OSError, ValueError) as error:
            raise IntegrityError(
                f"{path} is not a readable shard ({first_line(error)}); restore it, or delete it: what it held is asked again. "
                "Nothing was removed"
            ) from error
        counts.add(rows)
        tables.append(to_table(Trace, rows))
        if sum(table.nbytes for table in tables) >= ROW_GROUP_BYTES:
            yield pa.concat_tables(tables).combine_chunks()
            tables = []
    if sum(table.num_rows for table in tables):
        yield pa.concat_tables(tables).combine_chunks()


def _ledger_keys(path: Path) -> list[str]:
    try:
        return json.loads(path.read_text())["keys"]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} is not a ledger entry ({first_line(error)}); delete it. Nothing was removed") from error
