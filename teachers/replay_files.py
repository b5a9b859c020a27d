"""Reading the files and data sets that traces are replayed from: an iterator of plain rows, whatever the storage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from stillhouse.pipeline.errors import RecipeError


def rows_of_file(path: str) -> Iterator[dict[str, Any]]:
    """Rows of a ``.jsonl``, ``.json`` (one array) or ``.parquet`` file, on any path that fsspec opens.

    Decimal numbers in JSON become text as they are written, so that a gold of ``1.50`` stays ``1.50``.

    Raises:
        RecipeError: no such file, another file type, or a line that is not a JSON object.
    """
    import fsspec

    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    reader = next((reader for suffix, reader in readers.items() if path.endswith(suffix)), None)
    if reader is None:
        raise RecipeError(f"{path}: traces are replayed from {', '.join(readers)} files")
    try:
        with fsspec.open(path, "rb") as file:
            yield from reader(file, path)
    except (OSError, ImportError) as error:
        raise RecipeError(f"cannot read traces from {path}: {error}") from error


def rows_of_dataset(name: str, *, subset: str | None, split: str, revision: str | None) -> Iterator[dict[str, Any]]:
    """Rows of a data set on the hub, or of a local folder that ``datasets`` understands, streamed: nothing is kept on disk.

    Raises:
        RecipeError: the data set cannot be loaded, or its stream breaks.
    """
    import datasets

    try:
        yield from datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
    except Exception as error:  # load_dataset raises whatever its file systems, builders and hub client raise
        first_line = str(error).partition("\n")[0][:300]
        what = f"the data set {name!r} (subset {subset!r}, split {split!r}, revision {revision!r})"
        raise RecipeError(f"cannot read traces from {what}: {type(error).__name__}: {first_line}") from error


def _jsonl_rows(file: Any, path: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield _json_object(line, f"{path}, line {number}")


def _json_object(text: bytes, where: str) -> dict[str, Any]:
    value = _json(text, where)
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text, parse_float=str)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{where}: not JSON ({error})") from error


def _json_rows(file: Any, path: str) -> Iterator[dict[str, Any]]:
    rows = _json(file.read(), path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecipeError(f"{path}: expected one JSON array of objects; a file with an object a line is named .jsonl")
    yield from rows


def _parquet_rows(file: Any, path: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise RecipeError(f"{path}: not a readable Parquet file ({error})") from error
