"""What a trace store holds, counted without reading a text: traces, tokens, dollars, calls, and what is still in a spool."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from stillhouse.pipeline.trace_store.live import SpoolView, look_into_spool
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.pipeline.trace_store.totals import Totals

COLUMNS = ("teacher", "finish_reason", "num_prompt_tokens", "num_completion_tokens", "dollars")


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """A store in numbers; every key counts once."""

    url: str
    num_traces: int
    by_teacher: dict[str, int]
    by_finish_reason: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    dollars: float
    """Price of the traces that are here; ``calls`` has what else was spent."""
    calls: Totals
    num_commits: int
    num_writers: int
    num_shards: int
    size_bytes: int
    """Of committed files."""
    spool: SpoolView | None
    """What a writer in this folder holds that is not in the store yet; None where there is no spool."""


def summarize(root: str | Path) -> StoreSummary:
    """Count what a store holds.

    Raises:
        RecipeError: there is no store in this folder, or it is in the first layout.
        IntegrityError: a commit or a shard cannot be read.
    """
    store = TraceStore(root)
    spool = look_into_spool(Path(store.folder.url, "spool")) if store.folder.is_local else None
    if spool is None:  # a run that has sealed nothing yet has a spool only
        store = TraceStore.existing(root)
    teachers: Counter[str] = Counter()
    finish_reasons: Counter[str] = Counter()
    sums = {name: 0 for name in COLUMNS[2:]}
    for batch in store.batches(COLUMNS, batch_rows=1 << 16):
        for counts, name in ((teachers, "teacher"), (finish_reasons, "finish_reason")):
            counts.update(_counted(batch.column(name)))
        for name in sums:
            sums[name] += pc.sum(batch.column(name)).as_py() or 0
    shards = store.files("shards")
    return StoreSummary(
        url=store.folder.url,
        num_traces=teachers.total(),
        by_teacher=dict(teachers.most_common()),
        by_finish_reason=dict(finish_reasons.most_common()),
        prompt_tokens=sums["num_prompt_tokens"],
        completion_tokens=sums["num_completion_tokens"],
        dollars=sums["dollars"],
        calls=store.totals(),
        num_commits=len(store.commits()),
        num_writers=len({commit.writer for commit in store.commits()}),
        num_shards=len(shards),
        size_bytes=sum(entry.size_bytes for entry in (*shards, *store.files("calls"))),
        spool=spool,
    )


def _counted(column: pa.Array) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()}
