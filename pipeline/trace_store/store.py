"""The sealed traces: content-named Parquet files, and one small commit file a seal that is published last.

Layout, in a local folder or an object store::

    store.json                         what this folder is, and its schema version
    shards/part-<sha256[:24]>.parquet  traces, one row each
    calls/part-<sha256[:24]>.parquet   the ledger: one row a call that was paid for or failed
    commits/<seq>.json                 which files belong to the store; with the writer's name in it where the folder cannot
                                       refuse a second file of the same name

A reader takes the union of the commits in the order (seq, writer); of a key that occurs twice the first row counts. A file
that no commit lists does not exist: it is what a killed writer left behind (``checks.collect_garbage``).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.pipeline.errors import IntegrityError, RecipeError, StillhouseError, first_line
from stillhouse.pipeline.manifest import strict_json
from stillhouse.pipeline.records import Trace, arrow_schema, content_key, from_table
from stillhouse.pipeline.store import sha256_of
from stillhouse.pipeline.trace_store.folder import Folder, open_folder
from stillhouse.pipeline.trace_store.keys import KeySet, decode_keys, sort_keys
from stillhouse.pipeline.trace_store.totals import Totals

STORE_SCHEMA_VERSION = 2
MARKER = "store.json"
COMMIT_NAME = re.compile(r"commits/(\d{10})(?:-([0-9A-Za-z_]+))?\.json")
FileKind = Literal["shards", "calls"]
DEFAULTS = {field.name: field.default for field in fields(Trace) if field.default is not MISSING}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One committed Parquet file; ``name`` is relative to the store, with its sub-folder."""

    name: str
    sha256: str
    size_bytes: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit: which files a writer added, and what its calls came to until then.

    ``seal_id`` is whatever the writer gave, so that it knows its own commit again after a crash.
    """

    seq: int
    writer: str
    created: str
    shards: tuple[FileEntry, ...]
    calls: tuple[FileEntry, ...]
    totals: Totals
    seal_id: str = ""


class TraceStore:
    """The sealed traces in one folder.

    Args:
        root: a local folder or a URL such as ``s3://bucket/traces``. Nothing is written before the first shard or commit.

    Raises:
        RecipeError: the folder holds traces in the layout of version 1, or the store was written by a newer version.
    """

    def __init__(self, root: str | Path, *, migrating: bool = False):
        self.folder: Folder = open_folder(root)
        self._read_commits: dict[str, Commit] = {}
        self._repeats: tuple[tuple[FileEntry, ...], np.ndarray] | None = None
        if self.folder.is_local and not migrating and first_layout_shards(Path(self.folder.url)):
            raise RecipeError(
                f"{self.folder.url} holds traces in the first layout; `stillhouse traces migrate {self.folder.url}` brings "
                "them into this one, with the same keys"
            )
        self._marked = self._check_marker()

    @staticmethod
    def exists(root: str | Path) -> bool:
        """True where a store was begun in this folder."""
        return open_folder(root).exists(MARKER)

    @classmethod
    def existing(cls, root: str | Path) -> TraceStore:
        """The store in this folder, for those who only look.

        Raises:
            RecipeError: there is none.
        """
        store = cls(root)
        if not store._marked and not store.commit_names():
            raise RecipeError(f"there is no trace store in {store.folder.url}")
        return store

    def commits(self) -> list[Commit]:
        """All commits so far, ordered by (seq, writer).

        Raises:
            IntegrityError: a commit's file is not what its writer wrote.
        """
        names = self.commit_names()
        unread = [name for name in names if name not in self._read_commits]
        for name, data in zip(unread, self.folder.read_many(unread)):
            self._read_commits[name] = read_commit(data, f"{self.folder.url}/{name}")
        return sorted((self._read_commits[name] for name in names), key=lambda commit: (commit.seq, commit.writer))

    def commit_names(self) -> list[str]:
        """The commit files, unread."""
        return [name for name in self.folder.list("commits") if COMMIT_NAME.fullmatch(name)]

    def add_shard(self, local_path: Path, folder_name: FileKind, num_rows: int) -> FileEntry:
        """Bring a finished local Parquet file into the store under the name of its content; the local file stays.

        It belongs to the store only when a commit lists it. A file that is there already is written again, so that it is
        young: ``collect_garbage`` takes old files that no commit lists.
        """
        self._mark()
        digest = sha256_of(local_path)
        entry = FileEntry(f"{folder_name}/part-{digest[:24]}.parquet", digest, Path(local_path).stat().st_size, num_rows)
        self.folder.write_file(entry.name, Path(local_path))
        return entry

    def commit(
        self,
        *,
        writer: str,
        shards: Sequence[FileEntry],
        calls: Sequence[FileEntry],
        totals: Totals,
        seal_id: str = "",
    ) -> Commit:
        """Publish files as part of the store; when it returns, every reader sees them.

        Two writers may commit at once: where the folder can refuse a second create, one of them takes the next number; where
        it cannot, their names differ by the writer.

        Args:
            writer: letters, digits and underscores; no two processes at a time use the same.
            totals: the writer's cumulative counts up to and with this commit.
            seal_id: kept with the commit.

        Raises:
            IntegrityError: a listed file is not in the store with its size.
        """
        self._mark()
        for entry in (*shards, *calls):
            self._check_is_there(entry)
        seq = max((int(name.split("/")[1][:10]) for name in self.commit_names()), default=0) + 1
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        while True:
            commit = Commit(seq, writer, created, tuple(shards), tuple(calls), totals, seal_id)
            if self._publish(commit):
                return commit
            seq += 1

    def keys(self) -> KeySet:
        """The keys of all committed traces, in 16 bytes each."""
        return self._survey(self.files("shards"))[0]

    def batches(self, columns: Sequence[str] | None = None, *, batch_rows: int = 4096) -> Iterator[pa.RecordBatch]:
        """Committed traces as Arrow batches, every key once, in the order of the commits; memory stays bounded.

        Args:
            columns: of `stillhouse.pipeline.records.Trace`; all where None. A shard that an older version wrote lacks the
                columns that came later: their defaults are filled in.
        """
        return self._rows(list(columns if columns is not None else arrow_schema(Trace).names), batch_rows, None)

    def traces(self, wanted: Container[str] | None = None) -> Iterator[Trace]:
        """Committed traces as records, every key once; memory stays bounded.

        Args:
            wanted: keys to keep; all where None.
        """
        for batch in self._rows(arrow_schema(Trace).names, 1024, wanted):
            yield from from_table(Trace, pa.Table.from_batches([batch]))

    def calls(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The sealed ledger as Arrow batches, one row a call, in the order of the commits."""
        for entry in self.files("calls"):
            with self.parquet(entry) as parquet:
                yield from parquet.iter_batches(4096, columns=list(columns) if columns is not None else None)

    @property
    def num_rows(self) -> int:
        """Committed rows; a key that two writers both committed counts twice."""
        return sum(entry.num_rows for entry in self.files("shards"))

    def totals(self) -> Totals:
        """What all calls of all writers came to: the sum over writers of what each said last."""
        last = {commit.writer: commit.totals for commit in self.commits()}
        return sum(last.values(), Totals())

    def files(self, kind: FileKind) -> tuple[FileEntry, ...]:
        """Committed files of one kind in the order of the commits, none twice."""
        return tuple({entry.name: entry for commit in self.commits() for entry in getattr(commit, kind)}.values())

    @contextlib.contextmanager
    def parquet(self, entry: FileEntry) -> Iterator[pq.ParquetFile]:
        """Open a committed file.

        Raises:
            IntegrityError: it is missing, is no Parquet file, or has another number of rows than its commit says.
        """
        where = f"{self.folder.url}/{entry.name}"
        try:
            with self.folder.open(entry.name) as file, pq.ParquetFile(file, pre_buffer=not self.folder.is_local) as parquet:
                if parquet.metadata.num_rows != entry.num_rows:
                    raise IntegrityError(
                        f"{where} has {parquet.metadata.num_rows} rows and its commit says {entry.num_rows}; restore the file"
                    )
                yield parquet
        except StillhouseError:
            raise
        except FileNotFoundError as error:
            raise IntegrityError(f"{where} is committed and not there; restore the file") from error
        except (OSError, ValueError, pa.ArrowException) as error:
            raise IntegrityError(f"{where} cannot be read ({first_line(error)}); restore the file") from error

    def _rows(self, names: list[str], batch_rows: int, wanted: Container[str] | None) -> Iterator[pa.RecordBatch]:
        shards = self.files("shards")
        known = self._repeats  # another thread may put a newer one in its place
        repeats = known[1] if known is not None and known[0] == shards else self._survey(shards)[1]
        first_row = 0
        for entry in shards:
            with self.parquet(entry) as parquet:
                for group in range(parquet.num_row_groups):
                    num_rows = parquet.metadata.row_group(group).num_rows
                    keep = np.ones(num_rows, bool)
                    begin, end = np.searchsorted(repeats, [first_row, first_row + num_rows])
                    keep[repeats[begin:end] - first_row] = False
                    first_row += num_rows
                    if wanted is not None:
                        keys = parquet.read_row_group(group, columns=["key"]).column("key").to_pylist()
                        keep &= [key in wanted for key in keys]
                    if keep.any():
                        yield from _read(parquet, group, names, batch_rows, keep)

    def _survey(self, shards: tuple[FileEntry, ...]) -> tuple[KeySet, np.ndarray]:
        """Read the key column only: the set of keys, and the rows (counted through all shards) that repeat an earlier key."""
        num_rows = sum(entry.num_rows for entry in shards)
        high, low = np.empty(num_rows, np.uint64), np.empty(num_rows, np.uint64)
        row = 0
        for entry in shards:
            with self.parquet(entry) as parquet:
                for batch in parquet.iter_batches(1 << 16, columns=["key"]):
                    end = row + batch.num_rows
                    high[row:end], low[row:end] = decode_keys(batch.column(0))
                    row = end
        keys, repeats = sort_keys(high, low)
        self._repeats = (shards, repeats)
        return keys, repeats

    def _publish(self, commit: Commit) -> bool:
        if self.folder.exclusive:
            return self.folder.create(f"commits/{commit.seq:010d}.json", commit_bytes(commit))
        name = f"commits/{commit.seq:010d}-{commit.writer}.json"
        if self.folder.exists(name):
            return False
        self.folder.write(name, commit_bytes(commit))
        return True

    def _check_is_there(self, entry: FileEntry) -> None:
        try:
            if self.folder.size(entry.name) == entry.size_bytes:
                return
        except FileNotFoundError:
            pass
        raise IntegrityError(f"{self.folder.url}/{entry.name} is not there as it was written; nothing was committed")

    def _mark(self) -> None:
        if not self._marked:
            marker = {"schema_version": STORE_SCHEMA_VERSION, "kind": "stillhouse traces"}
            self.folder.write(MARKER, (json.dumps(marker) + "\n").encode())
            self._marked = True

    def _check_marker(self) -> bool:
        where = f"{self.folder.url}/{MARKER}"
        try:
            marker = strict_json(self.folder.read(MARKER))
            version, kind = marker["schema_version"], marker["kind"]
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{where} is not a trace store's marker ({first_line(error)}); restore the file") from error
        if kind != "stillhouse traces" or version != STORE_SCHEMA_VERSION:
            raise RecipeError(f"{where} says {kind!r}, schema version {version!r}; this version reads {STORE_SCHEMA_VERSION}")
        return True


