"""Look at a trace store's every byte and say in words what is wrong; remove what a killed writer left behind."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from stillhouse.pipeline.errors import IntegrityError
from stillhouse.pipeline.records import Trace, arrow_schema
from stillhouse.pipeline.trace_store.keys import decode_keys, sort_keys
from stillhouse.pipeline.trace_store.store import COMMIT_NAME, DEFAULTS, MARKER, Commit, FileEntry, TraceStore, read_commit

READ_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class StoreCheck:
    """What `verify_store` found: ``problems`` say what is wrong and what to do, ``notes`` what is worth knowing."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    num_commits: int
    num_shards: int
    num_traces: int
    """Different keys in sound shards."""
    num_calls: int
    """Rows of sound call files."""
    size_bytes: int
    """Bytes of committed files that are there."""

    @property
    def sound(self) -> bool:
        return not self.problems


def verify_store(root: str | Path) -> StoreCheck:
    """Hash every committed file again, read every key, and compare with the commits. Memory: 16 bytes a trace.

    Raises:
        RecipeError: there is no store in this folder, or it is in the first layout.
        StorageError: the disk or object store does not answer.
    """
    store = TraceStore.existing(root)
    problems: list[str] = []
    commits = sorted(_sound_commits(store, problems), key=lambda commit: (commit.seq, commit.writer))
    if not store.folder.exists(MARKER):
        problems.append(f"{store.folder.url}/store.json is missing; restore it, or let the next run write it again")
    if not problems:
        problems += _ledger_problems(store, commits)
    files = _files(commits)
    size_bytes = 0
    keys: list[tuple[np.ndarray, np.ndarray]] = []
    num_calls = 0
    for entry in files.values():
        found = list(_file_problems(store, entry))
        problems += found
        if found:
            continue
        size_bytes += entry.size_bytes
        try:
            if entry.name.startswith("shards/"):
                keys += _shard_keys(store, entry)
            else:
                with store.parquet(entry):
                    num_calls += entry.num_rows
        except IntegrityError as error:
            problems.append(str(error))
    unique, repeats = sort_keys(*(np.concatenate([part[half] for part in keys] or [np.empty(0, np.uint64)]) for half in (0, 1)))
    return StoreCheck(
        problems=tuple(problems),
        notes=tuple(_notes(store, files, len(repeats))),
        num_commits=len(commits),
        num_shards=sum(name.startswith("shards/") for name in files),
        num_traces=len(unique),
        num_calls=num_calls,
        size_bytes=size_bytes,
    )


def collect_garbage(root: str | Path, *, older_than_s: float = 3600.0, dry_run: bool = False) -> list[str]:
    """Remove files that no commit lists and that are older than ``older_than_s``: what killed writers left behind.

    A writer that is at work has files that it has not committed yet; they are young. The age is this machine's clock
    against the store's.

    Returns:
        The names of the removed files; with ``dry_run`` of those that would be.

    Raises:
        RecipeError: there is no store in this folder, or it is in the first layout.
        IntegrityError: a commit is missing or cannot be read, so nobody can tell which files it lists. Nothing was removed.
    """
    store = TraceStore.existing(root)
    oldest_kept = time.time() - older_than_s
    candidates = []
    for name in _unlisted(store, _files(store.commits())):
        try:
            if store.folder.modified(name) < oldest_kept:
                candidates.append(name)
        except FileNotFoundError:  # the writer finished with it
            continue
    commits = store.commits()  # again: what was committed meanwhile stays
    if gaps := _missing(commits):
        raise IntegrityError(f"{_gap_sentence(store, gaps)}. Nothing was removed")
    listed = _files(commits)
    removed = [name for name in candidates if name not in listed]
    for name in removed if not dry_run else ():
        store.folder.delete(name)
    return removed


def _sound_commits(store: TraceStore, problems: list[str]) -> list[Commit]:
    commits, broken = [], set()
    for name in store.commit_names():
        try:
            commits.append(read_commit(store.folder.read(name), f"{store.folder.url}/{name}"))
        except IntegrityError as error:
            problems.append(f"{error}: what only it lists is in no reader's view until then")
            broken.add(int(name.split("/")[1][:10]))
    if gaps := [seq for seq in _missing(commits) if seq not in broken]:
        problems.append(_gap_sentence(store, gaps))
    return commits


