"""The demo at a reduced size through a real Ray: every stage, its files, its report, and what a second run does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stillhouse.kernels import cpu
from stillhouse.pipeline.integrity import check_checkpoint
from stillhouse.pipeline.records import Example, Graded, Trace, Verdict
from stillhouse.pipeline.report import read_report
from stillhouse.pipeline.store import RunStore
from stillhouse.pipeline.trace_store.store import TraceStore
from tests.small_demo import SMALL_DEMO, small_demo

CHAIN = "State the final answer to the following arithmetic problem: 4 + 3 + 2 + 5 ="

STAGES = {
    *("problems", "traces", "filter", "examples", "train", "quantize"),
    *("evaluate-teacher", "evaluate-base", "evaluate-student", "evaluate-checkpoint", "evaluate-checkpoint_kernels"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, environment):
    """One finished run, shared by the tests that only look at it."""
    folder = tmp_path_factory.mktemp("run")
    done = subprocess.run(
        small_demo(folder / "demo"), cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "demo", done


def test_every_stage_is_committed_and_the_table_is_printed(finished):
    """A run that ends with 0 has done all of its stages."""
    run, done = finished
    assert {path.stem for path in (run / "stages").glob("*.json")} == STAGES
    for row in ("teacher", "base", "16-bit student", "4-bit checkpoint", "4-bit checkpoint, our kernels", "served", "verdict"):
        assert row in done.stdout


def test_the_report_says_what_the_stages_counted(finished):
    """The report's numbers are those on disk."""
    run, _ = finished
    report = read_report(run / "report.json")
    results = report.results
    assert results.pass_at_1.checkpoint.n == results.pass_at_1.base.n == 18
    assert results.pass_at_1.teacher.n == 6
    assert results.num_generated == 96
    assert results.num_lost_in_flight == 0
    assert results.funnel[0].num_in == 96
    assert results.funnel[-1].num_kept == len(RunStore(run).read("kept", Trace))
    assert [point.step for point in results.loss] == list(range(1, 13))
    assert results.loss[-1].loss < results.loss[0].loss
    assert set(results.seconds) == STAGES
    assert (run / report.checkpoint / "manifest.json").is_file()
    assert report.exit_code == 0
    plain = json.loads((run / "report.json").read_text())
    assert set(plain["results"]["pass_at_1"]["checkpoint"]) == {"value", "low", "high", "n"}


def test_the_report_says_which_path_served(finished):
    """A user would not learn that training or the second evaluation fell back to a slow path, or that the paths differ."""
    run, _ = finished
    results = read_report(run / "report.json").results
    served = results.served
    ours = f"int4 on {cpu.describe()}"  # workers on this machine choose as this process does
    num_layers = len(json.loads((run / "quantization.json").read_text())["sqnr_db"])
    assert served.train.path.startswith(f"{num_layers} × {ours}")
    assert served.checkpoint_kernels.path.startswith(f"{num_layers} × {ours}")
    assert served.checkpoint.path.startswith(f"{num_layers} × int4 that compressed-tensors decoded to float32, in torch")
    assert "int4" not in served.base.path + served.student.path + served.teacher.path
    assert {by.device for by in (served.train, served.teacher, served.base, served.checkpoint)} == {"CPU"}
    both = {
        model: {row.problem_id: row for row in RunStore(run).read(f"evaluations/{model}", Graded)}
        for model in ("checkpoint", "checkpoint_kernels")
    }
    same = [both["checkpoint"][key].completion == row.completion for key, row in both["checkpoint_kernels"].items()]
    assert served.agreement.num_completions == len(same) == 18
    assert served.agreement.num_same_completion == sum(same)
    # The same weights in float32, greedily: only two tokens within some 1e-5 of each other could part them.
    assert served.agreement.num_same_verdict >= 17
    assert sum(same) >= 16
    assert served.checkpoint_kernels.path in (run / "report.html").read_text()
    assert served.checkpoint_kernels.path in (run / "checkpoint" / "README.md").read_text()


def test_every_dropped_trace_has_a_verdict_and_every_row_a_trace(finished):
    """From each training row back to the completion it came from; for each completion not used, why."""
    run, _ = finished
    store = RunStore(run)
    traces = {trace.key: trace for trace in TraceStore(store.path("traces")).traces()}
    kept = {trace.key for trace in store.read("kept", Trace)}
    dropped = {verdict.trace_key for verdict in store.read("verdicts", Verdict) if not verdict.keep and not verdict.shadow}
    assert kept | dropped == set(traces)
    assert not kept & dropped
    examples = store.read("examples", Example)
    assert {example.trace_key for example in examples} == kept
    for example in examples:
        assert example.problem_id == traces[example.trace_key].problem_id


def test_the_emitted_checkpoint_is_sound(finished):
    """What a user takes away passes the integrity check, card included."""
    run, _ = finished
    report = check_checkpoint(run / "checkpoint")
    assert report.ok, report.problems
    card = (run / "checkpoint" / "README.md").read_text()
    assert "4-bit checkpoint" in card
    assert "pass@1" in card


