"""A plan counts what the recipe says, follows its formulas, and names what is missing, without network or torch."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.jobs.estimates import CPU_CORE, GPUS, decoding_tokens_per_s, training_tokens_per_s
from stillhouse.jobs.model_facts import model_facts, weights_folder
from stillhouse.jobs.plan import plan, render_text
from stillhouse.jobs.recipe import load_recipe, shipped_recipes


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
    # 0.8 M parameters, LoRA, 300 steps of 4 k tokens in 92 s on two cores.
    tiny = model_facts("some/model-0.8M", role="students")
    two_cores = 2 * training_tokens_per_s(tiny, CPU_CORE, gradient_checkpointing=False)
    assert 300 * 4096 / 92 / 3 < two_cores < 300 * 4096 / 92 * 3


def test_training_tokens_follow_steps_or_epochs():
    """`epochs` and `num_steps` would be planned as if they were the same thing."""
    by_steps = stage(plan(load_recipe("demo", ["train.num_steps=7", "train.tokens_per_step=2048"])), "train")
    assert (by_steps.num_items, by_steps.num_tokens) == (7, 7 * 2048)
    planned = plan(load_recipe("demo", ["train.num_steps=null", "train.epochs=2"]))
    assert stage(planned, "train").num_tokens == 2 * stage(planned, "examples").num_tokens


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


def test_missing_things_are_named(empty_hub_cache, monkeypatch):
    """A run would stop at the first missing thing, and again at the next."""
    words = "\n".join(plan(load_recipe("r1-qwen2.5-1.5b")).missing)
    for expected in (
        "environment variable TOGETHER_API_KEY",
        f"data set open-r1/OpenR1-Math-220k is not in {empty_hub_cache}; downloaded on first use",
        "student's weights Qwen/Qwen2.5-1.5B (3 GB)",
    ):
        assert expected in words
    monkeypatch.setenv("TOGETHER_API_KEY", "x")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = "\n".join(plan(load_recipe("r1-qwen2.5-1.5b")).missing)
    assert "TOGETHER_API_KEY" not in words
    assert "HF_HUB_OFFLINE forbids the download" in words


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
    words = "\n".join(plan(load_recipe("r1-qwen2.5-1.5b")).missing)
    assert "Qwen2.5-1.5B" not in words


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
    for line in (*planned.assumptions, *planned.missing):
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
