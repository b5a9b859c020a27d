"""The sealed traces: what is committed is seen whole, once and by everyone; what is not is not seen at all."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.pipeline.errors import IntegrityError, RecipeError
from stillhouse.pipeline.records import Trace, content_key, to_table
from stillhouse.pipeline.trace_store.folder import StorageError, open_folder
from stillhouse.pipeline.trace_store.keys import KeySet, decode_keys, sort_keys
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.pipeline.trace_store.totals import Totals
from tests.stored_traces import add_traces, commit_traces, some_trace


def test_committed_traces_come_back_as_they_went(tmp_path):
    """A field that changes on its way through the store changes what is trained on."""
    traces = [some_trace(0), some_trace(1, reasoning=None, answer_text=None, finish_reason="length", origin="set@rev#1")]
    commit_traces(TraceStore(tmp_path / "s"), traces, tmp_path)
    assert list(TraceStore(tmp_path / "s").traces()) == traces


def test_a_shard_without_its_commit_is_not_there(tmp_path):
    """A writer killed between shard and commit seals again: reading the leftover as well would double its traces."""
    store = TraceStore(tmp_path / "s")
    commit_traces(store, [some_trace(0)], tmp_path)
    add_traces(store, [some_trace(1)], tmp_path)
    fresh = TraceStore(tmp_path / "s")
    assert [trace.sample_index for trace in fresh.traces()] == [0]
    assert fresh.keys().contains([some_trace(0).key, some_trace(1).key]).tolist() == [True, False]


def test_of_a_repeated_key_the_first_commit_counts(tmp_path):
    """Two drivers may pay for the same key; training on both copies would weigh that problem double."""
    store = TraceStore(tmp_path / "s")
    commit_traces(store, [some_trace(number) for number in range(10)], tmp_path, writer="a")
    later = [some_trace(number, completion="paid again") for number in range(5, 15)]
    commit_traces(store, later, tmp_path, writer="b")
    read = list(TraceStore(tmp_path / "s").traces())
    assert [trace.key for trace in read] == [some_trace(number).key for number in range(15)]
    assert [trace.completion == "paid again" for trace in read] == [False] * 10 + [True] * 5
    assert sum(batch.num_rows for batch in store.batches(["key", "dollars"], batch_rows=3)) == 15
    assert (store.num_rows, len(store.keys())) == (20, 15)


def test_only_the_wanted_traces_are_read(tmp_path):
    """A run reads what its recipe planned, out of a store that other recipes fill as well."""
    store = TraceStore(tmp_path / "s")
    commit_traces(store, [some_trace(number) for number in range(20)], tmp_path)
    wanted = {some_trace(3).key, some_trace(17).key, some_trace(99).key}
    assert [trace.key for trace in store.traces(wanted)] == [some_trace(3).key, some_trace(17).key]


def test_a_reader_sees_what_another_commits_later(tmp_path):
    """A driver that stays open for days must find what a second driver has stored meanwhile."""
    reader, writer = TraceStore(tmp_path / "s"), TraceStore(tmp_path / "s")
    assert (list(reader.traces()), len(reader.keys())) == ([], 0)
    for number in range(3):
        commit_traces(writer, [some_trace(number)], tmp_path)
        assert some_trace(number) in list(reader.traces())


def test_a_column_that_came_later_reads_as_its_default(tmp_path):
    """Traces paid for before a schema grew stay readable."""
    store = TraceStore(tmp_path / "s")
    old = to_table(Trace, [some_trace(0, dollars=0.0)]).drop_columns(["dollars", "usage_counted", "origin"])
    pq.write_table(old, tmp_path / "old.parquet")
    store.commit(writer="w", shards=[store.add_shard(tmp_path / "old.parquet", "shards", 1)], calls=[], totals=Totals())
    commit_traces(store, [some_trace(1)], tmp_path)
    assert list(store.traces()) == [some_trace(0, dollars=0.0), some_trace(1)]
    counted = [value for batch in store.batches(["usage_counted"]) for value in batch.column(0).to_pylist()]
    assert counted == [True, True]


def test_two_threads_commit_without_losing_a_commit(tmp_path):
    """Two drivers that seal at the same moment take the same number; the loser's traces must not vanish."""
    together = threading.Barrier(2)

    def write(writer: str, first: int) -> None:
        store = TraceStore(tmp_path / "s")
        for number in range(first, first + 25):
            entry = add_traces(store, [some_trace(number)], tmp_path)
            together.wait()
            store.commit(writer=writer, shards=[entry], calls=[], totals=Totals(num_calls=number - first + 1))

    threads = [threading.Thread(target=write, args=("a", 0)), threading.Thread(target=write, args=("b", 100))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = TraceStore(tmp_path / "s")
    assert [commit.seq for commit in store.commits()] == list(range(1, 51))
    assert {trace.key for trace in store.traces()} == {some_trace(n).key for n in [*range(25), *range(100, 125)]}
    assert store.totals() == Totals(num_calls=50)


def test_a_file_that_is_not_there_cannot_be_committed(tmp_path):
    """A commit that lists a missing file would make the whole store unreadable."""
    store = TraceStore(tmp_path / "s")
    entry = add_traces(store, [some_trace(0)], tmp_path)
    (tmp_path / "s" / entry.name).unlink()
    with pytest.raises(IntegrityError, match="nothing was committed"):
        store.commit(writer="w", shards=[entry], calls=[], totals=Totals())
    assert TraceStore(tmp_path / "s").commits() == []


@pytest.mark.parametrize("damage", [lambda text: text[:-40], lambda text: text.replace('"num_rows": 1', '"num_rows": 2')])
def test_a_damaged_commit_is_named(tmp_path, damage):
    """A commit that is half there or was edited must stop the reader, not shorten the data."""
    commit_traces(TraceStore(tmp_path / "s"), [some_trace(0)], tmp_path)
    path = tmp_path / "s/commits/0000000001.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(IntegrityError, match=r"commits/0000000001\.json is not a commit as it was written"):
        TraceStore(tmp_path / "s").commits()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "is committed and not there"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "cannot be read"),
        (lambda path: pq.write_table(pq.read_table(path).slice(1), path), "has 1 rows and its commit says 2"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"\\boxed{1}", b"\\boxed{\xff}")), "cannot be read .*UTF8"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path, damage, said):
    """Reading on past a damaged shard would drop paid traces without a word."""
    commit = commit_traces(TraceStore(tmp_path / "s"), [some_trace(0), some_trace(1)], tmp_path)
    damage(tmp_path / "s" / commit.shards[0].name)
    with pytest.raises(IntegrityError, match=said):
        list(TraceStore(tmp_path / "s").traces())


