"""A recipe reads as written, and every mistake in one is answered by one sentence that names the key."""

import json
import pickle
from pathlib import Path

import jsonschema
import pytest
import yaml

from stillhouse.jobs.recipe import Recipe, load_recipe, recipe_json_schema, shipped_recipes
from stillhouse.pipeline.errors import ExitCode, RecipeError

MINIMAL = """
name: mine
problems:
  train: [{source: file, path: data/train.jsonl}]
  test: [{source: reasoning_gym, task: chain_sum, size: 5, seed: 2}]
teacher:
  {kind: transformers, model: ./teacher, sampling: {temperature: 0.6, top_p: 0.95, max_new_tokens: 2048}, opens_think: true}
student: {base_model: tiny}
train: {learning_rate: 1e-4, num_steps: 10}
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(path, *overrides):
    """The sentence that a recipe is refused with; it has to be one line, and the exit code that of a usage error."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == ExitCode.USAGE
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_load(name):
    """A recipe that `stillhouse recipes` lists could not be run, or would write into a folder of another name."""
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description == shipped_recipes()[name] != ""


def test_shipped_recipes_are_the_documented_ones():
    """A recipe named in the README would not be there."""
    assert set(shipped_recipes()) == {"demo", "pumps", "r1-qwen2.5-1.5b", "r1-distill-32b-llama-3.2-3b", "qwq-qwen2.5-7b"}


@pytest.mark.parametrize("name", ["r1-qwen2.5-1.5b", "r1-distill-32b-llama-3.2-3b", "qwq-qwen2.5-7b"])
def test_known_teachers_are_sampled_as_published(name):
    """DeepSeek-R1 and QwQ loop or skip thinking when they are sampled in another way than their cards ask for."""
    teacher = load_recipe(name).teacher
    assert (teacher.sampling.temperature, teacher.sampling.top_p) == (0.6, 0.95)
    assert teacher.system_prompt is None
    assert teacher.opens_think
    assert teacher.prompt_suffix == r"Please reason step by step, and put your final answer within \boxed{}."


def test_a_known_teacher_brings_its_published_settings(minimal):
    """QwQ sampled by anybody's defaults loops; and what the recipe says would not stand before what is published."""
    recipe = load_recipe(minimal, ["teacher={kind: vllm, model: Qwen/QwQ-32B, sampling: {max_new_tokens: 9000}}"])
    sampling = recipe.teacher.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens) == (0.6, 0.95, 40, 9000)
    assert recipe.teacher.opens_think
    local = load_recipe(minimal, ["teacher={kind: transformers, model: ./tuned, like: Qwen/Qwen3-8B, prompt_suffix: ''}"])
    assert (local.teacher.sampling.top_k, local.teacher.prompt_suffix, local.teacher.opens_think) == (20, "", False)
    assert "no known teacher" in refusal(minimal, "teacher={kind: transformers, model: m, like: acme/none}")


@pytest.mark.parametrize(
    ("model", "expected"),
    [("acme/thinker", "not among the known ones, whose"), ("deepseek-reasoner", "has served R1, R1-0528")],
)
def test_an_unknown_teacher_needs_its_settings_said(minimal, model, expected):
    """A guess at a teacher's sampling would be paid for by the token."""
    sentence = refusal(minimal, f"teacher={{kind: endpoint, base_url: 'https://a.example/v1', model: {model}}}")
    for key in (
        "teacher.sampling.temperature",
        "teacher.sampling.top_p",
        "teacher.sampling.max_new_tokens",
        "teacher.opens_think",
    ):
        assert key in sentence
    assert expected in sentence


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        (
            "kind: vllm, model: Qwen/QwQ-32B, engine_python: /x/python, pipeline_parallel: 2",
            "needs kind=vllm with through=ray_serve",
        ),
        ("kind: sglang, model: Qwen/QwQ-32B, through: ray_serve", "has through=ray_serve"),
        ("kind: vllm, model: Qwen/QwQ-32B, budget: {max_dollars: 5}", "use max_hours"),
        ("kind: endpoint, base_url: 'http://a', model: Qwen/QwQ-32B, budget: {max_dollars: 5}", "and no price"),
        (
            "kind: vllm, model: Qwen/QwQ-32B, samples_per_problem: 2, adaptive: {verified: 1}",
            "adaptive and samples_per_problem",
        ),
        ("kind: vllm, model: Qwen/QwQ-32B, adaptive: {verified: 9, max_samples: 8}", "asks for 9 verified traces"),
        ("kind: replay, layout: open_r1", "needs exactly one of path and name"),
        ("kind: replay, layout: open_r1, path: x.parquet", "problems.train has to be empty"),
    ],
)
def test_a_teachers_settings_that_contradict_each_other_are_refused(minimal, teacher, expected):
    """A cluster would be paid for before the run finds out that its teacher cannot be started or capped like that."""
    assert expected in refusal(minimal, f"teacher={{{teacher}}}")


