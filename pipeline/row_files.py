"""Rows of the files and data sets that a recipe names: problems, replayed traces and evaluation sets are read alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from stillhouse.pipeline.errors import RecipeError, first_line

ROW_FILES = (".jsonl", ".parquet")
LONGEST_WHOLE_NUMBER = 4_000
"""Digits up to which a whole number is read as one: Python refuses longer ones. They stay text."""

Row = dict[str, Any]


class NumberAsWritten(float):
    """A decimal number that prints as its file has it: a gold of 1.50 stays 1.50. As a value it is a float."""

    text: str

    def __new__(cls, text: str) -> NumberAsWritten:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


def rows_of_file(path: str, *, what: str, endings: Sequence[str] = ROW_FILES) -> Iterator[tuple[int, Row]]:
    """Read a file of rows, on any path that fsspec opens; nothing but the row at hand is kept in memory.

    Args:
        path: ends in ``.jsonl`` (an object a line, empty lines left out), ``.parquet``, or ``.json`` (one array of objects).
        what: what is read, for the messages: ``problems``.
        endings: the kinds of file that are taken.

    Returns:
        (number, row); the number is the line's in a ``.jsonl`` file, else the row's, from 1.

    Raises:
        RecipeError: no such file, another kind of file, or one that is not what its name says.
    """
    read = _reader(path, what, endings)
    with _opened(path, what) as file:
        yield from read(file, path)


def rows_of_dataset(
    name: str, *, what: str, subset: str | None, split: str, revision: str | None, streaming: bool = False
) -> Iterator[tuple[int, Row]]:
    """Read a data set of the hub, or a local folder that ``datasets`` understands.

    Args:
        streaming: leave nothing on disk.

    Raises:
        RecipeError: the data set cannot be loaded, or its stream breaks.
    """
    import datasets

    try:
        yield from enumerate(datasets.load_dataset(name, subset, split=split, revision=revision, streaming=streaming), 1)
    except Exception as error:  # load_dataset raises whatever its file systems, builders and hub client raise
        which = f"the data set {name!r} (subset {subset!r}, split {split!r}, revision {revision!r})"
        raise RecipeError(f"cannot read {what} from {which}: {type(error).__name__}: {first_line(error)[:300]}") from error


def count_rows(path: str, *, what: str, endings: Sequence[str] = ROW_FILES) -> int:
    """Number of rows of a file, as `rows_of_file` would read them; of Parquet from its footer, of JSON lines unparsed.

    Raises:
        RecipeError: as `rows_of_file`.
    """
    read = _reader(path, what, endings)
    with _opened(path, what) as file:
        if read is _parquet_rows:
            return _parquet(file, path).metadata.num_rows
        if read is _jsonl_rows:
            return sum(1 for line in file if line.strip())
        return sum(1 for _ in read(file, path))


@contextmanager
def _opened(path: str, what: str) -> Iterator[Any]:
    import fsspec

    try:
        opened = fsspec.open(path, "rb")
    except (ImportError, ValueError) as error:  # a protocol that needs a package, or that there is not
        raise RecipeError(f"cannot read {what} from {path}: {first_line(error)}") from error
    try:
        with opened as file:
            yield file
    except OSError as error:
        raise RecipeError(f"cannot read {what} from {path}: {first_line(error)}") from error


def _reader(path: str, what: str, endings: Sequence[str]) -> Callable[[Any, str], Iterator[tuple[int, Row]]]:
    ending = next((ending for ending in endings if path.endswith(ending)), None)
    if ending is None:
        raise RecipeError(f"{path}: expected {what} in a file that ends in {' or '.join(endings)}")
    return _READERS[ending]


def _jsonl_rows(file: Any, path: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            row = _json(line, f"{path}, line {number}")
            if not isinstance(row, dict):
                raise RecipeError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
            yield number, row


def _json_rows(file: Any, path: str) -> Iterator[tuple[int, Row]]:
    rows = _json(file.read(), path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecipeError(f"{path}: expected one JSON array of objects; a file with an object a line is named .jsonl")
    yield from enumerate(rows, 1)


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text, parse_float=NumberAsWritten, parse_int=_whole_number)
    except ValueError as error:  # also text that is not UTF-8
        raise RecipeError(f"{where}: not JSON ({error})") from error


def _whole_number(text: str) -> int | str:
    return int(text) if len(text) <= LONGEST_WHOLE_NUMBER else text


def _parquet_rows(file: Any, path: str) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa

    number = 0
    try:
        for batch in _parquet(file, path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pa.ArrowInvalid as error:
        raise RecipeError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


def _parquet(file: Any, path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise RecipeError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


_READERS = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".json": _json_rows}
