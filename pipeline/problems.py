"""Where problems come from: a reasoning-gym task, a JSONL or Parquet file, a ``datasets`` name; and keeping splits apart."""

from __future__ import annotations

import contextlib
import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stillhouse.pipeline.dedup import normalized_text
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.judge_worker import encode_entry
from stillhouse.pipeline.records import Problem, Split
from stillhouse.pipeline.verification import ENTRY_FIELDS, NO_GOLD_NEEDED, require_known_kind


def reasoning_gym_problems(task: str, *, split: Split, size: int, seed: int, options: Mapping[str, Any]) -> list[Problem]:
    """Generate problems of one reasoning-gym task; its own scorer judges them later.

    Args:
        task: a reasoning-gym data set name, for example ``chain_sum``.
        size: how many problems; a given (task, seed, options) always gives the same ones.
        options: the task's own settings, for example ``{"max_terms": 4}``.

    Raises:
        RecipeError: no such task, an option it does not take, or a task whose problems have no single gold answer.
    """
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.4)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise RecipeError(f"reasoning-gym has no task {task!r}{hint}")
    if size < 1:
        raise RecipeError(f"reasoning-gym task {task!r}: size must be at least 1, got {size}")
    options = dict(options)
    known = sorted(set(getattr(DATASETS[task][1], "__dataclass_fields__", {})) - {"seed", "size"})
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=2, cutoff=0.4)
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            raise RecipeError(f"reasoning-gym task {task!r} has no option {name!r}{hint}; it takes {', '.join(known)}")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some generators print
            entries = list(create_dataset(task, seed=seed, size=size, **options))
    except (AssertionError, TypeError, ValueError) as error:
        raise RecipeError(f"reasoning-gym task {task!r} refuses the options {options}: {error}") from error
    problems = []
    for index, entry in enumerate(entries):
        if not isinstance(entry["answer"], str) or not entry["answer"].strip():
            raise RecipeError(f"reasoning-gym task {task!r}, item {index}: no gold answer in text; use a task that has one")
        try:
            stored = {"task": task, "options": encode_entry(options), "entry": encode_entry(entry)}
        except TypeError as error:
            raise RecipeError(f"reasoning-gym task {task!r}, item {index}: the entry cannot be stored: {error}") from error
        text = json.dumps(stored, sort_keys=True, ensure_ascii=False)
        problems.append(Problem(entry["question"], entry["answer"], "reasoning_gym", f"reasoning_gym/{task}", split, text))
    return problems


def local_problems(
    path: str,
    *,
    split: Split,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    answer_after: str | None = None,
    kind: str = "math",
    limit: int | None = None,
) -> list[Problem]:
    """Read problems from a ``.jsonl`` or ``.parquet`` file, on any path that fsspec opens.

    Numbers become text as they are written (``1.50`` stays ``1.50``). ``limit`` reads the first rows only. With
    ``answer_after``, the answer is what follows its last occurrence in the field (``"#### "`` for GSM8K).

    Raises:
        RecipeError: no such file, another file type, a line that is not a JSON object, or a row without a prompt or an
            answer; the message names the file, the row (from 1) and the field.
    """
    import fsspec

    path = str(path)
    require_known_kind(kind, where=path)
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    suffix = next((s for s in readers if path.endswith(s)), None)
    if suffix is None:
        raise RecipeError(f"{path}: problems are read from .jsonl and .parquet files")
    try:
        opened = fsspec.open(path, "rb")
    except (ImportError, ValueError) as error:  # a protocol that needs a package, or that there is not
        raise RecipeError(f"cannot read problems from {path}: {error}") from error
    try:
        with opened as file:
            rows = readers[suffix](file, path, ENTRY_FIELDS.get(kind, ()))
            return _problems_of_rows(
                rows,
                path,
                split,
                prompt_field,
                answer_field,
                kind,
                limit,
                source=path.rsplit("/", 1)[-1],
                answer_after=answer_after,
            )
    except OSError as error:
        raise RecipeError(f"cannot read problems from {path}: {error}") from error