def _missing(commits: Iterable[Commit]) -> list[int]:
    numbers = {commit.seq for commit in commits}
    return sorted(set(range(1, max(numbers, default=0))) - numbers)


def _gap_sentence(store: TraceStore, gaps: list[int]) -> str:
    names = ", ".join(f"{seq:010d}" for seq in gaps[:5]) + (", …" if len(gaps) > 5 else "")
    return f"{store.folder.url}/commits lacks the commits {names}, which were written; restore their files"


def _files(commits: Iterable[Commit]) -> dict[str, FileEntry]:
    return {entry.name: entry for commit in commits for entry in (*commit.shards, *commit.calls)}


def _ledger_problems(store: TraceStore, commits: Iterable[Commit]) -> Iterator[str]:
    """A writer's totals count the rows of its call files, so a lost commit shows, too."""
    num_rows: dict[str, int] = {}
    num_calls: dict[str, int] = {}
    for commit in commits:
        num_rows[commit.writer] = num_rows.get(commit.writer, 0) + sum(entry.num_rows for entry in commit.calls)
        num_calls[commit.writer] = commit.totals.num_calls
    for writer, rows in num_rows.items():
        if rows and rows != num_calls[writer]:
            yield (
                f"{store.folder.url}: the call files of writer {writer} have {rows:,} rows and its totals count "
                f"{num_calls[writer]:,} calls; a commit of it is missing, restore the folder commits"
            )


def _file_problems(store: TraceStore, entry: FileEntry) -> Iterator[str]:
    where = f"{store.folder.url}/{entry.name}"
    try:
        size = store.folder.size(entry.name)
        if size != entry.size_bytes:
            yield f"{where} has {size:,} bytes and its commit says {entry.size_bytes:,}; restore the file"
            return
        digest = hashlib.sha256()
        with store.folder.open(entry.name) as file:
            while data := file.read(READ_BYTES):
                digest.update(data)
    except FileNotFoundError:
        yield f"{where} is committed and not there ({entry.num_rows:,} rows); restore the file"
        return
    if digest.hexdigest() != entry.sha256:
        yield f"{where} was changed: sha256 {digest.hexdigest()[:12]}, its commit says {entry.sha256[:12]}; restore the file"


def _shard_keys(store: TraceStore, entry: FileEntry) -> list[tuple[np.ndarray, np.ndarray]]:
    """The decoded keys of a shard that has the columns of a trace."""
    where = f"{store.folder.url}/{entry.name}"
    with store.parquet(entry) as parquet:
        found = parquet.schema_arrow
        for field in arrow_schema(Trace):
            if field.name not in found.names:
                if field.name not in DEFAULTS:
                    raise IntegrityError(f"{where} lacks the column {field.name!r} of a trace; restore the file")
            elif found.field(field.name).type != field.type:
                found_type: pa.DataType = found.field(field.name).type
                raise IntegrityError(f"{where} has {field.name!r} as {found_type}, expected {field.type}; restore the file")
        return [decode_keys(batch.column(0)) for batch in parquet.iter_batches(1 << 16, columns=["key"])]


def _unlisted(store: TraceStore, files: dict[str, FileEntry]) -> list[str]:
    """Files that belong to nobody: not committed, or half written (their names begin with a dot)."""
    folder = store.folder
    found = [name for name in (*folder.list("shards"), *folder.list("calls")) if name not in files]
    half_written = [name for name in (*folder.list(""), *folder.list("commits")) if name.split("/")[-1].startswith(".")]
    return sorted(found + half_written)


def _notes(store: TraceStore, files: dict[str, FileEntry], num_repeats: int) -> Iterator[str]:
    if num_repeats:
        yield f"{num_repeats:,} rows repeat a key of an earlier row; readers skip them"
    if unlisted := _unlisted(store, files):
        yield (
            f"{len(unlisted):,} files are in no commit, such as {unlisted[0]}: a writer is at work, or one was killed; "
            "`stillhouse traces gc` removes them when they are an hour old"
        )
    strangers = [name for name in store.folder.list("commits") if not COMMIT_NAME.fullmatch(name) and "/." not in name]
    if strangers:
        yield f"{strangers[0]} is not named like a commit and is ignored"
