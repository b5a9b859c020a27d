"""LoRA training on tiny random models: the right tokens reach the model, the loss falls, a killed run goes on bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from stillhouse.pipeline.errors import RecipeError, SupervisionError
from stillhouse.pipeline.records import Example
from stillhouse.students.base_models import BASE_WEIGHTS, load_base, load_tokenizer
from stillhouse.students.training import train_lora
from tests.tiny_models import ARCHITECTURES, make_model

SETTINGS = {
    "base_weights": "int4", "dtype": "float32", "rank": 4, "alpha": 8, "learning_rate": 1e-2, "tokens_per_step": 128,
    "max_length": 64, "save_steps": 5, "seed": 3, "warmup_ratio": 0.2,
}  # fmt: skip


def make_rows(num_rows: int = 12, seed: int = 0) -> list[Example]:
    """Rows of a pattern that is quickly learnt: the prompt's letters repeated, behind a masked prompt."""
    rng = random.Random(seed)
    rows = []
    for i in range(num_rows):
        prompt = [rng.randrange(60, 90) for _ in range(rng.randrange(4, 9))]
        answer = [*prompt, *prompt, 292]
        labels = (-100,) * len(prompt) + tuple(answer)
        rows.append(Example(f"row{i}", f"trace{i}", f"problem{i}", tuple(prompt + answer), labels, "template"))
    return rows


class Killed(RuntimeError):
    """Stands for a kill -9: nothing behind the point of raising runs."""


class KillAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


class Record(TrainerCallback):
    """Takes down every batch that reaches the model."""

    def __init__(self):
        self.batches = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def note(module, positional, named):
            self.batches.append({name: named[name].clone() for name in ("input_ids", "labels")})

        model.register_forward_pre_hook(note, with_kwargs=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "qwen3", "Qwen3", tied=True)


@pytest.fixture(scope="module")
def uninterrupted(model_dir, tmp_path_factory):
    return train_lora(str(model_dir), make_rows(), tmp_path_factory.mktemp("whole"), num_steps=10, **SETTINGS)


