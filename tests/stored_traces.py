"""Small trace stores for tests: traces with real keys, put into a store as a writer's seal puts them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from stillhouse.pipeline.records import Trace, content_key, to_table
from stillhouse.pipeline.trace_store.store import Commit, FileEntry, TraceStore
from stillhouse.pipeline.trace_store.totals import Totals


def some_trace(number: int, **changes: object) -> Trace:
    """Trace ``number``: always the same one."""
    trace = Trace(
        key=content_key("test trace", number),
        problem_id=content_key("test problem", number // 2)[:32],
        teacher="tiny",
        teacher_revision="r1",
        rendered_prompt=f"What is {number} + 1?",
        completion=f"<think>\n{number} + 1 is easy.\n</think>\n\n\\boxed{{{number + 1}}}",
        reasoning=f"{number} + 1 is easy.",
        answer_text=f"\\boxed{{{number + 1}}}",
        finish_reason="stop",
        num_prompt_tokens=7,
        num_completion_tokens=20,
        temperature=0.6,
        top_p=0.95,
        max_new_tokens=64,
        sample_index=number % 2,
        seed=2**63 - 1 - number,
        seconds=0.5,
        dollars=0.25,
    )
    return dataclasses.replace(trace, **changes)


def add_traces(store: TraceStore, traces: Sequence[Trace], scratch: Path, *, rows_a_group: int = 4) -> FileEntry:
    """Bring traces into a store as one shard that no commit lists yet."""
    path = scratch / f"{content_key([trace.key for trace in traces])[:12]}.parquet"
    pq.write_table(to_table(Trace, traces), path, compression="zstd", row_group_size=rows_a_group)
    return store.add_shard(path, "shards", len(traces))


def commit_traces(store: TraceStore, traces: Sequence[Trace], scratch: Path, *, writer: str = "w", calls: int = 0) -> Commit:
    """One commit of one shard; ``calls`` is what the writer's totals say."""
    entry = add_traces(store, traces, scratch)
    return store.commit(writer=writer, shards=[entry], calls=[], totals=Totals(num_calls=calls, num_answered=calls))
