"""Traces of the first layout come into the store whole, under the keys they were paid for, at any number of attempts."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from stillhouse.pipeline.errors import IntegrityError, RecipeError
from stillhouse.pipeline.records import Trace, content_key, to_table
from stillhouse.pipeline.trace_store.checks import collect_garbage, verify_store
from stillhouse.pipeline.trace_store.migration import migrate
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.pipeline.trace_store.totals import Totals
from tests.stored_traces import some_trace

FIRST_COLUMNS = [field.name for field in dataclasses.fields(Trace) if field.default is dataclasses.MISSING]


def old_trace(number: int) -> Trace:
    """As the first version wrote it: no dollars."""
    return some_trace(number, dollars=0.0)


def write_first_layout(traces, *, batches: int = 5, lost: int = 3) -> None:
    """What the first version left after ``batches`` committed batches of four and one of ``lost`` rows that a kill cut off."""
    (traces / "ledger").mkdir(parents=True)
    groups = [[old_trace(4 * batch + row) for row in range(4)] for batch in range(batches)]
    for number, rows in enumerate([*groups, [old_trace(1000 + row) for row in range(lost)]], 1):
        keys = [row.key for row in rows]
        (traces / f"ledger/{number:08d}-{content_key(keys)[:16]}.json").write_text(json.dumps({"keys": keys}, indent=2))
        if number <= batches:
            table = to_table(Trace, rows).select(FIRST_COLUMNS)
            pq.write_table(table, traces / f"part-{content_key('shard', keys)[:24]}.parquet", compression="zstd")


def by_key(traces) -> dict[str, Trace]:
    return {trace.key: trace for trace in traces}


def test_every_trace_comes_over_with_its_key(tmp_path):
    """A key that changed, or a trace left behind, is paid for again."""
    write_first_layout(tmp_path)
    assert migrate(tmp_path) == 20
    store = TraceStore(tmp_path)
    assert by_key(store.traces()) == by_key(old_trace(number) for number in range(20))
    assert store.totals() == Totals(
        num_calls=23, num_answered=20, num_lost=3, prompt_tokens=140, completion_tokens=400, seconds=10.0
    )
    assert verify_store(tmp_path).problems == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["commits", "shards", "store.json"]
    assert migrate(tmp_path) == 0


def test_shards_of_old_and_new_traces_load_together(tmp_path):
    """datasets refuses files whose columns differ, so the old ones get the present columns."""
    write_first_layout(tmp_path)
    migrate(tmp_path)
    [shard] = (tmp_path / "shards").iterdir()
    assert pq.read_schema(shard).equals(to_table(Trace, [some_trace(0)]).schema)


def test_an_old_folder_is_not_read_as_an_empty_store(tmp_path):
    """A run that took its paid traces for missing would ask for all of them again."""
    write_first_layout(tmp_path)
    with pytest.raises(RecipeError, match=f"`stillhouse traces migrate {tmp_path}`"):
        TraceStore(tmp_path)


KILLED_AT_EVERY_STEP = """
import os, sys
from pathlib import Path
import pyarrow
from stillhouse.pipeline.trace_store.migration import migrate

pyarrow.array(["text"])  # the first one imports pandas: once here, not in every child

def count_down(name, left):
    real = getattr(os, name)
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os._exit(9)
        return real(*args, **kwargs)
    setattr(os, name, call)

for step, folder in enumerate(sorted(Path(sys.argv[1]).iterdir()), 1):
    child = os.fork()
    if child == 0:
        left = [step]
        for name in ("replace", "link", "fsync", "unlink"):
            count_down(name, left)
        migrate(folder)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_kill_at_any_write_loses_nothing(tmp_path):
    """Moving to a new version must not be the moment at which a month of traces is lost."""
    folders = [tmp_path / "runs" / f"{step:02}" for step in range(1, 31)]
    for folder in folders:
        write_first_layout(folder, batches=2)
    done = subprocess.run([sys.executable, "-c", KILLED_AT_EVERY_STEP, tmp_path / "runs"], stdout=subprocess.PIPE, check=True)
    codes = [int(line) for line in done.stdout.split()]
    num_steps = codes.index(0)
    assert num_steps > 20  # the steps before the commit, and every removal after it
    assert codes == [9] * num_steps + [0] * (len(folders) - num_steps)
    for folder in folders[: num_steps + 1]:
        migrate(folder)
        store = TraceStore(folder)
        assert by_key(store.traces()) == by_key(old_trace(number) for number in range(8))
        assert (store.num_rows, store.totals().num_calls, store.totals().num_lost) == (8, 11, 3)
        collect_garbage(folder, older_than_s=-1)
        found = verify_store(folder)
        assert (found.problems, found.notes) == ((), ())
        assert not list(folder.glob("part-*"))
        assert not (folder / "ledger").exists()


def test_rows_that_an_old_version_adds_later_come_over_too(tmp_path):
    """Someone runs the old version once more after the migration; its traces are paid for as well."""
    write_first_layout(tmp_path, batches=2, lost=0)
    assert migrate(tmp_path) == 8
    write_first_layout(tmp_path, batches=3, lost=0)
    assert migrate(tmp_path) == 4
    assert by_key(TraceStore(tmp_path).traces()) == by_key(old_trace(number) for number in range(12))
    assert TraceStore(tmp_path).num_rows == 12


def test_a_damaged_old_shard_stops_the_move(tmp_path):
    """Its rows would be gone for good when the old files are removed."""
    write_first_layout(tmp_path)
    path = sorted(tmp_path.glob("part-*.parquet"))[2]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(IntegrityError, match=r"not a readable shard .*Nothing was removed"):
        migrate(tmp_path)
    assert len(list(tmp_path.glob("part-*.parquet"))) == 5
    assert len(list((tmp_path / "ledger").iterdir())) == 6
