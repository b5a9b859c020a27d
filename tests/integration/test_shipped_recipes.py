"""The shipped recipes for real models: their own loaders, settings and training on random models of the same architecture."""

from __future__ import annotations

import importlib.util
import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stillhouse.jobs.generators import build_generator
from stillhouse.jobs.progress import LineReporter
from stillhouse.jobs.recipe import Recipe, load_recipe, shipped_recipes
from stillhouse.jobs.recipe_teacher import EngineTeacher
from stillhouse.jobs.remote import base_arguments, make_examples
from stillhouse.jobs.run_state import RunState
from stillhouse.jobs.serve_llm import serving
from stillhouse.jobs.servers import engine_spec, ray_serve_arguments
from stillhouse.jobs.sources import load_problems, resolve_teacher, teacher_sampling, teacher_spec
from stillhouse.jobs.trace_plan import FixedPlan
from stillhouse.jobs.traces import TeacherRequests, ask_teacher, open_writer
from stillhouse.jobs.training import num_steps_of, train_worker
from stillhouse.kernels.linear import Linear4bit
from stillhouse.pipeline.errors import ClusterError
from stillhouse.pipeline.records import Completion, Example, Problem, Trace
from stillhouse.pipeline.store import RunStore
from stillhouse.pipeline.trace_store.budget import Budget
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.students.base_models import load_base
from stillhouse.teachers.local import TransformersGenerator
from stillhouse.teachers.tracing import make_trace, render_for_teacher, trace_requests
from tests.chat_server import ChatServer
from tests.tiny_models import make_model, make_tokenizer

TEMPLATES = Path(__file__).parents[1] / "golden" / "templates"
# What the published tokenizer of each model has: template, special tokens, EOS, pad, BOS.
FAMILIES = {
    "qwen2_5": (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>"], "<|endoftext|>", "<|endoftext|>", None),
    "llama3": (
        [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|finetune_right_pad_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ],
        "<|end_of_text|>",
        None,
        "<|begin_of_text|>",
    ),
    "r1_distill": (
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
    ),
}
# Architecture, template family, and whether the output head is the embedding, as the models' own config.json say.
STUDENTS = {
    "r1-qwen2.5-1.5b": ("Qwen2", "qwen2_5", True),
    "r1-distill-32b-llama-3.2-3b": ("Llama", "llama3", True),
    "qwq-qwen2.5-7b": ("Qwen2", "qwen2_5", False),
}
ENGINE_TEACHERS = {
    "r1-distill-32b-llama-3.2-3b": ("Qwen2", "r1_distill", False),
    "qwq-qwen2.5-7b": ("Qwen2", "qwen2_5", False),
}
# One step's work made small; everything else as shipped.
SMALL = ("train.tokens_per_step=1024", "train.max_length=1024", "teacher.sampling.max_new_tokens=16")


def _model_folder(folder: Path, architecture: str, family: str, tied: bool) -> Path:
    make_model(folder, architecture, tied=tied)
    special, eos, pad, bos = FAMILIES[family]
    template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8").rstrip("\n")
    tokenizer = make_tokenizer(template, special_tokens=special, eos_token=eos, pad_token=pad, bos_token=bos)
    tokenizer.save_pretrained(folder)
    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | ids))
    return folder


