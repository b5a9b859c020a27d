"""verify says what is wrong with a store, gc removes what belongs to nobody, and neither ever harms what is committed."""

from __future__ import annotations

import json
import os
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.pipeline.errors import IntegrityError, RecipeError
from stillhouse.pipeline.records import Trace, to_table
from stillhouse.pipeline.trace_store.checks import collect_garbage, verify_store
from stillhouse.pipeline.trace_store.store import Commit, TraceStore, commit_bytes
from stillhouse.pipeline.trace_store.totals import Totals
from tests.stored_traces import add_traces, commit_traces, some_trace


@pytest.fixture
def root(tmp_path):
    """A sound store of three commits, ten traces each."""
    store = TraceStore(tmp_path / "s")
    for first in (0, 10, 20):
        commit_traces(store, [some_trace(number) for number in range(first, first + 10)], tmp_path)
    return tmp_path / "s"


def shard_of(root, number: int):
    return root / TraceStore(root).commits()[number].shards[0].name


def test_a_sound_store_is_found_sound(root):
    """A check that cries wolf is switched off."""
    found = verify_store(root)
    assert (found.problems, found.notes) == ((), ())
    assert (found.num_commits, found.num_shards, found.num_traces, found.num_calls) == (3, 3, 30, 0)
    assert found.size_bytes == sum(path.stat().st_size for path in (root / "shards").iterdir())


def test_one_flipped_bit_is_found_wherever_it_is(root):
    """A disk that rots changes single bits; in a text column no reader notices."""
    path = shard_of(root, 1)
    data = path.read_bytes()
    for at in (0, len(data) // 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        [problem] = verify_store(root).problems
        assert problem.startswith(f"{path} was changed: sha256 ")
    path.write_bytes(data)
    assert verify_store(root).sound


def test_a_missing_and_a_cut_shard_are_both_named(root):
    """The sentence has to lead to the file that has to be restored."""
    gone, cut = shard_of(root, 0), shard_of(root, 2)
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    first, second = verify_store(root).problems
    assert first == f"{gone} is committed and not there (10 rows); restore the file"
    assert second.startswith(f"{cut} has ")
    assert verify_store(root).num_traces == 10


def test_a_broken_and_a_missing_commit_are_both_named(root):
    """A lost commit makes its traces invisible, and every other file looks well."""
    (root / "commits/0000000001.json").unlink()
    (root / "commits/0000000003.json").write_text("{")
    broken, gap = verify_store(root).problems
    assert "commits/0000000003.json is not a commit as it was written" in broken
    assert gap == f"{root}/commits lacks the commits 0000000001, which were written; restore their files"


def test_a_lost_last_commit_shows_in_its_writers_totals(root, tmp_path):
    """Without a number after it no gap shows that a commit is gone; the writer's own count of its calls does."""
    store = TraceStore(root)
    pq.write_table(pa.table({"key": [some_trace(1).key]}), tmp_path / "calls.parquet")
    calls = store.add_shard(tmp_path / "calls.parquet", "calls", 1)
    store.commit(writer="a", shards=[], calls=[calls], totals=Totals(num_calls=1, num_answered=1))
    assert verify_store(root).sound
    store.commit(writer="a", shards=[], calls=[], totals=Totals(num_calls=3, num_answered=3))
    [problem] = verify_store(root).problems
    assert "the call files of writer a have 1 rows and its totals count 3 calls" in problem


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.drop_columns(["completion"]), "lacks the column 'completion' of a trace"),
        (lambda table: table.set_column(0, "key", pa.array(["k1", "k2"])), "64 hexadecimal digits; got 'k1'"),
        (lambda table: table.set_column(15, "seed", pa.array(["1", "2"])), "has 'seed' as string, expected int64"),
    ],
)
def test_a_shard_that_holds_no_traces_is_found(tmp_path, change, said):
    """A foreign Parquet file under a right hash would fail in the middle of a training run."""
    store = TraceStore(tmp_path / "s")
    pq.write_table(change(to_table(Trace, [some_trace(0), some_trace(1)])), tmp_path / "odd.parquet")
    entry = store.add_shard(tmp_path / "odd.parquet", "shards", 2)
    store.commit(writer="w", shards=[entry], calls=[], totals=Totals())
    [problem] = verify_store(tmp_path / "s").problems
    assert said in problem


