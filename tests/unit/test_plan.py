"""A plan counts what the recipe says, follows its formulas, and names what is missing, without network or torch."""

import importlib.util
import json
import math
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.jobs import plan as planning
from stillhouse.jobs.estimates import GPUS, decoding_tokens_per_s
from stillhouse.jobs.model_facts import model_facts, weights_folder
from stillhouse.jobs.plan import plan, render_text
from stillhouse.jobs.recipe import load_recipe, shipped_recipes
from stillhouse.pipeline.safetensors_reader import read_safetensors_header


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TOGETHER_API_KEY", raising=False)
    return tmp_path / "hub"


def stage(planned, name):
    return next(stage for stage in planned.stages if stage.name == name)


def test_money_for_an_endpoint_is_tokens_times_price():
    """The plan would promise a bill that is not the endpoint's."""
    recipe = load_recipe("r1-qwen2.5-1.5b", ["problems.train.0.limit=1000", "teacher.samples_per_problem=4"])
    traces = stage(plan(recipe), "traces")
    assert traces.num_items == 4000
    output_tokens = 4000 * 16384 // 4
    assert traces.num_tokens == output_tokens + 4000 * 150
    assert traces.dollars == pytest.approx((output_tokens * 7.0 + 4000 * 150 * 3.0) / 1e6)
    assert traces.gpu_hours == 0


def test_more_work_costs_more():
    """A plan would not show what a larger recipe costs."""
    small = plan(load_recipe("qwq-qwen2.5-7b", ["problems.train.0.limit=1000"]))
    large = plan(load_recipe("qwq-qwen2.5-7b", ["problems.train.0.limit=2000"]))
    for name in ("traces", "train"):
        assert stage(large, name).gpu_hours == pytest.approx(2 * stage(small, name).gpu_hours, rel=0.02)
    assert stage(large, "validate") == stage(small, "validate")
    assert large.disk_bytes > small.disk_bytes


def test_replicas_share_the_hours():
    """Adding GPUs would look as if it cost more, or as if it did not save time."""
    one = stage(plan(load_recipe("qwq-qwen2.5-7b", ["teacher.replicas=1"])), "traces")
    two = stage(plan(load_recipe("qwq-qwen2.5-7b", ["teacher.replicas=2"])), "traces")
    assert two.gpu_hours == pytest.approx(one.gpu_hours)
    assert two.wall_hours == pytest.approx(one.wall_hours / 2)


def test_speeds_lie_where_published_measurements_do():
    """GPU hours would be wrong by more than the factor of two that the plan claims."""
    facts = model_facts("Qwen/QwQ-32B", role="teachers")
    # vLLM on H100s: 2,000 to 4,000 tok/s a GPU for 32 B models under load.
    per_gpu = decoding_tokens_per_s(facts, GPUS["H100"], batch_size=256, num_devices=2) / 2
    assert 1000 < per_gpu < 8000
    # The demo on two cores: 28 s for its traces, 170 to 215 s for its training, four times 5 s for its validation.
    planned = plan(load_recipe("demo"))
    for name, seconds in (("traces", 28), ("train", 190), ("validate", 20)):
        assert seconds / 2 < stage(planned, name).wall_hours * 3600 < seconds * 2


def test_shipped_models_are_measured_and_not_guessed():
    """The plan of the demo would say that nothing is known of the size of a model that lies beside it."""
    for role in ("teachers", "students"):
        facts = model_facts("tiny", role=role)
        (path,) = facts.folder.glob("*.safetensors")
        entries, _ = read_safetensors_header(path)
        in_file = sum(math.prod(entry.shape) for entry in entries)
        assert (facts.origin, facts.num_params) == ("config.json", pytest.approx(in_file, rel=0.01))
    planned = plan(load_recipe("demo"))
    assert not any("tiny" in line for line in planned.assumptions)
    assert (planned.missing, planned.downloads) == ((), ())


def test_batches_wait_for_their_longest_row():
    """The hours of a teacher in transformers would be those of an engine that fills finished rows' places."""
    short = stage(plan(load_recipe("demo", ["gate.max_new_tokens=192"])), "validate")
    long = stage(plan(load_recipe("demo", ["gate.max_new_tokens=1920"])), "validate")
    assert long.num_tokens == short.num_tokens
    assert long.wall_hours > 5 * short.wall_hours
    assert any("until its longest row ends" in line for line in plan(load_recipe("demo")).assumptions)


def test_training_tokens_follow_steps_or_epochs():
    """`epochs` and `num_steps` would be planned as if they were the same thing."""
    by_steps = stage(plan(load_recipe("demo", ["train.num_steps=7", "train.tokens_per_step=2048"])), "train")
    assert (by_steps.num_items, by_steps.num_tokens) == (7, 7 * 2048)
    planned = plan(load_recipe("demo", ["train.num_steps=null", "train.epochs=2"]))
    assert stage(planned, "train").num_tokens == 2 * stage(planned, "examples").num_tokens


