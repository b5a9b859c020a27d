"""`stillhouse traces`: what a user sees of a store, and what a script reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.jobs.cli.main import main
from stillhouse.pipeline.records import Problem
from stillhouse.pipeline.store import RunStore
from stillhouse.pipeline.trace_store.spool import Spool
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.pipeline.trace_store.totals import Totals
from stillhouse.pipeline.trace_store.writer import Intent, TraceWriter
from tests.stored_traces import add_traces, commit_traces, some_trace
from tests.unit.test_trace_migration import write_first_layout


@pytest.fixture
def run(tmp_path):
    """A run's folder with twelve traces: two teachers, two of them cut at their length, one call failed and two lost."""
    store = TraceStore(tmp_path / "run/traces")
    commit_traces(store, [some_trace(number) for number in range(8)], tmp_path, writer="a", calls=8)
    rows = [some_trace(number, teacher="big", finish_reason="length" if number < 10 else "stop") for number in range(8, 12)]
    entry = add_traces(store, rows, tmp_path)
    calls = pa.table({"key": [rows[0].key, rows[0].key, rows[1].key], "state": ["failed", "answered", "answered"],
                      "status": [503, 200, 200], "error": ["busy", "", ""], "raw": [b"\xff<html>", None, None]})  # fmt: skip
    pq.write_table(calls, tmp_path / "calls.parquet")
    totals = Totals(num_calls=3, num_answered=2, num_failed=1, num_lost=0, dollars=1.5, dollars_lost=0.25)
    store.commit(writer="b", shards=[entry], calls=[store.add_shard(tmp_path / "calls.parquet", "calls", 3)], totals=totals)
    return tmp_path / "run"