def first_layout_shards(root: Path) -> list[Path]:
    """Shards that version 1 wrote into the folder itself, by name; empty where there is nothing to migrate."""
    return sorted(root.glob("part-*.parquet"))


def commit_bytes(commit: Commit) -> bytes:
    """A commit's file: JSON with its own hash in it, so that a changed one is told apart."""
    content = asdict(commit) | {"totals": commit.totals.to_json()}
    content = json.loads(json.dumps(content))
    return (json.dumps(content | {"own_sha256": content_key(content)}, indent=1) + "\n").encode()


def read_commit(data: bytes, where: str) -> Commit:
    """Read what `commit_bytes` wrote.

    Raises:
        IntegrityError: it was cut off or changed; the sentence names ``where``.
    """
    try:
        content: dict[str, Any] = strict_json(data)
        if content.pop("own_sha256") != content_key(content):
            raise ValueError("its own hash does not fit")
        files = {kind: tuple(FileEntry(**entry) for entry in content[kind]) for kind in ("shards", "calls")}
        return Commit(**(content | files | {"totals": Totals.from_json(content["totals"])}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{where} is not a commit as it was written ({first_line(error)}); restore the file") from error


def _read(parquet: pq.ParquetFile, group: int, names: list[str], batch_rows: int, keep: np.ndarray) -> Iterator[pa.RecordBatch]:
    """The kept rows of a row group; columns that its writer did not know yet hold their defaults."""
    schema = arrow_schema(Trace)
    present = [name for name in names if name in parquet.schema_arrow.names]
    row = 0
    for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=present or ["key"]):
        batch.validate(full=True)  # text that a bad disk changed need not be UTF-8 any more
        kept = keep[row : row + batch.num_rows]
        row += batch.num_rows
        if not kept.any():
            continue
        if not kept.all():
            batch = batch.filter(pa.array(kept))
        columns = [
            batch.column(name) if name in present else pa.repeat(DEFAULTS[name], batch.num_rows).cast(schema.field(name).type)
            for name in names
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=pa.schema([schema.field(name) for name in names], schema.metadata))
