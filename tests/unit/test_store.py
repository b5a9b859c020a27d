"""The run store: whole files or none, shards by content, manifests that stand for done."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from stillhouse.pipeline.errors import IntegrityError
from stillhouse.pipeline.records import Example, Graded, Problem, Trace, Verdict, from_table, to_table
from stillhouse.pipeline.store import RunStore, StageManifest, fingerprint, output_hash, write_atomic

PROBLEM = Problem("2 + 2 =", "4", "math", "mine.jsonl", "train")
TRACE = Trace("k1", PROBLEM.id, "tiny", "r", "2 + 2 =", "<think>\n2 + 2 = 4\n</think>\n\\boxed{4}", "2 + 2 = 4", "\\boxed{4}",
              "stop", 5, 9, 0.6, 0.95, 64, 0, 2**63 - 1, 0.25)  # fmt: skip
VERDICT = Verdict("k1", "length", 1, False, "too short", "9 tokens")
EXAMPLE = Example("e1", "k1", PROBLEM.id, (1, 2, 3), (-100, 2, 3), "h")
GRADED = Graded("base", PROBLEM.id, "mine.jsonl", 0, True, "correct", "", "4", "stop", 1, False, True)


@pytest.mark.parametrize("record", [PROBLEM, TRACE, VERDICT, EXAMPLE, GRADED], ids=lambda record: type(record).__name__)
def test_records_come_back_from_disk_as_they_went(tmp_path, record):
    """A field lost or changed between two stages would change the result without a word."""
    store = RunStore(tmp_path)
    store.add_shard("rows", type(record), [record])
    assert store.read("rows", type(record)) == [record]


def test_a_trace_without_reasoning_keeps_its_none(tmp_path):
    """A missing think block is None, not an empty one: filters tell them apart."""
    import dataclasses

    bare = dataclasses.replace(TRACE, reasoning=None, answer_text=None)
    assert from_table(Trace, to_table(Trace, [bare])) == [bare]


def test_shards_are_read_by_plain_pyarrow(tmp_path):
    """People read their traces with pyarrow or datasets, without our code."""
    store = RunStore(tmp_path)
    path = store.add_shard("traces", Trace, [TRACE])
    table = pq.read_table(path)
    assert table.column("completion").to_pylist() == [TRACE.completion]
    assert table.schema.metadata[b"stillhouse.schema_version"] == b"2"


def test_the_same_rows_make_one_shard(tmp_path):
    """A batch committed twice (crash between write and acknowledgement) must not double the data."""
    store = RunStore(tmp_path)
    assert store.add_shard("traces", Trace, [TRACE]) == store.add_shard("traces", Trace, [TRACE])
    assert len(store.shards("traces")) == 1


def test_a_key_in_two_shards_is_read_once(tmp_path):
    """A trace generated twice is trained on once."""
    import dataclasses

    store = RunStore(tmp_path)
    store.add_shard("traces", Trace, [TRACE])
    store.add_shard("traces", Trace, [dataclasses.replace(TRACE, completion="other")])
    assert len(store.shards("traces")) == 2
    assert len(store.read("traces", Trace, key="key")) == 1


def test_files_left_by_a_crash_are_not_read(tmp_path):
    """A half-written temporary file next to the shards must neither break nor change what is read."""
    store = RunStore(tmp_path)
    store.add_shard("traces", Trace, [TRACE])
    (tmp_path / "traces" / ".part-0.parquet.17.tmp").write_bytes(b"PAR1 torn")
    assert store.read("traces", Trace) == [TRACE]


def test_replacing_shards_leaves_only_the_new_rows(tmp_path):
    """Filtering again with other settings must not mix old verdicts with new ones, also when nothing is left."""
    store = RunStore(tmp_path)
    store.replace_shards("verdicts", Verdict, [VERDICT])
    store.replace_shards("verdicts", Verdict, [])
    assert store.read("verdicts", Verdict) == []
    assert len(store.shards("verdicts")) == 1


def test_a_broken_shard_is_named(tmp_path):
    """The user has to know which file to restore."""
    store = RunStore(tmp_path)
    path = store.add_shard("traces", Trace, [TRACE])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(IntegrityError, match=path.name):
        store.read("traces", Trace)


def test_a_stage_counts_as_done_only_under_its_fingerprint(tmp_path):
    """A changed recipe must not be answered with the old output."""
    store = RunStore(tmp_path)
    path = store.write_json("out.json", [1])
    store.commit_stage(StageManifest("filter", "f1", store.outputs([path]), {"num_kept": 1}))
    assert store.committed_stage("filter", "f1").counts == {"num_kept": 1}
    assert store.committed_stage("filter", "f2") is None
    assert store.committed_stage("train", "f1") is None


@pytest.mark.parametrize("harm", ["change", "remove"])
def test_an_output_changed_behind_the_manifest_is_an_integrity_error(tmp_path, harm):
    """Silently going on from a damaged file would put damage into the checkpoint."""
    store = RunStore(tmp_path)
    path = store.write_json("out.json", [1])
    store.commit_stage(StageManifest("filter", "f1", store.outputs([path])))
    path.unlink() if harm == "remove" else path.write_text("[2]")
    with pytest.raises(IntegrityError, match=r"out\.json"):
        store.committed_stage("filter", "f1")


def test_a_fingerprint_depends_on_each_of_its_parts():
    """Two different pieces of work must never share a name."""
    given = ("filter", 1, {"k": 1}, {"traces": "t"})
    prints = {
        fingerprint(*given),
        fingerprint("train", *given[1:]),
        fingerprint("filter", 2, *given[2:]),
        fingerprint("filter", 1, {"k": 2}, {"traces": "t"}),
        fingerprint("filter", 1, {"k": 1}, {"traces": "u"}),
    }
    assert len(prints) == 5
    assert fingerprint(*given) == fingerprint("filter", 1, {"k": 1}, {"traces": "t"})


def test_writing_is_whole_or_not_at_all_under_kill(tmp_path):
    """A writer killed at any moment leaves the old content or the new one, never a torn file."""
    target = tmp_path / "file.json"
    write_atomic(target, json.dumps("a" * 200_000).encode())
    program = (
        "import sys, json; from pathlib import Path; from stillhouse.pipeline.store import write_atomic\n"
        "print('up', flush=True)\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1; write_atomic(Path(sys.argv[1]), json.dumps(chr(97 + n % 26) * 200_000).encode())\n"
    )
    for wait_s in (0.0, 0.013, 0.031, 0.057, 0.101):
        writer = subprocess.Popen([sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE)
        writer.stdout.readline()
        try:
            writer.wait(timeout=wait_s)
        except subprocess.TimeoutExpired:
            writer.kill()
        writer.wait()
        text = json.loads(target.read_text())
        assert len(text) == 200_000
        assert len(set(text)) == 1


def test_a_large_files_hash_sees_its_ends_and_its_size(tmp_path, monkeypatch):
    """Weights of many gigabytes are not read whole at every start, yet truncation and swapped ends must show."""
    from stillhouse.pipeline import store

    monkeypatch.setattr(store, "HASH_WHOLE_FILES_BELOW", 1 << 20)
    path = tmp_path / "weights"
    path.write_bytes(bytes(3 << 20))
    first = output_hash(path)
    path.write_bytes(bytes((3 << 20) - 1))
    assert output_hash(path) != first
    path.write_bytes(bytes((3 << 20) - 1) + b"x")
    assert output_hash(path) != first
