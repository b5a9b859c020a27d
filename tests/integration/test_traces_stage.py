"""The traces stage of real recipes, in this process: fixed and adaptive sampling, budgets, replay, an older version's run."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests

from stillhouse.jobs.cli.traces import store_root
from stillhouse.jobs.progress import LineReporter
from stillhouse.jobs.recipe import load_recipe
from stillhouse.jobs.runner import run_recipe
from stillhouse.jobs.sources import resolve_teacher
from stillhouse.jobs.status import read_status, status_text
from stillhouse.pipeline.errors import TeacherError
from stillhouse.pipeline.records import Planned, Problem, Trace, to_table
from stillhouse.pipeline.store import RunStore
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.pipeline.verification import verify
from stillhouse.teachers.local import TransformersGenerator
from tests.chat_server import ChatServer, status
from tests.s3_server import running_s3

NUM_PROBLEMS = 6
RECIPE = """
name: small
problems:
  train: [{source: reasoning_gym, task: products, size: 6, seed: 8000000, options: {min_digits: 2, max_digits: 2}}]
  test: [{source: reasoning_gym, task: products, size: 2, seed: 9000000, options: {min_digits: 2, max_digits: 2}}]
teacher:
  kind: endpoint
  base_url: BASE_URL
  model: tiny
  samples_per_problem: 2
  sampling: {temperature: 0.6, top_p: 0.95, max_new_tokens: 160}
  opens_think: false
  price_per_million_input_tokens: 1000
  price_per_million_output_tokens: 2000
  max_concurrent: 4