def test_asking_the_base_student_is_planned_where_a_band_wants_it():
    """A band would cost as much as several evaluations, and the plan would not say so; or cost where there is none."""
    without = plan(load_recipe("demo"))
    assert "probe" not in [stage.name for stage in without.stages]
    planned = plan(load_recipe("demo", ["select.student_band=[0, 0.75]", "select.student_samples=8"]))
    names = [stage.name for stage in planned.stages]
    assert names[names.index("traces") : names.index("filter")] == ["traces", "probe"]
    probe, validate = stage(planned, "probe"), stage(planned, "validate")
    assert probe.num_items == 1800 * 8
    assert probe.num_tokens / probe.num_items == validate.num_tokens / validate.num_items == 192 // 4
    # 225 full batches of 64 beside 4 models of 6 batches, the last of them smaller.
    assert probe.wall_hours / validate.wall_hours == pytest.approx(225 / 24, rel=0.1)
    assert planned.wall_hours == pytest.approx(without.wall_hours + probe.wall_hours)
    assert "1,800 training problems, 8 samples each" in render_text(planned)
    assert any("bands of pass rates keep every problem" in line for line in planned.assumptions)


def test_local_files_are_counted(tmp_path):
    """A plan for one's own problems would be about a guessed number of them."""
    jsonl, parquet = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    jsonl.write_text("".join(json.dumps({"prompt": str(i), "answer": "1"}) + "\n" for i in range(7)) + "\n")
    pq.write_table(pa.table({"prompt": ["x"] * 5, "answer": ["1"] * 5}), parquet)
    sources = f"[{{source: file, path: {jsonl}}}, {{source: file, path: {parquet}, limit: 3}}]"
    planned = plan(load_recipe("demo", [f"problems.train={sources}", "teacher.samples_per_problem=1"]))
    assert stage(planned, "traces").num_items == 7 + 3
    gone = plan(load_recipe("demo", [f"problems.train=[{{source: file, path: {tmp_path}/gone.jsonl}}]"]))
    assert any("gone.jsonl does not exist" in line for line in gone.missing)
    assert f"{tmp_path}/gone.jsonl has 10,000 problems: the file is not there" in gone.assumptions
    gone = plan(load_recipe("demo", [f"problems.train=[{{source: dataset, name: {tmp_path}/gone, limit: 1}}]"]))
    assert f"the folder {tmp_path}/gone does not exist" in gone.missing
    assert f"{tmp_path}/gone (train) has 1 problem: the folder is not there" in gone.assumptions


def test_too_few_problems_are_said_before_the_run(tmp_path):
    """A run would pay for its traces and stop because no training row is left."""
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "1", "answer": "1"}) + "\n")
    sources = f"problems.train=[{{source: file, path: {tmp_path}/one.jsonl}}]"
    planned = plan(load_recipe("demo", [sources, "teacher.samples_per_problem=1"]))
    assert "too few problems: about 0 training rows would stay of 1 trace" in planned.missing


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "4 GPUs, used by the teacher and then by the training; this machine has 0"),
        (["cluster.train_workers=2"], "4 GPUs for the teacher and then 2 for the training; this machine has 0"),
        (["cluster.gpus_per_train_worker=0.0"], "4 GPUs for the teacher; this machine has 0"),
    ],
)
def test_gpus_that_take_turns_are_not_added_up(overrides, says, monkeypatch):
    """Someone would rent eight GPUs for a recipe that uses four."""
    monkeypatch.setattr(planning, "_local_gpu", lambda: (0, ""))
    lines = [line for line in plan(load_recipe("qwq-qwen2.5-7b", overrides)).missing if "GPU" in line and "machine" in line]
    assert len(lines) == 1
    assert lines[0].startswith(says)


def test_one_of_a_thing_is_singular_and_little_is_not_a_power_of_ten():
    """The text would read `1 replicas of 1 GPUs` and `1.13e-06` GPU hours."""
    one = ["problems.train.0.limit=2", "teacher.replicas=1", "teacher.tensor_parallel=1"]
    recipe = load_recipe("qwq-qwen2.5-7b", one)
    text = render_text(plan(recipe))
    assert "1 replica of 1 GPU\n" in text
    one_step = render_text(plan(load_recipe("demo", ["train.num_steps=1", "cluster.num_teacher_actors=1"])))
    assert "1 step of 4,096 tokens" in one_step
    assert "1 actor of 1 CPU\n" in one_step
    assert "1 sample each" in one_step
    assert "e-0" not in text + one_step
    assert "(s)" not in text + one_step
    small = render_text(plan(load_recipe("demo", ["cluster.gpus_per_train_worker=1.0", "train.num_steps=1"])))
    assert "<0.01" in small