def test_actors_that_contradict_an_engines_replicas_are_refused(minimal):
    """The recipe would say four GPUs in one place and two in another, and one of them would be ignored."""
    qwq = "teacher={kind: vllm, model: Qwen/QwQ-32B, tensor_parallel: 2, replicas: 2}"
    assert "cluster.gpus_per_teacher_actor=1 contradicts" in refusal(minimal, qwq, "cluster.gpus_per_teacher_actor=1")
    assert load_recipe(minimal, [qwq, "cluster.gpus_per_teacher_actor=2"]).teacher.num_gpus == 2


@pytest.mark.parametrize(
    ("name", "hidden_size", "power"),
    [("r1-qwen2.5-1.5b", 1536, 0.0775), ("r1-distill-32b-llama-3.2-3b", 3072, 0.781), ("qwq-qwen2.5-7b", 3584, 0.0775)],
)
def test_learning_rates_follow_the_formula_they_cite(name, hidden_size, power):
    """A shipped recipe would train at a rate that its own comment does not give."""
    assert load_recipe(name).train.learning_rate == pytest.approx(5e-4 * (2000 / hidden_size) ** power, rel=0.01)


def test_resolved_recipe_reads_back_equal(minimal, tmp_path, monkeypatch):
    """The recipe written beside a run's outputs could not repeat the run, from another folder least of all."""
    for source in [minimal, *shipped_recipes()]:
        recipe = load_recipe(source)
        elsewhere = tmp_path / "elsewhere" / "resolved.yaml"
        elsewhere.parent.mkdir(exist_ok=True)
        elsewhere.write_text(recipe.to_yaml())
        monkeypatch.chdir(tmp_path)
        assert load_recipe(elsewhere) == recipe