def test_a_newer_store_is_refused(tmp_path):
    """An old program that reads a new layout by its own rules would see less than there is."""
    commit_traces(TraceStore(tmp_path / "s"), [some_trace(0)], tmp_path)
    (tmp_path / "s/store.json").write_text(json.dumps({"schema_version": 3, "kind": "stillhouse traces"}))
    with pytest.raises(RecipeError, match="schema version 3; this version reads 2"):
        TraceStore(tmp_path / "s")


def test_looking_at_a_folder_writes_nothing(tmp_path):
    """`traces stats` on a mistyped path must not leave an empty store behind."""
    store = TraceStore(tmp_path / "typo")
    assert (store.commits(), len(store.keys()), TraceStore.exists(tmp_path / "typo")) == ([], 0, False)
    assert not (tmp_path / "typo").exists()


def test_datasets_and_pyarrow_read_the_shards(tmp_path):
    """People load their traces with the tools they know, without our code."""
    import datasets

    commit_traces(TraceStore(tmp_path / "s"), [some_trace(0), some_trace(1)], tmp_path)
    commit_traces(TraceStore(tmp_path / "s"), [some_trace(2)], tmp_path)
    files = [str(path) for path in sorted((tmp_path / "s/shards").glob("*.parquet"))]
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    expected = {some_trace(number).key: some_trace(number).completion for number in range(3)}
    assert dict(zip(rows["key"], rows["completion"])) == expected
    table = pq.read_table(tmp_path / "s/shards")
    assert dict(zip(table["key"].to_pylist(), table["completion"].to_pylist())) == expected


