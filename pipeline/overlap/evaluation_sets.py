"""Read the prompts of an evaluation set, from a local file or by its name on the hub, to keep them out of training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stillhouse.pipeline.errors import RecipeError, first_line

PROMPT_FIELDS = ("prompt", "question", "problem", "Question", "Problem", "input", "query", "text")
"""Where a set's prompts are looked for when no field is named, in this order."""

_FILES = (".jsonl", ".parquet")


def evaluation_prompts(
    name: str, *, field: str | None = None, subset: str | None = None, split: str = "test", revision: str | None = None
) -> list[str]:
    """Read the prompts of one evaluation set.

    Args:
        name: a ``.jsonl`` or ``.parquet`` file, or a data set that ``datasets.load_dataset`` finds (``openai/gsm8k``).
        field: the column of the prompts; None takes the first of ``PROMPT_FIELDS`` that the first row has.
        subset, split, revision: of a data set; without meaning for a file.

    Returns:
        the prompts as they stand in the set, empty ones left out.

    Raises:
        RecipeError: the set cannot be read, has no row, has no such field, or a prompt is not text.
    """
    if name.endswith(_FILES):
        rows, where = _file_rows(Path(name)), name
    else:
        rows, where = _dataset_rows(name, subset, split, revision), f"evaluation set {name!r}"
    prompts = list(_prompts(rows, field, where))
    if not prompts:
        raise RecipeError(f"{where}: no prompts in it, so nothing to compare with")
    return prompts


def _prompts(rows: Iterable[Mapping[str, Any]], field: str | None, where: str) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        if field is None:
            field = next((name for name in PROMPT_FIELDS if name in row), None)
            if field is None:
                raise RecipeError(f"{where}: none of {', '.join(PROMPT_FIELDS)} among its fields {', '.join(row)}; set field")
        if field not in row:
            raise RecipeError(f"{where}, row {number}: field {field!r} is missing; the row has {', '.join(row) or 'nothing'}")
        prompt = row[field]
        if prompt is not None and not isinstance(prompt, str):
            raise RecipeError(f"{where}, row {number}: field {field!r} holds a {type(prompt).__name__}, not text")
        if prompt and prompt.strip():
            yield prompt


def _file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as parquet:
                for batch in parquet.iter_batches(batch_size=1_000):
                    yield from batch.to_pylist()
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_object(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise RecipeError(f"cannot read the evaluation set {path}: {first_line(error)}") from error


def _json_object(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise RecipeError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _dataset_rows(name: str, subset: str | None, split: str, revision: str | None) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # load_dataset raises whatever its file systems, builders and hub client raise
        what = f"{name!r} (subset {subset!r}, split {split!r})"
        raise RecipeError(
            f"cannot load the evaluation set {what}: {type(error).__name__}: {first_line(error)[:300]}"
        ) from error