def test_missing_things_are_named(empty_hub_cache, monkeypatch):
    """A run would stop at the first missing thing, and again at the next."""
    planned = plan(load_recipe("r1-qwen2.5-1.5b"))
    assert any("environment variable TOGETHER_API_KEY" in line for line in planned.missing)
    downloads = (
        f"the data set open-r1/OpenR1-Math-220k: not in {empty_hub_cache}",
        f"the student's weights Qwen/Qwen2.5-1.5B (3 GB): not in {empty_hub_cache}",
    )
    assert set(downloads) <= set(planned.downloads)
    assert not any("not in" in line for line in planned.missing)
    monkeypatch.setenv("TOGETHER_API_KEY", "x")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = "\n".join(plan(load_recipe("r1-qwen2.5-1.5b")).missing)
    assert "TOGETHER_API_KEY" not in words
    assert all(f"{line}, and HF_HUB_OFFLINE forbids the download" in words for line in downloads)


def test_a_missing_vllm_comes_with_a_command_that_works(monkeypatch):
    """A user would install an extra from an index that does not have this package."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    missing = plan(load_recipe("qwq-qwen2.5-7b")).missing
    assert "vllm is not installed; from the clone: .venv/bin/pip install -e '.[vllm]'" in missing


def test_cached_weights_are_found_and_measured(empty_hub_cache):
    """A model that is there would be reported missing, or its size taken from a guess."""
    snapshot = empty_hub_cache / "models--Qwen--Qwen2.5-1.5B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    # Qwen2.5-1.5B's published config; its card says 1.54 B parameters, 1.31 B without embedding.
    config = {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    (snapshot / "config.json").write_text(json.dumps(config))
    assert weights_folder("Qwen/Qwen2.5-1.5B", role="students") is None
    (snapshot / "model.safetensors").write_bytes(b"")
    facts = model_facts("Qwen/Qwen2.5-1.5B", role="students")
    assert (facts.folder, facts.origin) == (snapshot, "config.json")
    assert facts.num_params == pytest.approx(1.54e9, rel=0.01)
    assert facts.num_params - facts.num_embedding_params == pytest.approx(1.31e9, rel=0.01)
    planned = plan(load_recipe("r1-qwen2.5-1.5b"))
    assert not any("Qwen2.5-1.5B" in line for line in (*planned.missing, *planned.downloads))


@pytest.mark.parametrize(
    ("name", "params", "origin"),
    [
        ("deepseek-ai/DeepSeek-R1", 671e9, "published"),
        ("meta-llama/Llama-3.2-3B", 3.2e9, "published"),
        ("someone/New-Model-14B-Chat", 14e9, "name"),
        ("someone/Llama-3.1-405B", 405e9, "name"),
        ("someone/mystery", 7e9, "guess"),
    ],
)
def test_sizes_of_models_that_are_not_here(name, params, origin):
    """A plan for a model that is not downloaded yet would be about another size, without saying so."""
    facts = model_facts(name, role="teachers")
    assert facts.num_params == pytest.approx(params, rel=0.01)
    assert facts.origin == origin


def test_guessed_sizes_are_stated():
    """A figure that rests on a guess would look like a known one."""
    planned = plan(load_recipe("qwq-qwen2.5-7b", ["student.base_model=someone/mystery"]))
    assert any("someone/mystery has 7 B parameters: nothing is known of its size" in line for line in planned.assumptions)


def test_teacher_that_does_not_fit_is_named():
    """A 32 B teacher would be started on one 80 GB GPU with no room for its cache."""
    fits = plan(load_recipe("qwq-qwen2.5-7b"))
    tight = plan(load_recipe("qwq-qwen2.5-7b", ["teacher.tensor_parallel=1"]))
    assert not any("raise teacher.tensor_parallel" in line for line in fits.missing)
    assert any("raise teacher.tensor_parallel" in line for line in tight.missing)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_text_shows_stages_totals_assumptions_and_what_is_missing(name):
    """`stillhouse plan` would leave out a stage, the total or what to do first."""
    planned = plan(load_recipe(name))
    text = render_text(planned)
    for row in ("problems", "traces", "filter", "examples", "train", "quantize", "validate", "report", "in all"):
        assert any(line.startswith(row) for line in text.splitlines())
    for line in (*planned.assumptions, *planned.missing, *planned.downloads):
        assert f"  - {line}" in text
    assert planned.dollars == pytest.approx(sum(stage.dollars for stage in planned.stages))


def test_planning_imports_neither_torch_nor_ray():
    """`stillhouse plan` would take seconds and gigabytes to print a table."""
    code = (
        "import sys; from stillhouse.jobs.plan import plan; from stillhouse.jobs.recipe import load_recipe\n"
        "plan(load_recipe('demo')); import os, glob, shutil\n"
        "gpu = glob.glob('/dev/nvidia[0-9]*') or shutil.which('nvidia-smi')\n"
        "assert 'ray' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert gpu or 'torch' not in sys.modules\n"
        "print('light')"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert answer.stdout.strip() == "light", answer.stderr