def test_repeated_keys_and_leftovers_are_notes(root, tmp_path):
    """A second driver's paid copy and a killed writer's file harm no reader: they are said and are no failure."""
    store = TraceStore(root)
    commit_traces(store, [some_trace(number, completion="again") for number in range(3)], tmp_path, writer="b")
    left = add_traces(store, [some_trace(77)], tmp_path)
    (root / "commits/notes.txt").write_text("mine")
    found = verify_store(root)
    assert found.sound
    assert found.num_traces == 30
    repeats, unlisted, stranger = found.notes
    assert repeats.startswith("3 rows repeat a key")
    assert unlisted.startswith(f"1 files are in no commit, such as {left.name}")
    assert stranger == "commits/notes.txt is not named like a commit and is ignored"


def test_a_folder_without_a_store_is_refused(tmp_path):
    """A mistyped path must not verify as a sound store of no traces."""
    with pytest.raises(RecipeError, match="there is no trace store in"):
        verify_store(tmp_path / "typo")


def test_a_lost_marker_is_named(root):
    """Without store.json other tools take the folder for no store at all."""
    (root / "store.json").unlink()
    assert [problem.split(" is missing")[0] for problem in verify_store(root).problems] == [f"{root}/store.json"]


# Garbage


def make_old(path, seconds: float = 7200) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_only_old_files_of_nobody_go(root, tmp_path):
    """A file of a writer at work is young and not committed yet: removing it would break its commit."""
    store = TraceStore(root)
    old, young = add_traces(store, [some_trace(71)], tmp_path), add_traces(store, [some_trace(72)], tmp_path)
    half = [root / "commits/.0000000004.json.abc.tmp", root / "calls/.part-1.parquet.def.tmp", root / ".probe-12"]
    (root / "calls").mkdir()
    (root / "spool").mkdir()
    spool = root / "spool/spool.sqlite"
    for path in (*half, spool):
        path.write_bytes(b"x")
    for path in (*half, spool, root / old.name, *(root / "shards").iterdir(), *(root / "commits").iterdir()):
        make_old(path)
    os.utime(root / young.name)
    expected = sorted([old.name, *(path.relative_to(root).as_posix() for path in half)])
    before = sorted(path for path in root.rglob("*") if path.is_file())
    assert sorted(collect_garbage(root, dry_run=True)) == expected
    assert sorted(path for path in root.rglob("*") if path.is_file()) == before
    assert sorted(collect_garbage(root)) == expected
    left = sorted(path for path in root.rglob("*") if path.is_file())
    assert left == [path for path in before if path.relative_to(root).as_posix() not in expected]
    assert verify_store(root).num_traces == 30
    store.commit(writer="w", shards=[young], calls=[], totals=Totals())
    assert verify_store(root).num_traces == 31


def test_nothing_is_removed_while_a_commit_is_missing(root):
    """The shards of a lost commit look like garbage, and they are the only copy."""
    for path in root.rglob("*.parquet"):
        make_old(path)
    (root / "commits/0000000002.json").unlink()
    with pytest.raises(IntegrityError, match=r"0000000002, which were written; restore their files\. Nothing was removed"):
        collect_garbage(root)
    assert len(list((root / "shards").iterdir())) == 3


def test_nothing_is_removed_while_a_commit_is_broken(root):
    """As above, for a commit that cannot be read."""
    (root / "commits/0000000003.json").write_text(json.dumps({"seq": 3}))
    for path in root.rglob("*.parquet"):
        make_old(path)
    with pytest.raises(IntegrityError, match="not a commit as it was written"):
        collect_garbage(root)
    assert len(list((root / "shards").iterdir())) == 3


def test_what_is_committed_while_gc_looks_stays(root, tmp_path, monkeypatch):
    """A writer that was asleep for hours commits its old shard just as gc has picked it."""
    store = TraceStore(root)
    entry = add_traces(store, [some_trace(80)], tmp_path)
    make_old(root / entry.name)
    commit = Commit(4, "late", "2026-01-01T00:00:00+00:00", (entry,), (), Totals())
    looked_up = type(store.folder).modified

    def commit_meanwhile(folder, name: str) -> float:
        (root / "commits/0000000004.json").write_bytes(commit_bytes(commit))
        return looked_up(folder, name)

    monkeypatch.setattr(type(store.folder), "modified", commit_meanwhile)
    assert collect_garbage(root) == []
    assert some_trace(80) in list(TraceStore(root).traces())