def dataset_problems(
    name: str,
    *,
    subset: str | None,
    dataset_split: str,
    split: Split,
    prompt_field: str,
    answer_field: str,
    answer_after: str | None = None,
    kind: str,
    limit: int | None,
    revision: str | None = None,
) -> list[Problem]:
    """Read problems from a Hugging Face data set, or from a local folder that ``datasets.load_dataset`` understands.

    Raises:
        RecipeError: the data set cannot be loaded, or a row has no prompt or no answer.
    """
    require_known_kind(kind, where=name)
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split=dataset_split, revision=revision)
    except Exception as error:  # load_dataset raises whatever its file systems, builders and hub client raise
        first_line = str(error).partition("\n")[0][:300]
        what = f"the data set {name!r} (subset {subset!r}, split {dataset_split!r})"
        raise RecipeError(f"cannot load {what}: {type(error).__name__}: {first_line}") from error
    numbered = enumerate(iter(rows), 1)
    return _problems_of_rows(
        numbered,
        f"data set {name!r}",
        split,
        prompt_field,
        answer_field,
        kind,
        limit,
        source=name,
        answer_after=answer_after,
    )


def _jsonl_rows(file: Any, path: str, entry_fields: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_float=str, parse_int=str)
            if isinstance(row, dict) and (named := [name for name in entry_fields if name in row]):
                plain = json.loads(line)  # what a verifier reads keeps its types
                row |= {name: plain[name] for name in named}
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise RecipeError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        yield number, row


def _parquet_rows(file: Any, path: str, entry_fields: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
        number = 0
        for batch in parquet.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pa.ArrowInvalid as error:
        raise RecipeError(f"{path}: not a readable Parquet file ({error})") from error


def _problems_of_rows(
    rows: Iterator[tuple[int, Mapping[str, Any]]],
    where: str,
    split: Split,
    prompt_field: str,
    answer_field: str,
    kind: str,
    limit: int | None,
    *,
    source: str,
    answer_after: str | None,
) -> list[Problem]:
    problems = []
    for number, row in rows:
        if limit is not None and len(problems) >= limit:
            break
        texts = []
        for field in (prompt_field, answer_field):
            value = row.get(field)
            if isinstance(value, (dict, list, bool)):
                raise RecipeError(f"{where}, row {number}: field {field!r} holds a {type(value).__name__}, not text")
            if field == answer_field and field not in row and kind in NO_GOLD_NEEDED:
                value = ""
            elif value is None or not str(value).strip():
                has = "is empty" if field in row else f"is missing; the row has {', '.join(map(str, row)) or 'nothing'}"
                raise RecipeError(f"{where}, row {number}: field {field!r} {has}")
            texts.append(str(value).strip())
        if answer_after is not None:
            _, marker, gold = texts[1].rpartition(answer_after)
            if not marker or not gold.strip():
                raise RecipeError(f"{where}, row {number}: field {answer_field!r} has nothing behind {answer_after!r}")
            texts[1] = gold.strip()
        entry = {name: row[name] for name in ENTRY_FIELDS.get(kind, ()) if row.get(name) is not None}
        text = json.dumps(entry, sort_keys=True, ensure_ascii=False) if entry else ""
        problems.append(Problem(texts[0], texts[1], kind, source, split, text))
    if not problems:
        raise RecipeError(f"{where}: no rows, so no problems")
    return problems


def disjoint(problems: list[Problem], against: list[Problem]) -> tuple[list[Problem], list[Problem]]:
    """Keep the problems whose text is not in ``against`` and not earlier in ``problems`` itself.

    Texts are compared normalized (NFKC, letter case, whitespace).

    Returns:
        (kept, removed), each in the order given.
    """
    seen = {normalized_text(problem.prompt) for problem in against}
    kept, removed = [], []
    for problem in problems:
        text = normalized_text(problem.prompt)
        (removed if text in seen else kept).append(problem)
        seen.add(text)
    return kept, removed
