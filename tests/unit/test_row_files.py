"""Rows of files and data sets: every source of a recipe reads them alike, and says where one is broken."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.row_files import count_rows, rows_of_dataset, rows_of_file

ALL_FILES = (".jsonl", ".json", ".parquet")
ROWS = [{"a": f"row {i}"} for i in range(5)]


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("\n\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("ending", ALL_FILES)
def test_rows_are_read_and_counted_alike(tmp_path, ending):
    """A plan would be about another number of problems than the run reads."""
    path = write(tmp_path / f"a{ending}", ROWS)
    numbers, rows = zip(*rows_of_file(path, what="rows", endings=ALL_FILES))
    assert list(rows) == ROWS
    assert count_rows(path, what="rows", endings=ALL_FILES) == len(ROWS)
    assert numbers == ((1, 3, 5, 7, 9) if ending == ".jsonl" else (1, 2, 3, 4, 5))  # the editor's line, or the row


def test_numbers_print_as_written_and_stay_numbers(tmp_path):
    """A gold of 1.50 would become 1.5, or a verifier's tolerance of 0.01 a text."""
    path = tmp_path / "a.jsonl"
    digits = "7" * 5_000
    path.write_text(f'{{"gold": 1.50, "long": {digits}, "many": 12345678901234567890, "tests": {{"rel_tol": 1e-2}}}}')
    ((_, row),) = rows_of_file(str(path), what="rows")
    assert [str(row[name]) for name in ("gold", "long", "many")] == ["1.50", digits, "12345678901234567890"]
    assert row["gold"] * 2 == 3
    assert json.dumps(row["tests"]) == '{"rel_tol": 0.01}'


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"x", "a.csv: expected traces in a file that ends in .jsonl or .json or .parquet"),
        ("a.jsonl", b'{"prompt": "?"}\n\n{"prompt": ', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"prompt": "\xff"}', "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b"[1]", "a.jsonl, line 1: expected a JSON object, got list"),
        ("a.json", b'{"prompt": "?"}', "a.json: expected one JSON array of objects"),
        ("a.parquet", b"PAR1 or not", "a.parquet: not a readable Parquet file"),
        ("missing.jsonl", None, "cannot read traces from"),
    ],
)
def test_a_broken_file_says_where(tmp_path, name, data, message):
    """A torn download would end in a traceback of a library."""
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(RecipeError) as caught:
        list(rows_of_file(str(path), what="traces", endings=ALL_FILES))
    assert message in str(caught.value)


def test_a_data_set_that_cannot_be_loaded_says_which(tmp_path):
    """A misspelt split would end in a traceback of a library."""
    write(tmp_path / "train.parquet", ROWS)
    with pytest.raises(RecipeError, match=r"cannot read traces from the data set .*split 'test'") as caught:
        list(rows_of_dataset(str(tmp_path), what="traces", subset=None, split="test", revision=None, streaming=True))
    assert caught.value.__cause__ is not None