@pytest.fixture
def traces(capsys):
    """Runs `stillhouse traces …` in this process: exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        sys.argv = ["stillhouse", "traces", *map(str, arguments)]
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return left.value.code, said.out, said.err

    before = sys.argv
    yield call
    sys.argv = before


def test_stats_counts_what_is_there(run, traces):
    """The numbers decide whether a run is worth going on with."""
    code, out, _ = traces("stats", run, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["by_teacher"] == {"tiny": 8, "big": 4}
    assert found["by_finish_reason"] == {"stop": 10, "length": 2}
    assert (found["num_traces"], found["prompt_tokens"], found["completion_tokens"], found["dollars"]) == (12, 84, 240, 3.0)
    assert (found["calls"]["num_calls"], found["calls"]["num_failed"], found["calls"]["dollars_lost"]) == (11, 1, 0.25)
    assert (found["num_commits"], found["num_writers"], found["num_shards"], found["spool"]) == (2, 2, 2, None)
    assert found["size_bytes"] == sum(path.stat().st_size for path in (run / "traces").rglob("*.parquet"))
    _, text, _ = traces("stats", run / "traces")
    assert "traces      12: 10 stop, 2 length\n" in text
    assert "calls       11: 10 answered, 1 failed (0 with a beginning kept), 0 lost in a crash\n" in text


def test_stats_shows_what_a_running_writer_has_not_sealed(run, traces):
    """A look at a live run must show its answers, and must not disturb it."""
    writer = TraceWriter(
        TraceStore(run / "traces"), run / "traces/spool", parse=lambda request, raw: some_trace(50, completion=raw.decode())
    )
    with writer:
        intents = [Intent(some_trace(number).key, "p", b"", 10, 20) for number in (50, 51, 52)]
        calls = writer.begin(intents).result()
        writer.answered(calls[0], b"hello").result()
        writer.failed(calls[1], error="busy", status=503, billed="no").result()
        found = json.loads(traces("stats", run, "--json")[1])
        assert found["num_traces"] == 12
        assert found["spool"]["num_under_way"] == 1
        assert found["spool"]["num_outcomes"] == {"answered": 1, "failed": 1}
        said = traces("stats", run)[1].splitlines()[-1]
        assert said == "in spool    1 calls under way; ended and not sealed yet: 1 answered, 1 failed"
        writer.failed(calls[2], error="busy", status=503, billed="no").result()
    assert json.loads(traces("stats", run, "--json")[1])["num_traces"] == 13


def test_a_spool_without_a_commit_is_a_store_already(tmp_path, traces):
    """In its first minutes a run has sealed nothing; `stats` then says so and does not call it missing."""
    Spool(tmp_path / "run/traces/spool").close()
    code, out, _ = traces("stats", tmp_path / "run")
    assert code == 0
    assert "traces      0\n" in out


def test_ls_filters_and_stops(run, traces):
    """Finding the cut traces of one problem among millions."""
    lines = traces("ls", run)[1].splitlines()
    assert len(lines) == 12
    first = some_trace(0)
    assert (
        lines[0]
        == f"{first.key[:12]}  {first.problem_id[:12]}  stop           20  <think> 0 + 1 is easy. </think> \\boxed{{1}}"
    )
    assert traces("ls", run, "--limit", 3)[1].splitlines() == lines[:3]
    assert traces("ls", run, "--finish", "length")[1].splitlines() == lines[8:10]
    assert traces("ls", run, "--problem", some_trace(4).problem_id[:10])[1].splitlines() == lines[4:6]
    rows = [json.loads(line) for line in traces("ls", run, "--json", "--finish", "length")[1].splitlines()]
    assert [row["key"] for row in rows] == [some_trace(8).key, some_trace(9).key]


def test_show_finds_a_trace_by_the_beginning_of_its_key(run, traces):
    """Nobody types 64 digits."""
    trace = some_trace(8)
    code, out, _ = traces("show", run, trace.key[:10], "--json")
    shown = json.loads(out)
    assert code == 0
    assert shown["trace"]["completion"] == trace.completion
    assert [(call["state"], call["status"], call["raw"]) for call in shown["calls"]] == [
        ("failed", 503, "�<html>"),
        ("answered", 200, None),
    ]
    text = traces("show", run, trace.key[:10])[1]
    assert text.endswith(f"── completion\n{trace.completion}\n")
    assert "call                   state failed, status 503, error busy" in text


def test_show_refuses_an_ambiguous_and_an_unknown_beginning(run, traces):
    """Showing some trace instead of the asked one misleads."""
    code, _, err = traces("show", run, "")
    assert (code, "is the beginning of more than one key" in err) == (2, True)
    code, _, err = traces("show", run, "f" * 20)
    assert (code, "no trace has a key that begins with" in err) == (2, True)


def test_a_trace_cannot_drive_the_terminal(tmp_path, traces):
    """A model's text is foreign: an escape sequence in it could retitle, recolour or overwrite what is shown."""
    commit_traces(TraceStore(tmp_path / "s"), [some_trace(0, completion="\x1b]0;owned\x07\x1b[2Jtext")], tmp_path)
    for arguments in (("ls", tmp_path / "s"), ("show", tmp_path / "s", some_trace(0).key)):
        out = traces(*arguments)[1]
        assert "\x1b" not in out
        assert "text" in out


def test_export_jsonl_and_parquet_hold_every_field(run, traces, tmp_path):
    """What is handed on has to be what was stored."""
    assert traces("export", run, tmp_path / "out/all.jsonl")[:2] == (0, f"{tmp_path}/out/all.jsonl: 12 traces\n")
    rows = [json.loads(line) for line in (tmp_path / "out/all.jsonl").read_text().splitlines()]
    stored = [batch for batch in TraceStore(run / "traces").batches()]
    assert rows == pa.Table.from_batches(stored).to_pylist()
    found = json.loads(traces("export", run, tmp_path / "some.parquet", "--format", "parquet", "--only-finished", "--json")[1])
    assert found == {"file": f"{tmp_path}/some.parquet", "num_traces": 10}
    assert pq.read_table(tmp_path / "some.parquet").to_pylist() == [row for row in rows if row["finish_reason"] == "stop"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["all.jsonl"]


def test_export_chat_gives_messages(tmp_path, traces):
    """A trainer reads messages: the problem as it was put, and the reasoning inside its tags."""
    problem = Problem("What is 1 + 1?", "2", "math", "mine", "train")
    RunStore(tmp_path / "run").add_shard("problems", Problem, [problem])
    asked = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}])
    rows = [
        some_trace(0, problem_id=problem.id, rendered_prompt="<user>What is 1 + 1?<bot><think>\n", completion="easy</think>2"),
        some_trace(1, rendered_prompt=asked, completion="<think>\nhm\n</think>4"),
    ]
    commit_traces(TraceStore(tmp_path / "run/traces"), rows, tmp_path)
    assert traces("export", tmp_path / "run", tmp_path / "chat.jsonl", "--format", "chat")[0] == 0
    first, second = [json.loads(line)["messages"] for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert first == [
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "<think>\neasy</think>2"},
    ]
    assert second == [*json.loads(asked), {"role": "assistant", "content": "<think>\nhm\n</think>4"}]


