"""Read the prompts of an evaluation set, from a local file or by its name on the hub, to keep them out of training."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.row_files import ROW_FILES, rows_of_dataset, rows_of_file

PROMPT_FIELDS = ("prompt", "question", "problem", "Question", "Problem", "input", "query", "text", "content")
"""Where a set's prompts are looked for when no field is named, in this order."""
CONTEXT_FIELDS = ("passage", "context", "body", "Body")
"""What such a prompt asks about, where the set has it in a field of its own: "How many apples are left?" is no item alone."""


def evaluation_prompts(
    name: str,
    *,
    field: str | Sequence[str] | None = None,
    subset: str | None = None,
    split: str = "test",
    revision: str | None = None,
) -> list[str]:
    """Read the prompts of one evaluation set.

    Args:
        name: a ``.jsonl`` or ``.parquet`` file, or a data set that ``datasets.load_dataset`` finds (``openai/gsm8k``).
        field: the column of the prompts, or several (a question and its choices, a list) that are joined by line breaks; None
            takes the first of ``PROMPT_FIELDS`` that the first row has, after those of ``CONTEXT_FIELDS``.
        subset, split, revision: of a data set; without meaning for a file.

    Returns:
        the prompts as they stand in the set, empty ones left out.

    Raises:
        RecipeError: the set cannot be read, has no row, has no such field, or a prompt is not text.
    """
    what = "the evaluation set"
    if name.endswith(ROW_FILES):
        rows, where = rows_of_file(name, what=what), name
    else:
        rows = rows_of_dataset(name, what=what, subset=subset, split=split, revision=revision)
        where = f"evaluation set {name!r}"
    prompts = list(_prompts(rows, field, where))
    if not prompts:
        raise RecipeError(f"{where}: no prompts in it, so nothing to compare with")
    return prompts


def _prompts(rows: Iterable[tuple[int, Mapping[str, Any]]], field: str | Sequence[str] | None, where: str) -> Iterator[str]:
    fields = [field] if isinstance(field, str) else list(field or ())
    for number, row in rows:
        if not fields:
            fields = [name for name in PROMPT_FIELDS if name in row][:1]
            if fields:
                fields = [*(name for name in CONTEXT_FIELDS if name in row), *fields]
            else:
                raise RecipeError(f"{where}: none of {', '.join(PROMPT_FIELDS)} among its fields {', '.join(row)}; set field")
        prompt = "\n".join(text for name in fields for text in _texts(row, name, f"{where}, row {number}"))
        if prompt.strip():
            yield prompt


def _texts(row: Mapping[str, Any], field: str, where: str) -> list[str]:
    """A column's text, the messages of a chat, or a question's choices, each behind its letter as a prompt has them."""
    if field not in row:
        raise RecipeError(f"{where}: field {field!r} is missing; the row has {', '.join(row) or 'nothing'}")
    value = row[field]
    if isinstance(value, Mapping):  # {"A": …, "B": …}, or {"text": […], "label": […]}
        value = value.get("text", list(value.values()))
    listed = value if isinstance(value, list | tuple) else [] if value is None else [value]
    chat = all(isinstance(part, Mapping) for part in listed)
    parts = [part.get("content") for part in listed if part.get("role") != "system"] if chat else listed
    for part in parts:
        if not isinstance(part, str) and not (isinstance(part, int | float) and isinstance(value, list | tuple)):
            raise RecipeError(f"{where}: field {field!r} holds a {type(part).__name__}, not text")
    if chat or not isinstance(value, list | tuple | Mapping) or len(parts) > len(string.ascii_uppercase):
        return list(map(str, parts))
    lettered = list(zip(string.ascii_uppercase, map(str, parts)))
    if all(re.match(rf"\(?{letter}[).:]", choice) for letter, choice in lettered):
        return [choice for _, choice in lettered]
    return [f"{letter}. {choice}" for letter, choice in lettered]