def test_traces_are_readable_without_us(finished):
    """The traces were paid for: pyarrow alone reads them."""
    run, _ = finished
    table = pq.read_table(sorted((run / "traces" / "shards").glob("*.parquet")))
    assert table.num_rows == 96
    assert set(table.column("finish_reason").to_pylist()) <= {"stop", "length"}


def test_a_finished_run_is_not_done_again(finished, environment):
    """The same command on a finished run starts no Ray, generates nothing, and gives the same results."""
    run, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    results = read_report(run / "report.json").results
    done = subprocess.run(
        small_demo(run), cwd=run.parent, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("committed already") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")} == before
    assert read_report(run / "report.json").results == results


@pytest.mark.slow
def test_stage_commands_work_alone_and_ask_for_what_is_missing(stillhouse, tmp_path):
    """``filter`` before ``generate`` says which command to run; after it, it needs no teacher."""
    out = tmp_path / "run"
    early = stillhouse(*small_demo(out, verb="filter"))
    assert early.returncode == 2
    assert "stillhouse generate" in early.stderr
    assert "Traceback" not in early.stderr
    generated = stillhouse(*small_demo(out, verb="generate"))
    assert generated.returncode == 0, generated.stderr
    filtered = stillhouse(*small_demo(out, "select.per_problem=2", verb="filter"))
    assert filtered.returncode == 0, filtered.stderr
    store = RunStore(out)
    once = len(store.read("kept", Trace))
    again = stillhouse(*small_demo(out, "select.per_problem=1", verb="filter"))
    assert again.returncode == 0, again.stderr
    assert len(store.read("kept", Trace)) < once
    assert TraceStore(store.path("traces")).num_rows == 96


def test_a_stranger_measures_the_same_on_the_emitted_checkpoint(finished, environment):
    """What the report says of the checkpoint is what transformers and compressed-tensors give without our code."""
    run, _ = finished
    script = Path(__file__).parents[1] / "standalone_eval.py"
    arguments = [sys.executable, str(script), str(run / "checkpoint"), "--seed", "9000000", "--size", "6"]
    done = subprocess.run(
        [*arguments, "--max-new-tokens", "96"],
        cwd=run.parent, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["stillhouse_imported"] is False
    reported = read_report(run / "report.json").results.pass_at_1.checkpoint
    assert measured["n"] == reported.n
    assert measured["accuracy"] == pytest.approx(reported.value)


@pytest.mark.slow
def test_a_detour_over_a_bad_recipe_costs_nothing(finished, environment, tmp_path):
    """Good, then one that keeps nothing, then good again: the first recipe's stages are made again, not declared damaged."""
    run, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(run, copy)

    def call(*extra: str, verb: str = "filter") -> subprocess.CompletedProcess[str]:
        whole = small_demo(copy, *extra, verb=verb)
        return subprocess.run(whole, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)

    assert call("filters.min_tokens=5000", "filters.max_tokens=6000").returncode == 1
    back = call()
    assert back.returncode == 0, back.stderr
    again = call(verb="report")
    assert again.returncode == 0, again.stderr


def test_a_card_that_was_not_sealed_is_written_again(finished, environment, tmp_path):
    """A kill between the card and its manifest must not leave a checkpoint that nothing can repair."""
    run, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "checkpoint" / "README.md").write_text("half a card")
    whole = small_demo(copy, verb="report")
    done = subprocess.run(whole, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert check_checkpoint(copy / "checkpoint").ok
    assert "pass@1" in (copy / "checkpoint" / "README.md").read_text()


@pytest.mark.slow
def test_a_corrected_answer_keeps_the_traces_of_its_prompt(stillhouse, tmp_path):
    """Mending a gold in one's file must not cost the teacher's tokens again, and must count from then on."""
    out, problems = tmp_path / "run", tmp_path / "mine.jsonl"

    def generate_and_filter(answer: str) -> subprocess.CompletedProcess[str]:
        problems.write_text(json.dumps({"prompt": CHAIN, "answer": answer}) + "\n")
        source = f"problems.train=[{{source: file, path: {problems}}}]"
        settings = [value for value in SMALL_DEMO if not value.startswith("problems.train")]
        flags = [part for value in (*settings, source, "teacher.sampling.temperature=0") for part in ("--set", value)]
        assert stillhouse("generate", "demo", "--out", str(out), *flags).returncode == 0
        return stillhouse("filter", "demo", "--out", str(out), *flags)

    wrong = generate_and_filter("15")
    assert wrong.returncode == 1
    paid = TraceStore(out / "traces").totals().num_calls
    right = generate_and_filter("14")
    assert right.returncode == 0, right.stderr
    assert TraceStore(out / "traces").totals().num_calls == paid > 0
    assert len(RunStore(out).read("kept", Trace)) == 1