def test_export_chat_says_when_a_prompt_cannot_be_taken_apart(run, traces, tmp_path):
    """Template markup inside a user message would be trained on."""
    code, _, err = traces("export", run, tmp_path / "chat.jsonl", "--format", "chat")
    assert code == 2
    assert "was rendered by a chat template and its problem is not at hand" in err
    assert not (tmp_path / "chat.jsonl").exists()


def test_verify_says_what_is_wrong_and_exits_5(run, traces):
    """A script that copies stores about asks for the exit code, its user for the file's name."""
    code, out, _ = traces("verify", run)
    assert (code, out) == (0, f"{run}: sound; 12 traces and 3 calls in 2 commits\n")
    shard = next((run / "traces/shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    code, out, _ = traces("verify", run)
    assert code == 5
    assert out.startswith(f"{shard} was changed: sha256 ")
    found = json.loads(traces("verify", run, "--json")[1])
    assert (found["sound"], len(found["problems"])) == (False, 1)


def test_gc_removes_what_it_says(run, traces, tmp_path):
    """`--dry-run` that lies costs a shard."""
    left = add_traces(TraceStore(run / "traces"), [some_trace(70)], tmp_path)
    assert traces("gc", run)[1] == "0 files removed\n"
    assert traces("gc", run, "--older-than", 0, "--dry-run")[1] == f"{left.name}\n1 files would be removed\n"
    assert (run / "traces" / left.name).exists()
    assert json.loads(traces("gc", run, "--older-than", 0, "--json")[1]) == {"dry_run": False, "files": [left.name]}
    assert not (run / "traces" / left.name).exists()
    assert traces("verify", run)[0] == 0


@pytest.mark.parametrize("command", [("stats",), ("ls",), ("verify",), ("gc",), ("show", "abc"), ("export", "out.jsonl")])
def test_the_first_layout_is_named_with_its_way_out(tmp_path, traces, command):
    """After an update a run's traces must not look as if they were gone."""
    write_first_layout(tmp_path / "run/traces", batches=2)
    name, *rest = command
    code, _, err = traces(name, tmp_path / "run", *rest)
    assert code == 2
    assert f"`stillhouse traces migrate {tmp_path}/run/traces`" in err
    assert traces("migrate", tmp_path / "run")[:2] == (0, f"{tmp_path}/run/traces: 8 traces brought over\n")
    assert json.loads(traces("stats", tmp_path / "run", "--json")[1])["num_traces"] == 8


@pytest.mark.parametrize("store", ["nowhere", "s3://user:canary@bucket/x", "http://host/x"])
def test_a_wrong_store_is_a_sentence(tmp_path, traces, store, monkeypatch):
    """A traceback, or an empty answer, for a mistyped path."""
    monkeypatch.chdir(tmp_path)
    for name in ("stats", "verify", "ls", "gc"):
        code, out, err = traces(name, store)
        assert (code, out) == (2, "")
        assert err.startswith("stillhouse: ")
        assert "Traceback" not in err
        assert "canary" not in err


def test_a_folder_without_traces_is_said(tmp_path, traces):
    """An empty table looks like a run that found nothing."""
    for name in ("stats", "verify", "ls", "gc"):
        code, out, err = traces(name, tmp_path)
        assert (code, out, "there is no trace store in" in err) == (2, "", True)


def test_a_reader_that_goes_is_no_failure(tmp_path):
    """`| head` on a large store must end at once, quietly, with exit code 0."""
    commit_traces(TraceStore(tmp_path / "s"), [some_trace(number) for number in range(3000)], tmp_path)
    command = [
        shutil.which("stillhouse", path=os.path.dirname(sys.executable)) or "stillhouse",
        "traces",
        "ls",
        str(tmp_path / "s"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
