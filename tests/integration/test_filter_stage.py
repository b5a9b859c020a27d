"""The filter stage on a real Ray, over replayed traces: what it keeps, what it only watches, and one trace's way."""

from __future__ import annotations

import json
import os

import pytest

from stillhouse.jobs.filtering import explain
from stillhouse.jobs.progress import LineReporter
from stillhouse.jobs.recipe import load_recipe
from stillhouse.jobs.runner import run_recipe
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.records import Trace, Verdict
from stillhouse.pipeline.store import RunStore
from stillhouse.pipeline.trace_store.store import TraceStore

RECIPE = """
name: old
problems:
  test: [{source: reasoning_gym, task: chain_sum, size: 2, seed: 9000000}]
teacher: {kind: replay, layout: jsonl, path: old.jsonl}
filters: {list: [{name: finished}, {name: think_block}, {name: "own_filters:no_sevens", mode: shadow}, {name: answer_present}]}
student: {base_model: tiny, base_weights: int4, dtype: float32}
train: {learning_rate: 4e-3, num_steps: 4, tokens_per_step: 1024, max_length: 512}
"""
OWN_FILTER = """
def no_sevens(trace):
    return ("a seven", trace.completion) if "7" in trace.completion else None
"""
NUM_PROBLEMS = 12


def row(number: int, answer: int, thought: str = "add") -> dict[str, str]:
    completion = f"<think>\n{thought}\n</think>\n\n\\boxed{{{answer}}}"
    return {
        "prompt": f"Please add one to the number {number} and say what it is.",
        "answer": str(number + 1),
        "completion": completion,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filters")
    rows = [row(n, n + 1) for n in range(NUM_PROBLEMS)]
    rows += [row(0, 99), row(1, 2), {**row(2, 3), "completion": "no thought, \\boxed{3}"}, row(3, 4, "a longer way to add")]
    (folder / "old.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (folder / "own_filters.py").write_text(OWN_FILTER)
    (folder / "held_out.jsonl").write_text(json.dumps({"prompt": row(5, 6)["prompt"]}) + "\n")
    (folder / "old.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def filtered(folder, monkeypatch):
    """Generate and filter with overrides; gives the run's store."""
    monkeypatch.syspath_prepend(str(folder))
    # Ray's workers have to find the user's own filter too.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("HOME", str(folder))

    def call(*overrides: str) -> RunStore:
        recipe = load_recipe(folder / "old.yaml", overrides)
        for command in ("generate", "filter"):
            run_recipe(recipe, folder / "run", LineReporter(quiet=True), command=command)
        return RunStore(folder / "run")

    return call


@pytest.mark.slow
def test_filters_of_a_recipe_drop_watch_and_say_why(filtered, folder):
    """A team's own filter could not be tried out before it costs traces, or nobody could tell why a trace is not there."""
    run = filtered()
    kept = run.read("kept", Trace)
    verdicts = run.read("verdicts", Verdict)
    assert len(kept) == len({trace.problem_id for trace in kept}) == NUM_PROBLEMS
    dropped = {(v.check, v.outcome or v.reason) for v in verdicts if not v.keep and not v.shadow}
    assert dropped == {
        ("verify_math", "wrong"),
        ("think_block", "no think block"),
        ("exact_dedup", "duplicate of an earlier trace"),
        ("best_of_n", "not among the k best"),
    }
    watched = {v.trace_key for v in verdicts if v.check == "own_filters:no_sevens"}
    assert watched == {trace.key for trace in TraceStore(folder / "run" / "traces").traces() if "7" in trace.completion}
    assert watched & {trace.key for trace in kept}
    rates = {rate["name"]: rate for rate in run.read_json("filtering.json")["filters"]}
    assert rates["own_filters:no_sevens"]["num_against"] == len(watched)
    one = next(iter(watched))
    assert [v.check for v in explain(folder / "run", one[:16])][-1] in ("selected", "best_of_n", "exact_dedup")
    with pytest.raises(RecipeError, match="no filtered trace"):
        explain(folder / "run", "zz")


@pytest.mark.slow
def test_filtering_again_replaces_every_verdict_and_asks_nobody(filtered, folder):
    """Verdicts of two settings would mix, or the traces would be paid for again."""
    run = filtered("select.max_examples=5", f"filters.evaluation_sets=[{{name: {folder / 'held_out.jsonl'}}}]")
    kept = run.read("kept", Trace)
    assert len(kept) == 5
    contaminated = [v for v in run.read("verdicts", Verdict) if v.check == "decontamination"]
    assert len(contaminated) == 1
    assert "5" in contaminated[0].evidence
    selected = [v.trace_key for v in run.read("verdicts", Verdict) if v.check == "selected"]
    assert sorted(selected) == sorted(trace.key for trace in kept)
    assert TraceStore(folder / "run" / "traces").totals().num_calls == NUM_PROBLEMS + 4
