"""What a user gets for a wrong recipe: one sentence, no traceback, nothing lost, and the exit code that belongs to it."""

from __future__ import annotations

import json

import pytest

from stillhouse.pipeline.trace_store.store import TraceStore
from tests.small_demo import command, small_demo

RECIPE = """
name: mine
problems:
  train: [{{source: file, path: {problems}}}]
  test: [{{source: reasoning_gym, task: chain_sum, size: 4, seed: 9000000}}]
teacher: {{kind: transformers, model: {teacher}, dtype: float32,
          opens_think: false, sampling: {{temperature: 0.6, top_p: 0.95, max_new_tokens: 64}}}}
student: {{base_model: tiny, dtype: float32}}
train: {{learning_rate: 1.0e-3, num_steps: 2, max_length: 256, tokens_per_step: 512}}
"""


def write_recipe(folder, *, problems="problems.jsonl", teacher="tiny", rows=({"prompt": "1 + 1 =", "answer": "2"},)):
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(problems=problems, teacher=teacher))
    return str(path)


def assert_one_sentence(done, code, *words):
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("stillhouse: ")]
    assert len(said) == 1
    for word in words:
        assert word in said[0]


def test_an_unknown_key(stillhouse):
    """A typo in a key must not be ignored."""
    assert_one_sentence(
        stillhouse("run", "demo", "--set", "train.learnig_rate=1"), 2, "train.learnig_rate", "train.learning_rate"
    )


def test_an_unknown_recipe(stillhouse):
    """A wrong name says which names there are."""
    assert_one_sentence(stillhouse("run", "dmeo"), 2, "dmeo", "demo")


def test_a_missing_file(stillhouse, tmp_path):
    """A file that is not there is named."""
    recipe = write_recipe(tmp_path, problems="nowhere.jsonl")
    assert_one_sentence(stillhouse("run", recipe, "--out", str(tmp_path / "run")), 2, "nowhere.jsonl")


def test_a_problem_without_an_answer(stillhouse, tmp_path):
    """A row without a gold answer is named by its number, before a token is spent."""
    recipe = write_recipe(tmp_path, rows=({"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "1 + 2 ="}))
    assert_one_sentence(stillhouse("run", recipe, "--out", str(tmp_path / "run")), 2, "problems.jsonl", "2", "answer")


def test_a_gold_that_does_not_verify_itself(stillhouse, tmp_path):
    """An answer its own verifier refuses would drop every trace of that problem."""
    recipe = write_recipe(tmp_path, rows=({"prompt": "Which?", "answer": "\\frac{"},))
    assert_one_sentence(stillhouse("run", recipe, "--out", str(tmp_path / "run")), 2, "problems.train")


@pytest.mark.parametrize("teacher", ["./no/such/folder", pytest.param("nobody/no-such-model", marks=pytest.mark.slow)])
def test_a_teacher_that_is_not_there(stillhouse, tmp_path, teacher):
    """Exit code 4 tells a scheduler that trying again may help."""
    recipe = write_recipe(tmp_path, teacher=teacher)
    assert_one_sentence(stillhouse("run", recipe, "--out", str(tmp_path / "run")), 4, "cannot be loaded")


@pytest.mark.slow
def test_a_cluster_that_is_not_there(stillhouse, tmp_path):
    """A wrong address is said as such."""
    done = stillhouse(*small_demo(tmp_path / "run"), "--address", "127.0.0.1:1")
    assert_one_sentence(done, 4, "127.0.0.1:1")


@pytest.mark.slow
def test_nothing_kept_loses_nothing(stillhouse, tmp_path):
    """Filters that drop everything end the run with 1; the traces stay, and milder filters go on from them."""
    out = tmp_path / "run"
    done = stillhouse(*small_demo(out, "filters.min_tokens=5000", "filters.max_tokens=6000"))
    assert_one_sentence(done, 1, "none of 96 traces")
    store = TraceStore(out / "traces")
    assert store.num_rows == 96
    paid = store.totals().num_calls
    again = stillhouse(*small_demo(out, verb="filter"))
    assert again.returncode == 0, again.stderr
    assert TraceStore(out / "traces").totals().num_calls == paid == 96


@pytest.mark.slow
def test_a_damaged_trace_file_stops_the_run(stillhouse, tmp_path):
    """Exit code 5: a file is not what was committed."""
    out = tmp_path / "run"
    assert stillhouse(*small_demo(out, verb="generate")).returncode == 0
    shard = next((out / "traces" / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-7] + b"garbage")
    assert_one_sentence(stillhouse(*small_demo(out, verb="filter")), 5, shard.name)


@pytest.mark.slow
def test_a_student_that_cannot_be_asked_costs_no_trace(stillhouse, tmp_path):
    """A base model without a chat template is found before the teacher writes a token, not after."""
    import shutil

    from stillhouse.students.base_models import resolve_model

    base = tmp_path / "base"
    shutil.copytree(resolve_model("tiny"), base)
    (base / "chat_template.jinja").unlink()
    out = tmp_path / "run"
    done = stillhouse(*small_demo(out, f"student.base_model={base}"))
    assert_one_sentence(done, 2, "chat template")
    assert not (out / "traces").exists()


@pytest.mark.slow
def test_a_few_golds_that_nothing_can_check_are_left_out_and_said(stillhouse, tmp_path):
    """Public sets hold some such rows: they must neither stop the run nor be asked."""
    rows = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(9)]
    recipe = write_recipe(tmp_path, rows=[*rows, {"prompt": "Prove it.", "answer": "\\frac{"}])
    done = stillhouse("generate", recipe, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "unverifiable in train: 1" in done.stderr
    assert "unverifiable train 1" in done.stdout


@pytest.mark.parametrize("arguments", [("run",), ("run", "demo", "--bogus"), ("nothing",), ()])
def test_wrong_usage(stillhouse, arguments):
    """Wrong usage is exit code 2 and a hint, never a traceback that asks to report a defect."""
    done = stillhouse(*arguments) if arguments else stillhouse(*command())
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "stillhouse" in done.stderr + done.stdout