@pytest.mark.parametrize("base_weights", BASE_WEIGHTS)
@pytest.mark.parametrize(
    "architecture", [name if name == "Qwen3" else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_loss_falls_for_every_architecture_and_base(architecture, base_weights, tmp_path):
    """If this failed, that model family could not be trained over that kind of base weights."""
    model_dir = make_model(tmp_path / "model", architecture)
    settings = {**SETTINGS, "base_weights": base_weights}
    result = train_lora(str(model_dir), make_rows(), tmp_path / "run", num_steps=40, **settings)
    assert result.history[-1].loss < 0.8 * result.history[0].loss
    trained = load_file(result.adapter_dir / "adapter_model.safetensors")
    # Two layers of seven linear layers, and every one of them has moved away from its start at zero.
    assert sum(name.endswith("lora_B.weight") for name in trained) == 14
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    assert all(tensor.abs().max() > 0 for tensor in trained.values())


def test_the_exact_rows_and_labels_reach_the_model(model_dir, tmp_path):
    """If this failed, a trainer's defaults (cutting, masking anew) would change what is learnt, silently."""
    rows, record = make_rows(), Record()
    # Longer than SFTConfig's default max_length of 1,024 would let through.
    long = tuple(range(60, 90)) * 40
    rows.append(Example("long", "t", "p", (*long, 292), (-100,) * 10 + (*long[10:], 292), "template"))
    train_lora(str(model_dir), rows, tmp_path, num_steps=20, extra_callbacks=[record], **{**SETTINGS, "max_length": 2048})
    seen = set()
    for batch in record.batches:
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
            length = max(i for i, label in enumerate(labels) if label != -100) + 1
            assert set(ids[length:]) <= {293}, "padding is the pad token"
            seen.add((tuple(ids[:length]), tuple(labels[:length])))
    assert seen == {(row.input_ids, row.labels) for row in rows}


def test_packing_and_padding_learn_the_same(model_dir, uninterrupted, tmp_path):
    """If this failed, packed rows would attend to their neighbours, or lose tokens at the seams."""
    packed = train_lora(str(model_dir), make_rows(), tmp_path, num_steps=10, packing=True, **SETTINGS)
    assert [p.loss for p in packed.history] == pytest.approx([p.loss for p in uninterrupted.history], rel=1e-3)


def test_accumulated_steps_learn_the_same(model_dir, uninterrupted, tmp_path):
    """If this failed, fitting a step into less memory would weigh its rows differently."""
    parts = train_lora(str(model_dir), make_rows(), tmp_path, num_steps=10, accumulation_steps=3, **SETTINGS)
    assert [p.loss for p in parts.history] == pytest.approx([p.loss for p in uninterrupted.history], rel=1e-3)


def test_gradient_checkpointing_changes_no_weight(model_dir, uninterrupted, tmp_path):
    """If this failed, the memory-saving setting would train another adapter, or none."""
    result = train_lora(str(model_dir), make_rows(), tmp_path, num_steps=10, gradient_checkpointing=True, **SETTINGS)
    ours = load_file(result.adapter_dir / "adapter_model.safetensors")
    for name, tensor in load_file(uninterrupted.adapter_dir / "adapter_model.safetensors").items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)


WORKER = """
import json, sys
from stillhouse.pipeline.records import Example
from stillhouse.students.training import train_lora
model_dir, output_dir, rows, settings = json.loads(sys.argv[1])
rows = [Example(key, trace, problem, tuple(ids), tuple(labels), t) for key, trace, problem, ids, labels, t in rows]
result = train_lora(model_dir, rows, output_dir, num_steps=10, **settings)
if __import__("os").environ["RANK"] == "0":
    open(output_dir + "/losses.json", "w").write(json.dumps([point.loss for point in result.history]))
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(model_dir, uninterrupted, tmp_path):
    """If this failed, training on several workers would see other batches, or weigh their rows differently."""
    rows = [dataclasses.astuple(row) for row in make_rows()]
    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = json.dumps([str(model_dir), str(tmp_path), rows, SETTINGS])
    command = [*launch, str(tmp_path / "worker.py"), arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert finished.returncode == 0, finished.stderr[-2000:]
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses == pytest.approx([point.loss for point in uninterrupted.history], rel=1e-3)


def test_a_killed_training_goes_on_to_the_same_adapter(model_dir, uninterrupted, tmp_path):
    """If this failed, a crash would cost the whole training, or give another student than the recipe's."""
    with pytest.raises(Killed):
        train_lora(str(model_dir), make_rows(), tmp_path, num_steps=10, extra_callbacks=[KillAt(6)], **SETTINGS)
    # Killed while a later checkpoint was being written: files there, the mark of completeness not.
    half = tmp_path / "checkpoints" / "checkpoint-8"
    shutil.copytree(tmp_path / "checkpoints" / "checkpoint-5", half)
    (half / "complete.json").unlink()
    (half / "optimizer.pt").write_bytes(b"half")
    first_step = []

    class FirstStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            first_step.append(state.global_step)

    result = train_lora(str(model_dir), make_rows(), tmp_path, num_steps=10, extra_callbacks=[FirstStep()], **SETTINGS)
    assert first_step[0] == 6, "went on from the checkpoint at step 5"
    assert [(p.step, p.loss, p.learning_rate) for p in result.history] == [
        (p.step, p.loss, p.learning_rate) for p in uninterrupted.history
    ]
    seconds = [point.seconds for point in result.history]
    assert seconds == sorted(seconds)
    resumed = load_file(result.adapter_dir / "adapter_model.safetensors")
    whole = load_file(uninterrupted.adapter_dir / "adapter_model.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert (result.num_tokens, result.num_supervised_tokens) == (uninterrupted.num_tokens, uninterrupted.num_supervised_tokens)


def test_a_checkpoint_cut_short_is_not_used(model_dir, uninterrupted, tmp_path):
    """If this failed, a file cut by a full disk would be trained on, or stop every later start."""
    shutil.copytree(uninterrupted.adapter_dir.parent, tmp_path / "run")
    cut = tmp_path / "run" / "checkpoints" / "checkpoint-10" / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    result = train_lora(str(model_dir), make_rows(), tmp_path / "run", num_steps=10, **SETTINGS)
    assert [p.loss for p in result.history] == [p.loss for p in uninterrupted.history]


def test_other_settings_do_not_continue_a_training(model_dir, uninterrupted):
    """If this failed, a changed recipe would silently go on from another recipe's weights."""
    with pytest.raises(RecipeError, match="differs in learning_rate"):
        train_lora(
            str(model_dir), make_rows(), uninterrupted.adapter_dir.parent, num_steps=10, **{**SETTINGS, "learning_rate": 1e-3}
        )


def test_rows_that_teach_nothing_or_would_be_cut_are_refused(model_dir, tmp_path):
    """If this failed, hours of training would end in an unchanged or a truncated student."""
    masked = [Example("a", "t", "p", (60, 61), (-100, -100), "template")]
    for rows, message in (([], "no examples"), (masked, "supervised token")):
        with pytest.raises(SupervisionError, match=message):
            train_lora(str(model_dir), rows, tmp_path, num_steps=2, **SETTINGS)
    with pytest.raises(SupervisionError, match="max_length is 10"):
        train_lora(str(model_dir), make_rows(), tmp_path, num_steps=2, **{**SETTINGS, "max_length": 10})


def test_a_model_that_is_not_there_is_said_in_one_sentence(tmp_path):
    """If this failed, a wrong path would end in a traceback of the hub client."""
    with pytest.raises(RecipeError, match="is not a model folder"):
        load_base(str(tmp_path / "nowhere"), base_weights="int4", dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(RecipeError, match="is not a model folder"):
        load_base(str(tmp_path), base_weights="bf16", dtype="float32")


def test_a_hub_model_without_a_hub_is_said_in_one_sentence(monkeypatch):
    """If this failed, a machine without a network would hang or end in a traceback."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="no model 'nobody/nothing-of-this-name'") as caught:
        load_tokenizer("nobody/nothing-of-this-name")
    assert "\n" not in str(caught.value)