def _write_dataset(folder: Path, subset: str | None, rows: dict[str, list[dict]]) -> Path:
    """A folder laid out as on the hub: Parquet files by split, and a README that names the configurations."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    subset = subset or "default"
    (folder / subset).mkdir(parents=True)
    for split, content in rows.items():
        pq.write_table(pa.Table.from_pylist(content), folder / subset / f"{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {split}\n    path: {subset}/{split}-*\n" for split in rows)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n{files}---\n")
    return folder


OPEN_R1_ROWS = [
    {
        "problem": f"Find the value of $x$ if $x = {a} + \\frac{{{b}}}{{2}}$.",
        "solution": "Add the two.",
        "answer": f"{2 * a + b}/2",
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": f"{a}-{b}",
        "is_reasoning_complete": [True, False],
        "generations": ["<think>\nadd\n</think>\n\n\\boxed{1}", "<think>\nwrong"],
        "correctness_math_verify": [True, False],
        "correctness_llama": None,
        "finish_reasons": None,
        "correctness_count": 1,
        "messages": [{"content": "…", "role": "user"}],
    }
    for a, b in [(1, 3), (2, 5), (10, 7)]
]
MATH_500_ROWS = [
    {
        "problem": "Convert the point $(0,3)$ in rectangular coordinates to polar coordinates.",
        "solution": "We have that $r = 3$.",
        "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
        "subject": "Precalculus",
        "level": 2,
        "unique_id": "test/precalculus/807.json",
    },
    {
        "problem": "How many positive whole-number divisors does 196 have?",
        "solution": "Factor it.",
        "answer": "9",
        "subject": "Number Theory",
        "level": 3,
        "unique_id": "test/number_theory/572.json",
    },
]
GSM8K_ROWS = [
    {
        "question": f"Anna has {a} pens and buys {b} boxes of 4. How many pens has she?",
        "answer": f"{b} boxes hold {4 * b} = <<4*{b}={4 * b}>>{4 * b} pens.\n#### {a + 4 * b:,}",
    }
    for a, b in [(3, 2), (1000, 5)]
]


@pytest.fixture(scope="module")
def datasets_by_name(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("datasets")
    return {
        "open-r1/OpenR1-Math-220k": _write_dataset(root / "openr1", "default", {"train": OPEN_R1_ROWS}),
        "HuggingFaceH4/MATH-500": _write_dataset(root / "math", None, {"test": MATH_500_ROWS}),
        "openai/gsm8k": _write_dataset(root / "gsm8k", "main", {"train": GSM8K_ROWS[:1], "test": GSM8K_ROWS[1:]}),
    }


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_shipped_recipe_is_in_these_tests():
    """If it failed, a recipe would be shipped whose models nobody ever loaded."""
    assert set(shipped_recipes()) - {"demo", "pumps"} == set(STUDENTS)
    engines = {name for name in STUDENTS if isinstance(load_recipe(name).teacher, EngineTeacher)}
    assert engines == set(ENGINE_TEACHERS)


SMALL_PUMPS = (
    *("problems.train.0.limit=32", "problems.test.0.limit=8", "teacher.batch_size=32", "teacher.samples_per_problem=2"),
    *("train.num_steps=8", "train.tokens_per_step=1024", "gate.teacher_problems=8", "gate.max_new_tokens=96"),
    *(f"gate.{name}=null" for name in ("min_accuracy", "min_student_ratio", "min_gain", "max_drop", "min_think_closed")),
    *("gate.min_same_verdict=null", "gate.max_kernel_difference=null"),
    *("cluster.cpus_per_train_worker=1", "cluster.object_store_mb=100"),
)


@pytest.mark.slow
def test_pumps_runs_in_an_empty_folder_and_keeps_what_is_right(stillhouse, tmp_path):
    """If it failed, the recipe would not find its shipped questions, or the example would train on wrong volumes."""
    flags = [part for value in SMALL_PUMPS for part in ("--set", value)]
    done = stillhouse("run", "pumps", "--out", str(tmp_path / "run"), *flags)
    assert done.returncode == 0, done.stderr
    store = RunStore(tmp_path / "run")
    prompts = {problem.id: problem.prompt for problem in store.read("problems", Problem) if problem.split == "train"}
    assert len(prompts) == 32
    kept = store.read("kept", Trace)
    assert len(kept) >= 16  # the teacher is right most of the time
    for trace in kept:
        rate, minutes = re.findall(r"\d+", prompts[trace.problem_id])
        number, unit = re.search(r"\\boxed\{([\d.]+) \\text\{ (L|m)\}", trace.completion).groups()
        assert Fraction(number) * {"L": 1, "m": 1000}[unit] == int(rate) * int(minutes)


@pytest.mark.parametrize("name", STUDENTS)
def test_problems_are_read_from_the_published_columns(name, datasets_by_name, tmp_path, monkeypatch):
    """If it failed, a run would end at its first stage, or take a whole worked solution for the gold answer."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    shipped = load_recipe(name).problems
    folders = [
        f"problems.{split}.{number}.name={datasets_by_name[source.name]}"
        for split in ("train", "test")
        for number, source in enumerate(getattr(shipped, split))
    ]
    problems, removed, _ = load_problems(load_recipe(name, folders))
    assert sum(removed.values()) == 0
    answers = {problem.prompt: problem.answer for split in problems.values() for problem in split}
    expected = {row["problem"]: row["answer"] for row in (*OPEN_R1_ROWS, *MATH_500_ROWS)}
    if any(source.name == "openai/gsm8k" for source in shipped.train):
        expected |= {GSM8K_ROWS[0]["question"]: "11", GSM8K_ROWS[1]["question"]: "1,020"}
    assert answers == expected
    assert all(problem.kind == "math" and problem.split == split for split in problems for problem in problems[split])