# Keys


def test_a_key_set_answers_like_a_set_of_texts():
    """A key taken for missing is paid for twice; one taken for present is never asked."""
    known = [content_key("known", number) for number in range(3000)]
    unknown = [content_key("unknown", number) for number in range(3000)]
    added = [content_key("added", number) for number in range(20_000)]
    keys = KeySet.from_hex(known + known[:10])
    assert len(keys) == 3000
    keys.add(added[:100])
    keys.add(added[:100])
    assert len(keys) == 3100
    keys.add(added)  # more than the small set holds: merged into the sorted ones
    assert len(keys) == 23_000
    everything = known + unknown + added
    expected = [True] * 3000 + [False] * 3000 + [True] * 20_000
    assert [key in keys for key in everything] == expected
    assert keys.contains(everything).tolist() == expected
    assert keys.contains([]).tolist() == []


def test_keys_that_share_their_first_half_are_told_apart():
    """Sixteen hexadecimal digits are not the key."""
    same = "0123456789abcdef"
    inside = [same + f"{number:048x}" for number in (1 << 128, 5 << 128, 9 << 128)]
    outside = [same + f"{number:048x}" for number in (0, 3 << 128, 10 << 128)]
    keys = KeySet.from_hex(inside)
    assert keys.contains(inside + outside).tolist() == [True] * 3 + [False] * 3
    assert [key in keys for key in inside + outside] == [True] * 3 + [False] * 3


def test_repeats_are_the_later_rows():
    """Which of two rows of a key is dropped decides which completion is trained on."""
    names = [content_key(number) for number in (4, 1, 4, 2, 1, 4)]
    keys, repeats = sort_keys(*decode_keys(pa.chunked_array([names[:2], names[2:]])))
    assert (len(keys), repeats.tolist()) == (3, [2, 4, 5])


def test_a_slice_of_a_column_is_read_at_its_place():
    """Arrow hands out windows into larger buffers; reading from the buffer's start would give other keys."""
    names = [content_key(number) for number in range(10)]
    whole, part = decode_keys(names), decode_keys(pa.array(names).slice(3, 4))
    assert np.array_equal(part[0], whole[0][3:7])
    assert np.array_equal(part[1], whole[1][3:7])


@pytest.mark.parametrize("bad", ["k1", "G" * 64, "A" * 64, "a" * 63 + "é"])
def test_what_is_no_sha256_is_refused(bad):
    """A shortened or foreign key would be compared with something else than itself."""
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        decode_keys([content_key(1), bad])


# Folders


@pytest.mark.parametrize(
    "url", ["reference://x", "http://host/x", "s3://b::file://x", "zip://a::s3://b/c.zip", "github://a:b@/"]
)
def test_other_schemes_are_refused(url):
    """fsspec would follow a chain of file systems, or a list of foreign addresses, wherever it leads."""
    with pytest.raises(RecipeError, match="a trace store is a folder or a URL of one of file, s3"):
        open_folder(url)


def test_a_password_in_a_url_is_refused_and_not_repeated():
    """The URL of a store ends up in reports and logs."""
    with pytest.raises(RecipeError, match="put the keys into the environment") as caught:
        open_folder("s3://AKIAEXAMPLE:canary-secret@bucket/traces")
    assert "canary" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


@pytest.mark.parametrize(("url", "package"), [("gs://bucket/x", "pip install gcsfs"), ("abfs://container@account/x", "adlfs")])
def test_a_missing_package_is_named_with_its_command(url, package):
    """An ImportError out of fsspec says nothing of what to install."""
    with pytest.raises(RecipeError, match=package):
        open_folder(url)


def test_a_url_that_became_a_path_is_refused():
    """Path("s3://bucket/x") is the local folder "s3:/bucket/x", which takes traces without a word."""
    with pytest.raises(RecipeError, match="pass it as text"):
        open_folder(Path("s3://bucket/x"))


