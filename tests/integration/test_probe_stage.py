"""What the base student can do already, on a real Ray with the shipped tiny models, and the selection by it and by topic."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest
import reasoning_gym

from stillhouse.jobs.cluster import ray_session
from stillhouse.jobs.progress import LineReporter
from stillhouse.jobs.recipe import load_recipe
from stillhouse.jobs.runner import run_recipe
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.records import Graded, Problem, Trace, Verdict, from_table
from stillhouse.pipeline.store import RunStore
from stillhouse.pipeline.trace_store.store import TraceStore

pytestmark = pytest.mark.slow

RECIPE = """
name: sums
problems:
  train: [{source: file, path: train.jsonl, kind: regex, topic_field: area}]
  test: [{source: reasoning_gym, task: chain_sum, size: 2, seed: 9000000}]
teacher:
  kind: transformers
  model: tiny
  dtype: float32
  batch_size: 32
  sampling: {temperature: 0.6, top_p: 0.95, max_new_tokens: 160}
  opens_think: false
student: {base_model: tiny, base_weights: int4, dtype: float32}
train: {learning_rate: 4e-3, num_steps: 4, tokens_per_step: 1024, max_length: 512}
gate: {batch_size: 4, max_new_tokens: 48}
"""
BAND = "select.student_band=[0, 0.5]"
TERMS = {"min_terms": 4, "max_terms": 6, "min_digits": 1, "max_digits": 2}
NUM_HARD, NUM_EASY, SAMPLES = 24, 12, 4


@pytest.fixture(scope="module")
def ray():
    with ray_session(None, num_cpus=2, object_store_mb=100) as ray:
        yield ray


@pytest.fixture(scope="module")
def run(ray, tmp_path_factory):
    """A folder with traces for chain sums: the hard ones want the sum, the easy ones any whole number."""
    folder = tmp_path_factory.mktemp("probe")
    sums = reasoning_gym.create_dataset("chain_sum", seed=8_000_000, size=NUM_HARD + NUM_EASY, **TERMS)
    rows = [
        {"prompt": entry["question"], "pattern": entry["answer"], "area": "hard"}
        if number < NUM_HARD
        else {"prompt": entry["question"], "pattern": "-?[0-9]+", "area": "easy"}
        for number, entry in enumerate(sums)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(RECIPE)

    def call(*overrides, commands=("generate", "filter")):
        recipe = load_recipe(folder / "sums.yaml", overrides)
        for command in commands:
            run_recipe(recipe, folder / "run", LineReporter(quiet=True), command=command)
        return RunStore(folder / "run")

    return call


def probe_shards(store):
    return [store.path(name) for name in json.loads(store.path("stages", "probe.json").read_text())["outputs"]]


def pass_rates(store):
    graded = [row for path in probe_shards(store) for row in from_table(Graded, pq.read_table(path))]
    right = Counter(row.problem_id for row in graded if row.correct)
    return {row.problem_id: right[row.problem_id] / SAMPLES for row in graded}, graded


def topics(store):
    return {problem.id: problem.topic for problem in store.read("problems", Problem)}


def kept_by_topic(store):
    of = topics(store)
    return Counter(of[trace.problem_id] for trace in store.read("kept", Trace))


def test_a_band_drops_what_the_base_solves_and_asks_it_once(run):
    """Problems that teach nothing would be trained on, or each try of a band would cost an evaluation again."""
    store = run(BAND)
    rates, graded = pass_rates(store)
    of = topics(store)
    assert Counter(Counter(row.problem_id for row in graded).values()) == {SAMPLES: NUM_HARD + NUM_EASY}
    assert {row.model for row in graded} == {"base"}
    verdicts = [v for v in store.read("verdicts", Verdict) if v.check == "pass_rate"]
    problem_of = {trace.key: trace.problem_id for trace in TraceStore(store.path("traces")).traces()}
    too_easy = {problem_of[v.trace_key] for v in verdicts}
    assert {v.reason for v in verdicts} == {"too easy for the student"}
    assert Counter(of[problem] for problem in too_easy)["easy"] > NUM_EASY / 2
    assert all(rates[problem] > 0.5 for problem in too_easy)
    kept = {trace.problem_id for trace in store.read("kept", Trace)}
    assert kept
    assert all(rates[problem] <= 0.5 for problem in kept)

    probed = store.path("stages", "probe.json").read_bytes()
    assert kept_by_topic(run("select.student_band=[0.75, 1]")).keys() == {"easy"}
    assert store.path("stages", "probe.json").read_bytes() == probed


def test_a_stopped_probe_goes_on_and_another_base_sampling_does_not_take_its_answers(run):
    """Hours of answers would be lost with the last minute's, or the answers of two temperatures mixed."""
    store = run(BAND)
    rates, _ = pass_rates(store)
    shards = probe_shards(store)
    assert len(shards) > 2
    store.path("stages", "probe.json").unlink()
    shards[0].unlink()
    old = {path: path.stat().st_mtime_ns for path in shards[1:]}
    run(BAND)
    assert pass_rates(store)[0] == rates
    assert {path: path.stat().st_mtime_ns for path in shards[1:]} == old

    probed = json.loads(store.path("stages", "probe.json").read_text())
    run(BAND, "select.student_temperature=0", "select.student_samples=1")
    other = json.loads(store.path("stages", "probe.json").read_text())
    assert other["fingerprint"] != probed["fingerprint"]
    assert other["counts"]["num_graded"] == NUM_HARD + NUM_EASY
    assert not other["outputs"].keys() & probed["outputs"].keys()


def test_what_comes_after_the_filter_says_what_to_run(run):
    """A band that was set for `train` alone would be ignored, or end in a missing file."""
    run()
    with pytest.raises(RecipeError, match=r"has no probe for this recipe: .*Run `stillhouse filter`"):
        run(BAND, "select.student_samples=2", commands=["train"])


def test_topics_share_the_rows_equally(run):
    """A set with three easy problems for each hard one would be trained on as it comes."""
    store = run()
    everything = kept_by_topic(store)
    assert everything["easy"] > 4
    assert everything["hard"] > 4
    store = run("select.max_examples=8", "select.balance=equal")
    assert kept_by_topic(store) == {"easy": 4, "hard": 4}
    dropped = [v for v in store.read("verdicts", Verdict) if v.check == "max_total"]
    assert any("train.jsonl hard" in v.evidence for v in dropped)