def test_recipes_are_frozen_and_picklable(minimal):
    """A stage could change the recipe behind the others' backs, or Ray could not send it to a worker."""
    recipe = load_recipe(minimal)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.num_steps = 3
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_relative_paths_start_at_the_recipe_or_at_the_command_line(minimal, tmp_path, monkeypatch):
    """A recipe would read other files when it is started from another folder; an override would not mean what a shell means."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    recipe = load_recipe(minimal, ["student.base_model=./student"])
    assert recipe.problems.train[0].path == str(minimal.parent / "data/train.jsonl")
    assert recipe.teacher.model == str(minimal.parent / "teacher")
    assert recipe.student.base_model == str(cwd / "student")
    remote = load_recipe(minimal, ["problems.train.0.path=s3://bucket/a.jsonl", "student.base_model=Qwen/Qwen2.5-7B"])
    assert remote.problems.train[0].path == "s3://bucket/a.jsonl"
    assert remote.student.base_model == "Qwen/Qwen2.5-7B"


def test_overrides_take_yaml_values_in_order(minimal):
    """`--set` would not reach a list, a nested key or a whole section, or would read 1e-4 as text."""
    recipe = load_recipe(
        minimal,
        [
            "train.learning_rate=2e-3",
            "train.num_steps=null",
            "train.epochs=2",
            "train.epochs=3",
            "student.lora.rank=16",
            "student.lora.target_modules=[q_proj, v_proj]",
            "problems.train.0={source: dataset, name: openai/gsm8k, subset: main, answer_after: '#### '}",
            "problems.test.0.size=7",
        ],
    )
    assert (recipe.train.learning_rate, recipe.train.epochs, recipe.train.num_steps) == (2e-3, 3, None)
    assert (recipe.student.lora.rank, recipe.student.lora.target_modules) == (16, ("q_proj", "v_proj"))
    assert recipe.problems.train[0].answer_after == "#### "
    assert recipe.problems.test[0].size == 7


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rte=3", "train.learning_rte is not a recipe key; did you mean train.learning_rate?"),
        ("problems.test.0.sise=3", "problems.test.0.sise is not a recipe key; did you mean problems.test.0.size?"),
        ("student.lora.ranc=3", "student.lora.ranc is not a recipe key; did you mean student.lora.rank?"),
        ("teacher.sampling.temprature=1", "did you mean teacher.sampling.temperature?"),
        ("stduent.base_model=x", "stduent is not a recipe key; did you mean student?"),
        ("zzz=1", "zzz is not a recipe key; a recipe has the keys name, description, seed, problems,"),
    ],
)
def test_unknown_keys_name_the_path_and_the_nearest_key(minimal, override, expected):
    """A typing error would be ignored, and the run would take hours with the default instead."""
    assert expected in refusal(minimal, override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.num_steps=ten", "train.num_steps: expected a whole number, got 'ten'"),
        ("train.num_steps=true", "train.num_steps: expected a whole number, got true"),
        ("select.student_band=[0, 1.5]", "select.student_band.1: expected a number of at most 1, got 1.5"),
        ("select.student_band=[0.5]", "select.student_band"),
        ("train.num_steps=1.5", "train.num_steps: expected a whole number, got 1.5"),
        ("train.num_steps=0", "train.num_steps: expected a number of at least 1, got 0"),
        ("train.learning_rate=", "train.learning_rate: expected a number, got nothing"),
        ("train.learning_rate=.nan", "train.learning_rate: expected a finite number, got nan"),
        ("train.scheduler=cos", "train.scheduler: expected 'one_cycle', 'cosine' or 'constant', got 'cos'"),
        ("student.base_weights=int8", "student.base_weights: expected 'int4', 'nf4', 'bitsandbytes' or 'bf16', got 'int8'"),
        ("student.lora.target_modules=3", "student.lora.target_modules: expected 'all-linear' or a list, got 3"),
        ("student.lora.target_modules=[3]", "expected 'all-linear' or a list of text, got a list of 1"),
        ("problems.train.0=7", "problems.train.0: expected keys and values, got 7"),
        ("problems.test.0.options=3", "problems.test.0.options: expected keys and values, got 3"),
        ("problems.test.0.source=web", "problems.test.0.source: expected one of 'reasoning_gym', 'file', 'dataset', got 'web'"),
        (
            "teacher.kind=oracle",
            "teacher.kind: expected one of 'transformers', 'vllm', 'sglang', 'transformers_serve', 'llama_cpp', 'endpoint',",
        ),
        ("filters=", "filters: expected keys and values, got nothing"),
        ("name=my run", "name: expected letters, digits, dots and dashes, got 'my run'"),
    ],
)
def test_wrong_values_name_path_expectation_and_value(minimal, override, expected):
    """The user would get a traceback, or a value silently turned into another."""
    assert expected in refusal(minimal, override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=2", "train needs exactly one of num_steps and epochs; got both; set one of them to null"),
        ("train.num_steps=null", "train needs exactly one of num_steps and epochs; got neither"),
        ("select.per_problem=2", "select.per_problem=2 asks for more than teacher.samples_per_problem=1 draws"),
        ("select.student_band=[0.75, 0.5]", "select student_band=[0.75, 0.5] keeps nothing: the lowest share is above"),
        ("select.teacher_band=[1, 0]", "select teacher_band=[1.0, 0.0] keeps nothing"),
        ("select.student_band=[0.3, 0.4]", "select student_band=[0.3, 0.4] keeps nothing: no share of 4 answers lies in it"),
        ("select={student_band: [0, 0.5], student_temperature: 0.0}", "student_temperature=0 gives the same answer 4 times"),
        ("filters={min_tokens: 9, max_tokens: 8}", "filters keeps nothing: max_tokens=8 is below min_tokens=9"),
        ("problems.train=[]", "problems.train: expected a list with at least one item, got a list of 0"),
        ("train.tokens_per_step=100", "max_length=32768 does not fit tokens_per_step=100"),
        (
            "problems.train=[{source: reasoning_gym, task: chain_sum, size: 9, seed: 2}]",
            "uses task chain_sum with seed 2 in train and in test; give each split a seed of its own",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(minimal, override, expected):
    """A run would stop hours later, or test on the problems that it was trained on."""
    assert expected in refusal(minimal, override)


def test_missing_keys_are_named_together(tmp_path):
    """The user would have to start once for each forgotten key."""
    path = tmp_path / "short.yaml"
    path.write_text("name: short\nproblems: {test: [{task: x}]}\nteacher: {kind: endpoint, model: m}\ntrain: {}\n")
    sentence = refusal(path)
    for key in (
        "teacher.sampling.temperature",
        "teacher.opens_think",
        "problems.test.0.source",
        "teacher.base_url",
        "student",
        "train.learning_rate",
    ):
        assert key in sentence


def test_duplicate_keys_are_refused_with_their_lines(minimal):
    """YAML would silently take the last of two settings."""
    minimal.write_text(MINIMAL + "  num_steps: 3\n".lstrip() + "name: other\n")
    assert "the key 'name' stands twice, in lines 2 and 11" in refusal(minimal)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected keys and values at the top level (name, problems, …), got nothing"),
        ("- a\n- b\n", "expected keys and values at the top level (name, problems, …), got a list of 2"),
        ("name: [1\n", "not valid YAML in line 2, column 1"),
        ("a: &x {b: *x}\n", "found unconstructable recursive node"),
        ("2026-01-01: x\n", "not a tree of keys and values"),
        ("name: !!python/object/apply:os.system ['true']\n", "not valid YAML in line 1"),
    ],
)
def test_files_that_are_no_recipe_are_refused(tmp_path, text, expected):
    """The user would get a traceback of the YAML parser, or a recipe could run code."""
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    assert expected in refusal(path)


def test_recipes_that_are_not_there_are_refused(tmp_path):
    """A mistyped name or path would not say what there is instead."""
    assert "'dmo' is not a shipped recipe; did you mean demo?" in refusal("dmo")
    assert "'zzz' is not a shipped recipe; shipped are demo, " in refusal("zzz")
    assert f"the recipe file {tmp_path}/no.yaml does not exist" in refusal(tmp_path / "no.yaml")
    assert "is a folder, not a recipe file" in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "cannot be read" in refusal(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.num_steps", "--set train.num_steps: expected key.path=value, for example train.num_steps=20"),
        ("train..num_steps=1", "expected key.path=value"),
        ("problems.train.4.size=1", "problems.train is a list of 1, numbered from 0; there is no item '4'"),
        ("problems.train.first.size=1", "there is no item 'first'"),
        ("train.num_steps.x=1", "--set train.num_steps.x: train.num_steps is 10 and has no keys"),
        ("train.num_steps=[1", "--set train.num_steps: not valid YAML"),
    ],
)
def test_overrides_that_lead_nowhere_are_refused(minimal, override, expected):
    """A mistyped `--set` would be ignored or end in a traceback."""
    assert expected in refusal(minimal, override)


@pytest.mark.parametrize(
    "secret",
    [
        "teacher={kind: endpoint, base_url: 'https://a.example/v1', model: Qwen/QwQ-32B, api_key_env: sk-verysecret}",
        "teacher={kind: endpoint, base_url: 'https://me:sk-verysecret@a.example/v1', model: Qwen/QwQ-32B}",
    ],
)
def test_secrets_are_refused_and_not_repeated(minimal, secret):
    """A key pasted into a recipe would end up in the resolved recipe, the logs and the model card."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(minimal, [secret])
    assert "verysecret" not in str(caught.value)
    assert "environment variable" in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_schema_accepts_the_shipped_recipes_and_describes_every_key():
    """An editor that completes and checks by `stillhouse schema` would complain about a good recipe, or explain nothing."""
    schema = recipe_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for name in shipped_recipes():
        validator.validate(yaml.safe_load(load_recipe(name).to_yaml()))
    assert not validator.is_valid({"name": "x"})
    assert json.loads(json.dumps(schema)) == schema
    problems = schema["$defs"]["ReasoningGymSource"]["properties"]
    assert problems["size"]["description"] == "Number of problems."


def test_defaults_are_written_out(minimal):
    """Two runs of one recipe under two versions could differ by a default that nobody can see."""
    resolved = yaml.safe_load(load_recipe(minimal).to_yaml())
    assert set(resolved) == set(Recipe.model_fields)
    assert resolved["student"]["lora"] == {"rank": 32, "alpha": 64.0, "dropout": 0.0, "target_modules": "all-linear"}
    assert resolved["gate"]["min_student_ratio"] == 0.95


def test_path_objects_and_strings_mean_the_same_file(minimal, monkeypatch):
    """A recipe in the working directory could only be given with a leading ./"""
    monkeypatch.chdir(minimal.parent)
    assert load_recipe("mine.yaml") == load_recipe("./mine.yaml") == load_recipe(Path("mine.yaml"))
