"""Hand a store's traces on as one file: JSON lines, Parquet, or chat messages that trainers read."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.extraction import THINK_OPEN
from stillhouse.pipeline.prompts import opens_think_block
from stillhouse.pipeline.records import Trace, arrow_schema
from stillhouse.pipeline.trace_store.folder import in_words
from stillhouse.pipeline.trace_store.store import TraceStore

ExportFormat = Literal["jsonl", "parquet", "chat"]


def export(
    root: str | Path,
    target: Path,
    *,
    format: ExportFormat,
    only_finished: bool = False,
    prompts: Mapping[str, str] | None = None,
) -> int:
    """Write every trace once into a local file, which appears when it is whole. Memory stays bounded.

    Args:
        format: ``jsonl`` (one object a trace, all fields), ``parquet`` (the same columns), or ``chat`` (one object a trace:
            ``messages`` as trl and axolotl read them, the reasoning inside ``<think>`` tags, with ``key`` and
            ``problem_id``).
        only_finished: leave out what did not end by itself (finish_reason other than ``stop``).
        prompts: the problems' texts by id, for ``chat``: a prompt that a chat template has rendered cannot be taken apart.

    Returns:
        How many traces were written.

    Raises:
        RecipeError: there is no store in this folder; or ``chat``, and a prompt is neither in ``prompts`` nor kept as messages.
    """
    batches = _batches(TraceStore.existing(root), only_finished)
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    with in_words(f"{target} cannot be written"), contextlib.ExitStack() as on_exit:
        target.parent.mkdir(parents=True, exist_ok=True)
        on_exit.callback(temporary.unlink, missing_ok=True)
        if format == "parquet":
            num_rows = _write_parquet(batches, temporary)
        else:
            rows = (row for batch in batches for row in batch.to_pylist())
            num_rows = _write_lines((_chat(row, prompts or {}) for row in rows) if format == "chat" else rows, temporary)
        temporary.replace(target)
    return num_rows


def _batches(store: TraceStore, only_finished: bool) -> Iterator[pa.RecordBatch]:
    for batch in store.batches(batch_rows=1024):
        yield batch.filter(pc.equal(batch.column("finish_reason"), "stop")) if only_finished else batch


def _write_parquet(batches: Iterator[pa.RecordBatch], path: Path) -> int:
    num_rows = 0
    with pq.ParquetWriter(path, arrow_schema(Trace), compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)
            num_rows += batch.num_rows
    return num_rows


def _write_lines(rows: Iterator[dict[str, Any]], path: Path) -> int:
    num_rows = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num_rows += 1
    return num_rows


def _chat(row: dict[str, Any], prompts: Mapping[str, str]) -> dict[str, Any]:
    completion = row["completion"]
    if opens_think_block(row["rendered_prompt"]) and not completion.lstrip().startswith(THINK_OPEN):
        completion = f"{THINK_OPEN}\n{completion}"
    messages = [*_asked(row, prompts), {"role": "assistant", "content": completion}]
    return {"messages": messages, "key": row["key"], "problem_id": row["problem_id"]}


def _asked(row: dict[str, Any], prompts: Mapping[str, str]) -> list[dict[str, str]]:
    if row["problem_id"] in prompts:
        return [{"role": "user", "content": prompts[row["problem_id"]]}]
    if row["rendered_prompt"].startswith('[{"role":') or row["rendered_prompt"].startswith('[{"content":'):
        return json.loads(row["rendered_prompt"])
    raise RecipeError(
        f"the prompt of trace {row['key'][:12]} was rendered by a chat template and its problem is not at hand; export the "
        "run's folder, which holds the problems, or choose the format jsonl"
    )