student: {base_model: tiny, base_weights: int4, dtype: float32}
train: {learning_rate: 4e-3, num_steps: 4, tokens_per_step: 1024, max_length: 512}
"""


@pytest.fixture(scope="module")
def model() -> TransformersGenerator:
    return TransformersGenerator(resolve_teacher("tiny"), dtype="float32")


@pytest.fixture
def server(model):
    with ChatServer(model) as running:
        yield running


@pytest.fixture
def generate(server, tmp_path):
    """Generate into ``tmp_path / "run"`` with overrides; gives the counts of the traces stage."""
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.replace("BASE_URL", server.base_url))

    def call(*overrides: str) -> dict[str, float]:
        run = tmp_path / "run"
        run_recipe(load_recipe(path, overrides), run, LineReporter(quiet=True), command="generate")
        return json.loads((run / "stages" / "traces.json").read_text())["counts"]

    return call


def test_planned_traces_are_asked_for_once_and_priced(generate, server, tmp_path):
    """A second start would pay again, or the report would not say what the traces cost."""
    counts = generate()
    assert counts["num_traces"] == counts["num_answered"] == len(server.requests) == 2 * NUM_PROBLEMS
    traces = list(TraceStore(tmp_path / "run" / "traces").traces())
    assert counts["dollars"] == pytest.approx(sum(trace.dollars for trace in traces))
    assert counts["dollars"] == pytest.approx(counts["prompt_tokens"] * 1e-3 + counts["completion_tokens"] * 2e-3)
    assert generate("teacher.max_concurrent=2") == counts
    assert len(server.requests) == 2 * NUM_PROBLEMS
    # Another number of samples keeps what is paid for.
    assert generate("teacher.samples_per_problem=3")["num_traces"] == 3 * NUM_PROBLEMS
    assert len(server.requests) == 3 * NUM_PROBLEMS


def test_adaptive_sampling_stops_at_the_first_verified_trace(generate, server, tmp_path):
    """Every problem would be drawn as often as allowed, and paid for."""
    counts = generate("teacher.samples_per_problem=1", "teacher.adaptive={verified: 1, max_samples: 8}")
    run = RunStore(tmp_path / "run")
    problems = {problem.id: problem for problem in run.read("problems", Problem)}
    traces = list(TraceStore(tmp_path / "run" / "traces").traces())
    assert len(traces) == counts["num_traces"] == len(server.requests) < 8 * NUM_PROBLEMS
    by_problem: dict[str, list[bool]] = {}
    for trace in sorted(traces, key=lambda trace: trace.sample_index):
        answer = (trace.answer_text or "").removeprefix("\\boxed{").removesuffix("}")
        right = trace.finish_reason == "stop" and verify(problems[trace.problem_id], answer).outcome == "correct"
        by_problem.setdefault(trace.problem_id, []).append(right)
    assert len(by_problem) == NUM_PROBLEMS
    assert sum(any(drawn) for drawn in by_problem.values()) == counts["num_problems_enough"] >= NUM_PROBLEMS - 2
    # Batches double while nothing is verified: no draw follows a batch that had a verified one.
    assert all(not any(drawn[: len(drawn) // 2]) for drawn in by_problem.values())
    before = len(server.requests)
    (tmp_path / "run" / "stages" / "traces.json").unlink()
    assert generate("teacher.samples_per_problem=1", "teacher.adaptive={verified: 1, max_samples: 8}") == counts | {
        "seconds": pytest.approx(counts["seconds"], abs=60)
    }
    assert len(server.requests) == before


def test_a_budget_stops_the_asking_and_not_the_run(generate, server, tmp_path):
    """A run would spend what nobody allowed, or throw away what the money bought."""
    cap = 2.0
    counts = generate(f"teacher.budget.max_dollars={cap}")
    assert counts["budget_reached"] == 1
    assert 0 < counts["num_traces"] == len(server.requests) < 2 * NUM_PROBLEMS
    assert counts["dollars"] + counts["dollars_lost"] <= cap
    # Not one more would have fitted: the longest prompt's bytes and its template, and all the tokens that may be written.
    longest = max(len(json.dumps(request.body["messages"])) for request in server.requests)
    assert counts["dollars"] + (longest + 256) * 1e-3 + 160 * 2e-3 > cap
    status_of = read_status(tmp_path / "run")
    assert status_of.caps == {"max_dollars": cap}
    assert f"budget  ${counts['dollars']:,.2f} of max_dollars=2" in status_text(status_of)
    more = generate("teacher.budget.max_dollars=1000")
    assert (more["budget_reached"], more["num_traces"]) == (0, 2 * NUM_PROBLEMS)
    assert len(server.requests) == 2 * NUM_PROBLEMS


def test_a_key_from_a_file_reaches_the_endpoint_and_nothing_else(generate, server, tmp_path):
    """A mounted secret would not work, or lie in the run's folder for everybody to read."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("sk-canary-71c\n")
    generate("teacher.api_key_file=" + str(tmp_path / "secret" / "key"))
    assert {request.authorization for request in server.requests} == {"Bearer sk-canary-71c"}
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"canary-71c" not in path.read_bytes(), path


def test_a_refusal_keeps_what_was_answered(generate, server, tmp_path):
    """A key that runs out of credit would cost everything that was paid before."""
    server.fault_for_all = status(402, text="out of credit")
    server.faults = [lambda handler, body: handler.send_text(200, json.dumps(handler.completion(body)))] * 5
    with pytest.raises(TeacherError, match=r"402.*out of credit"):
        generate()
    assert len(list(TraceStore(tmp_path / "run" / "traces").traces())) == 5
    server.fault_for_all = None
    before = len(server.requests)
    assert generate()["num_traces"] == 2 * NUM_PROBLEMS
    assert len(server.requests) == before + 2 * NUM_PROBLEMS - 5


def test_one_refused_prompt_is_left_out_and_said(generate, server, tmp_path, capsys):
    """One prompt that is too long for the teacher would end the run, at every start again."""
    server.faults = [status(400, text="prompt too long")]
    counts = generate()
    assert (counts["num_refused"], counts["num_traces"]) == (1, 2 * NUM_PROBLEMS - 1)
    (tmp_path / "run" / "stages" / "traces.json").unlink()
    server.fault_for_all = status(400, text="no such model")
    server.faults = []
    before = len(server.requests)
    with pytest.raises(TeacherError, match=r"400.*no such model"):
        generate("seed=7")
    assert len(server.requests) < before + 2 * NUM_PROBLEMS