PROBLEM = Problem("What is 3 + 4 - 2?", "5", "math", "hand", "train")


def _example_rows(recipe: Recipe, folder: Path) -> list[Example]:
    """Rows from traces written by hand, rendered as the recipe asks the student."""
    request, *_ = trace_requests(
        [PROBLEM],
        ["asked"],
        teacher=recipe.teacher.model,
        teacher_revision="",
        served="",
        sampling=teacher_sampling(recipe),
        samples_per_problem=1,
        seed=recipe.seed,
    )
    steps = [f"3 + 4 = 7{' and so' * extra}\n7 - 2 = 5" for extra in range(4)]
    traces: list[Trace] = [
        make_trace(
            request,
            Completion(f"<think>\n{text}\n</think>\n\n\\boxed{{5}}", "stop", 9, 30, 0),
            teacher=recipe.teacher.model,
            teacher_revision="",
            sampling=teacher_sampling(recipe),
            seconds=0.0,
        )
        for text in steps
    ]
    return make_examples(
        str(folder),
        None,
        [PROBLEM],
        traces,
        recipe.teacher.system_prompt,
        recipe.teacher.prompt_suffix,
        recipe.train.max_length,
    )


@pytest.mark.parametrize("name", STUDENTS)
def test_the_student_loads_and_trains_as_the_recipe_says(name, tmp_path, one_thread):
    """If it failed, a run would spend its teacher's money and then break when the student is loaded or trained."""
    folder = _model_folder(tmp_path / "model", *STUDENTS[name])
    recipe = load_recipe(name, [f"student.base_model={folder}", *SMALL])
    student, train = recipe.student.model_dump(mode="json"), recipe.train.model_dump(mode="json")

    base = load_base(student["base_model"], **base_arguments(student))
    packed = {name: module for name, module in base.named_modules() if isinstance(module, Linear4bit)}
    assert len(packed) == 2 * 7  # q, k, v, o, gate, up, down in each of two layers; the output head stays in 16 bits
    for module in packed.values():
        assert (module.format, module.block_size) == (student["base_weights"], student["block_size"])
        assert (module.nested_absmax is not None) == student["double_quant"]
    ids = torch.tensor([[1, 2, 3]])
    assert base(ids).logits.dtype == getattr(torch, student["dtype"])

    store = RunStore(tmp_path / "run")
    rows = _example_rows(recipe, folder)
    # Each with a key of its own, as traces of their own would have.
    rows = [Example(f"{number}", row.trace_key, row.problem_id, row.input_ids, row.labels, row.template_hash)
            for number, row in enumerate(rows)]  # fmt: skip
    store.add_shard("examples", Example, rows)
    settings = {
        "run": str(store.root),
        "folder": "training",
        "student": student,
        "train": train | {"num_steps": num_steps_of(train, sum(len(row.input_ids) for row in rows))},
        "seed": recipe.seed,
        "cpus": 1,
    }
    train_worker(settings)

    result = store.read_json("training/result.json")
    assert result["num_steps"] == settings["train"]["num_steps"] >= 1
    assert 0 < result["final_loss"] < 20
    adapter = load_file(store.path("training", "adapter", "adapter_model.safetensors"))
    lora_a = {name: tensor for name, tensor in adapter.items() if "lora_A" in name}
    lora_b = {name: tensor for name, tensor in adapter.items() if "lora_B" in name}
    assert len(lora_a) == len(lora_b) == len(packed)
    assert {tensor.shape[0] for tensor in lora_a.values()} == {recipe.student.lora.rank}
    # B starts at zero: any gradient that reached it shows.
    assert all(tensor.isfinite().all() and tensor.any() for tensor in lora_b.values())
    config = json.loads(store.path("training", "adapter", "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (recipe.student.lora.rank, recipe.student.lora.alpha)


def test_deepseek_r1_is_asked_over_its_endpoint(tmp_path, monkeypatch):
    """If it failed, the recipe for DeepSeek-R1 would not get a single trace out of an OpenAI-compatible endpoint."""
    name = "r1-qwen2.5-1.5b"
    key_variable = load_recipe(name).teacher.api_key_env
    monkeypatch.setenv(key_variable, "sk-of-the-test")
    model = TransformersGenerator(_model_folder(tmp_path / "model", "Qwen2", "r1_distill", False), dtype="float32")
    with ChatServer(model, shape="reasoning") as server:
        recipe = load_recipe(name, [f"teacher.base_url={server.base_url}", *SMALL])
        with RunState(recipe, RunStore(tmp_path / "run"), LineReporter(quiet=True)) as run:
            requests = TeacherRequests(run, [PROBLEM], samples=recipe.teacher.samples_per_problem, seed=recipe.seed)
            with open_writer(run, tmp_path / "traces", tmp_path / "spool", Budget()) as writer:
                asked, _ = ask_teacher(run, FixedPlan(requests, ()), writer, lambda _: None)
        bodies = [request.body for request in server.requests]
        assert {request.authorization for request in server.requests} == {"Bearer sk-of-the-test"}
    assert asked.reached is None
    assert not asked.refused
    assert len(bodies) == recipe.teacher.samples_per_problem
    for body in bodies:
        assert body["messages"] == [{"role": "user", "content": f"{PROBLEM.prompt}\n\n{recipe.teacher.prompt_suffix}"}]
        assert (body["model"], body["temperature"], body["top_p"]) == ("deepseek-ai/DeepSeek-R1", 0.6, 0.95)
    traces = list(TraceStore(tmp_path / "traces").traces())
    assert len(traces) == len(bodies)
    # The server splits what the model wrote; both halves come back as reasoning and answer of a closed think block.
    assert all(trace.reasoning and trace.answer_text for trace in traces)


def _traces(recipe: Recipe, generator, revision: str) -> list[Trace]:
    teacher, sampling = recipe.teacher, teacher_sampling(recipe)
    prompts = render_for_teacher(
        [PROBLEM.prompt],
        kind=teacher.kind,
        model=resolve_teacher(teacher.model),
        revision=teacher.revision,
        system_prompt=teacher.system_prompt,
        prompt_suffix=teacher.prompt_suffix,
        opens_think=teacher.opens_think,
    )
    names = {"teacher": teacher.model, "teacher_revision": revision, "sampling": sampling}
    requests = trace_requests(
        [PROBLEM], prompts, served="float32", samples_per_problem=teacher.samples_per_problem, seed=recipe.seed, **names
    )
    completions = generator.complete([r.rendered_prompt for r in requests], [r.seed for r in requests], sampling)
    return [make_trace(request, completion, seconds=0.0, **names) for request, completion in zip(requests, completions)]


@pytest.mark.parametrize("name", ENGINE_TEACHERS)
def test_an_engine_teacher_of_that_architecture_answers_in_process(name, tmp_path):
    """If it failed, the teacher's architecture, template or sampling could not be served by any of our generators."""
    folder = _model_folder(tmp_path / "model", *ENGINE_TEACHERS[name])
    shipped = load_recipe(name, SMALL).teacher.model_dump(mode="json")
    shared = ("samples_per_problem", "sampling", "system_prompt", "prompt_suffix", "opens_think", "dtype")
    teacher = {"kind": "transformers", "model": str(folder), **{key: shipped[key] for key in shared}}
    recipe = load_recipe(name, [f"teacher={json.dumps(teacher)}"])
    generator = build_generator(teacher_spec(recipe))
    assert isinstance(generator, TransformersGenerator)
    assert generator.model.dtype == getattr(torch, shipped["dtype"])

    traces = _traces(recipe, generator, "")
    assert len(traces) == recipe.teacher.samples_per_problem > 1
    assert len({trace.completion for trace in traces}) == len(traces)
    for trace in traces:
        # The published prompt: no system turn, the instruction behind the problem, one think block opened for the model.
        assert f"{PROBLEM.prompt}\n\n{recipe.teacher.prompt_suffix}" in trace.rendered_prompt
        assert trace.rendered_prompt.endswith("<think>\n")
        assert trace.rendered_prompt.count("<think>") == 1
        ids = generator.tokenizer.encode(trace.rendered_prompt, add_special_tokens=False)
        assert trace.num_prompt_tokens == len(ids)
        assert ids.count(generator.tokenizer.bos_token_id) == (1 if generator.tokenizer.bos_token_id is not None else 0)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed: its absence cannot be shown")
@pytest.mark.parametrize("name", ENGINE_TEACHERS)
def test_without_vllm_its_recipes_say_what_to_install(name):
    """If it failed, a run on a cluster without vLLM would end in an ImportError that names no remedy."""
    teacher = load_recipe(name).teacher
    needs_vllm = pytest.raises(ClusterError, match=r"pip install -e '\.\[vllm\]'")
    with needs_vllm as caught, serving(None, ray_serve_arguments(teacher), engine_spec(teacher)):
        pass
    assert caught.value.exit_code == 4
