"""The run store: a folder of Parquet shards and one manifest a stage, each file whole or absent.

Layout of a run::

    recipe.yaml                  the resolved recipe
    problems/  planned/  ...     content-named Parquet shards, one record type a folder, readable by any Parquet reader
    traces/                      the trace store and its spool (`stillhouse.pipeline.trace_store`), unless they are elsewhere
    train/  student/  checkpoint/  folders of a stage; a model folder appears under its name when it is whole
    stages/<stage>.json          what a stage read, wrote and counted; written last, so that it stands for "done"

Every file is written beside its place, fsynced, renamed, and its folder fsynced: after kill -9 a file is either the whole
new one or not there. A reader takes the union of shards and drops repeated keys, first shard by name wins.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stillhouse.pipeline.errors import IntegrityError
from stillhouse.pipeline.records import Record, content_key, from_table, to_table

HASH_WHOLE_FILES_BELOW = 256 << 20


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one, the whole new one, or none; parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class StageManifest:
    """What one stage did: its fingerprint, its output files with their hashes, its counts and its seconds."""

    stage: str
    fingerprint: str
    outputs: dict[str, str] = field(default_factory=dict)
    """Path relative to the run → sha256."""
    counts: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class RunStore:
    """One run's folder.

    Args:
        root: the run's folder, made if it is not there. Workers on other nodes must see it under the same path.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root).absolute()
        self.root.mkdir(parents=True, exist_ok=True)

    def path(self, *parts: str) -> Path:
        return self.root.joinpath(*parts)

    def add_shard(self, folder: str, record_type: type[Record], records: Iterable[Record]) -> Path | None:
        """Commit records as one content-named Parquet shard; the same records give the same name. None for no records."""
        table = to_table(record_type, records)
        if table.num_rows == 0:
            return None
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        data = buffer.getvalue()
        path = self.path(folder, f"part-{hashlib.sha256(data).hexdigest()[:24]}.parquet")
        if not path.exists():
            write_atomic(path, data)
        return path

    def replace_shards(self, folder: str, record_type: type[Record], records: Iterable[Record]) -> list[Path]:
        """Make ``folder`` hold exactly these records: for derived tables, which a new fingerprint replaces.

        The new shard is committed before the old ones go. An empty table is written as such, so that readers find it.
        """
        rows = list(records)
        written = self.add_shard(folder, record_type, rows)
        if written is None:
            buffer = io.BytesIO()
            pq.write_table(to_table(record_type, rows), buffer)
            written = self.path(folder, "part-empty.parquet")
            write_atomic(written, buffer.getvalue())
        for path in self.shards(folder):
            if path != written:
                path.unlink()
        return [written]

    @contextmanager
    def replacing(self, folder: str, record_type: type[Record]) -> Iterator[Replacement]:
        """Make ``folder`` hold exactly what is added inside the block: for derived tables that may not fit into memory.

        The old shards go when the block has ended well; what one left that did not end goes with them.
        """
        written = Replacement(self, folder, record_type)
        yield written
        if not written.files:
            written.files += self.replace_shards(folder, record_type, [])
        for path in self.shards(folder):
            if path not in written.files:
                path.unlink()

    def shards(self, folder: str) -> list[Path]:
        """Committed shards of a folder, by name."""
        return sorted(self.path(folder).glob("part-*.parquet"))

    def read(self, folder: str, record_type: type[Record], *, key: str | None = None) -> list[Record]:
        """All records of a folder's shards; with ``key``, the first of each value of that attribute.

        Raises:
            IntegrityError: a shard cannot be read as Parquet of this record type.
        """
        records: list[Record] = []
        seen: set[Any] = set()
        for path in self.shards(folder):
            try:
                rows = from_table(record_type, pq.read_table(path))
            except (OSError, ValueError, KeyError) as error:
                raise IntegrityError(
                    f"{path} is not a readable shard ({error}); restore the file, or delete it and run the same command again: "
                    "what it held is made anew"
                ) from error
            if key is not None:
                rows = [row for row in rows if (value := getattr(row, key)) not in seen and not seen.add(value)]
            records += rows
        return records

    def write_json(self, path: str, value: Any) -> Path:
        target = self.path(path)
        write_atomic(target, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())
        return target

    def read_json(self, path: str) -> Any:
        return json.loads(self.path(path).read_text())

    def commit_stage(self, manifest: StageManifest) -> None:
        """Say that a stage is done. Called after its outputs are on disk."""
        self.write_json(f"stages/{manifest.stage}.json", asdict(manifest))

    def revoke_stage(self, stage: str) -> None:
        """Take back that a stage is done, before its outputs are written over."""
        path = self.path("stages", f"{stage}.json")
        if path.exists():
            path.unlink()
            fsync_folder(path.parent)

    def committed_stage(self, stage: str, fingerprint: str) -> StageManifest | None:
        """The stage's manifest if it was committed under this fingerprint and its outputs are still what it says.

        Raises:
            IntegrityError: an output was changed or removed since.
        """
        path = self.path("stages", f"{stage}.json")
        if not path.exists():
            return None
        manifest = StageManifest(**json.loads(path.read_text()))
        if manifest.fingerprint != fingerprint:
            return None
        for name, expected in manifest.outputs.items():
            file = self.path(name)
            found = output_hash(file) if file.exists() else "nothing"
            if found != expected:
                raise IntegrityError(
                    f"{file} is not what stage {stage!r} wrote (expected sha256 {expected[:12]}, found {found[:12]}); "
                    f"restore it, or delete {path} to run the stage again"
                )
        return manifest

    def outputs(self, paths: Iterable[Path]) -> dict[str, str]:
        """Hashes of files by their path relative to the run, for a stage's manifest."""
        return {str(path.relative_to(self.root)): output_hash(path) for path in paths}


class Replacement:
    """What `RunStore.replacing` collects: rows added in batches, each batch a shard."""

    def __init__(self, store: RunStore, folder: str, record_type: type[Any]):
        self._store, self._folder, self._record_type = store, folder, record_type
        self.files: list[Path] = []

    def add(self, records: Iterable[Any]) -> None:
        """Commit some rows; none is no shard."""
        written = self._store.add_shard(self._folder, self._record_type, records)
        if written is not None and written not in self.files:
            self.files.append(written)


def output_hash(path: Path) -> str:
    """sha256 of a file; of its size and ends where it is too large to read at every start."""
    size = path.stat().st_size
    if size < HASH_WHOLE_FILES_BELOW:
        return sha256_of(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(-(1 << 20), 2)
        digest.update(file.read(1 << 20))
    return digest.hexdigest()


def fingerprint(stage: str, code_version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Name a stage's work: hash of its part of the recipe, its inputs' fingerprints and its code version."""
    return content_key("stage", stage, code_version, dict(settings), dict(inputs))[:32]