def test_traces_can_be_kept_in_an_object_store(generate, server, tmp_path, monkeypatch, capsys):
    """A team could not share its traces, or they would die with the driver's disk."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "canary-s3-19",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with running_s3() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        assert requests.put(f"http://127.0.0.1:{port}/team", timeout=30).ok
        counts = generate("teacher.store=s3://team/traces")
        assert counts["num_traces"] == TraceStore("s3://team/traces").num_rows == 2 * NUM_PROBLEMS
        (tmp_path / "run" / "stages" / "traces.json").unlink()
        # Another run, of another folder, finds what is paid for.
        (tmp_path / "run").rename(tmp_path / "moved")
        assert generate("teacher.store=s3://team/traces")["num_traces"] == 2 * NUM_PROBLEMS
        assert len(server.requests) == 2 * NUM_PROBLEMS
        assert store_root(str(tmp_path / "run")) == "s3://team/traces"
        assert read_status(tmp_path / "run").num_traces == 2 * NUM_PROBLEMS
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"canary-s3" not in path.read_bytes(), path


def test_a_run_of_the_first_version_goes_on_with_its_traces(generate, server, tmp_path):
    """An update of Stillhouse would make a run pay for all of its traces again."""
    counts = generate()
    run = tmp_path / "run"
    rows = list(TraceStore(run / "traces").traces())
    # The first version's folder: one Parquet file a batch with the columns of then, and a JSON file a batch handed out.
    import shutil

    shutil.rmtree(run / "traces")
    (run / "traces" / "ledger").mkdir(parents=True)
    columns = [name for name in to_table(Trace, []).column_names if name not in V2_COLUMNS]
    table = to_table(Trace, rows[:-2]).select(columns)
    old = pa.table(table.columns, schema=table.schema.with_metadata({"stillhouse.schema_version": "1"}))
    pq.write_table(old, run / "traces" / f"part-{'0' * 24}.parquet")
    entry = {"keys": [trace.key for trace in rows]}
    (run / "traces" / "ledger" / "00000001-x.json").write_text(json.dumps(entry))
    (run / "stages" / "traces.json").unlink()
    before = len(server.requests)
    assert generate()["num_traces"] == counts["num_traces"]
    assert len(server.requests) == before + 2
    assert {t.key for t in TraceStore(run / "traces").traces()} == {t.key for t in rows}


V2_COLUMNS = ("dollars", "usage_counted", "sampling_extras", "response_id", "served_model", "logprobs", "origin")


def test_replayed_traces_are_problems_and_traces_of_the_run(tmp_path):
    """A data set of paid traces could not be filtered and trained on like one's own."""
    rows = [
        {"prompt": f"What is {n} + 1?", "answer": str(n + 1), "completion": f"<think>\nadd\n</think>\n\n\\boxed{{{n + 1}}}"}
        for n in range(5)
    ]
    rows += [{"prompt": "What is 0 + 1?", "answer": "1", "completion": "<think>\nadd again\n</think>\n\n\\boxed{7}"}]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = "{kind: replay, layout: jsonl, path: old.jsonl, model: somebody}"
    text = RECIPE[: RECIPE.index("teacher:")] + f"teacher: {teacher}\n" + RECIPE[RECIPE.index("student:") :]
    train = text[text.index("  train:") : text.index("  test:")]
    (tmp_path / "replay.yaml").write_text(text.replace(train, "  train: []\n"))
    recipe = load_recipe(tmp_path / "replay.yaml")
    for _ in range(2):
        run_recipe(recipe, tmp_path / "run", LineReporter(quiet=True), command="generate")
        (tmp_path / "run" / "stages" / "traces.json").unlink()
    traces = list(TraceStore(tmp_path / "run" / "traces").traces())
    assert len(traces) == TraceStore(tmp_path / "run" / "traces").num_rows == 6
    assert {trace.teacher for trace in traces} == {"somebody"}
    assert {trace.origin for trace in traces} == {f"old.jsonl#{number}" for number in range(1, 7)}
    run = RunStore(tmp_path / "run")
    train = [problem.id for problem in run.read("problems", Problem) if problem.split == "train"]
    assert len(train) == 5
    assert {row.problem_id for row in run.read("planned", Planned)} == set(train)