def test_paths_and_file_urls_are_the_same_folder(tmp_path):
    """A recipe may say either."""
    open_folder(f"file://{tmp_path}").write("a/b", b"1")
    assert open_folder(tmp_path).read("a/b") == open_folder(str(tmp_path)).read("a/b") == b"1"


@pytest.mark.parametrize("make", [lambda tmp: tmp / "folder", lambda tmp: f"memory://{tmp.name}-{id(tmp)}"])
def test_a_folder_does_what_the_store_needs(tmp_path, make):
    """Disk and object store have to answer alike, or the store is right on one of them only."""
    folder = open_folder(make(tmp_path))
    assert folder.list("commits") == []
    assert not folder.exists("commits/1")
    folder.write("commits/2", b"two")
    folder.write("commits/1", b"o")
    folder.write("commits/1", b"one")
    folder.write("commits/deeper/3", b"three")
    (tmp_path / "big").write_bytes(bytes(range(256)) * 5000)
    folder.write_file("shards/big", tmp_path / "big")
    assert folder.list("commits") == ["commits/1", "commits/2"]
    assert folder.read_many(["commits/2", "commits/1"]) == [b"two", b"one"]
    assert (folder.size("shards/big"), folder.exists("shards/big")) == (1_280_000, True)
    with folder.open("shards/big") as file:
        file.seek(1_000_000)
        assert file.read(300) == (bytes(range(256)) * 5000)[1_000_000:1_000_300]
    assert 0 < folder.modified("commits/1") < 1e11
    folder.delete("commits/1")
    folder.delete("commits/1")
    assert folder.list("commits") == ["commits/2"]
    for read in (folder.read, folder.size, folder.modified):
        with pytest.raises(FileNotFoundError):
            read("commits/1")


def test_of_many_that_create_a_file_one_wins(tmp_path):
    """Two writers that both believe to have published commit 7 would lose one commit."""
    together = threading.Barrier(8)
    won: list[bytes] = []

    def create(content: bytes) -> None:
        folder = open_folder(tmp_path)
        assert folder.exclusive
        together.wait()
        if folder.create("commits/7", content):
            won.append(content)

    threads = [threading.Thread(target=create, args=(b"%d" % number * 1000,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [open_folder(tmp_path).read("commits/7")]
    assert open_folder(tmp_path).create("commits/7", won[0])  # a request that the network repeats is no other writer
    assert open_folder(tmp_path).list("commits") == ["commits/7"]
    assert open_folder(tmp_path).list("") == []


def test_a_disk_without_hard_links_gets_names_that_cannot_conflict(tmp_path, monkeypatch):
    """On exFAT or a mounted bucket the exclusive create fails; commits have to go through all the same."""

    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    for writer in ("a", "b"):
        commit_traces(TraceStore(tmp_path / "s"), [some_trace(ord(writer))], tmp_path, writer=writer)
    store = TraceStore(tmp_path / "s")
    assert store.commit_names() == ["commits/0000000001-a.json", "commits/0000000002-b.json"]
    assert len(list(store.traces())) == 2


@pytest.mark.parametrize("moment", ["os.fsync", "os.replace", "os.link", "shutil.copyfileobj"])
def test_a_write_that_dies_leaves_no_name_behind(tmp_path, moment):
    """A reader must never meet half a file under the name of a whole one."""
    code = f"""
import os, shutil
from pathlib import Path
from stillhouse.pipeline.trace_store.folder import open_folder
folder = open_folder({str(tmp_path / "s")!r})
folder.write("commits/0", b"old")
{moment} = lambda *a: os._exit(9)
Path({str(tmp_path / "big")!r}).write_bytes(b"new")
if "link" in {moment!r}:
    folder.create("commits/1", b"new")
folder.write_file("commits/0", Path({str(tmp_path / "big")!r}))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    left = open_folder(tmp_path / "s").list("commits")
    assert [name for name in left if not name.startswith("commits/.")] == ["commits/0"]
    assert open_folder(tmp_path / "s").read("commits/0") == b"old"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """`[Errno 20]` without a path does not tell anyone what to do."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"/file cannot be made: File exists"):
        open_folder(tmp_path / "file" / "s").write("commits/1", b"x")
