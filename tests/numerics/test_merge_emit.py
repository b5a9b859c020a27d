"""Merging onto the decoded base, and the emitted int4 checkpoint as a user without stillhouse loads it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stillhouse.kernels.compressed_tensors import from_compressed_tensors
from stillhouse.kernels.formats import dequantize
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.integrity import check_checkpoint
from stillhouse.pipeline.manifest import read_manifest, verify_manifest
from stillhouse.students.base_models import BASE_WEIGHTS, dequantized_weight, load_base
from stillhouse.students.emitting import emit_checkpoint, replace_card
from stillhouse.students.merging import merge_adapter
from stillhouse.students.rendering import template_hash
from tests.tiny_models import ARCHITECTURES, make_model, make_tokenizer

DTYPES = ("bfloat16", "float16", "float32")
IDS = torch.tensor([[60, 61, 62, 63, 64, 65, 66, 67]])

# Runs in a process that must not have stillhouse: loads with transformers + compressed-tensors, saves what it decoded.
LOADER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
found = []
for folder, dtype in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    packed = {name: tensor.clone() for name, tensor in model.state_dict().items() if "weight_" in name}
    with torch.no_grad():  # the first forward decodes the weights in place
        logits = model(torch.tensor([[60, 61, 62, 63, 64, 65, 66, 67]])).logits.float()
    decoded = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    found.append({"packed": packed, "logits": logits, "decoded": decoded, "dtype": str(model.dtype)})
torch.save(found, sys.argv[2])
assert not [name for name in sys.modules if name.split(".")[0] == "stillhouse"], "stillhouse was imported"
"""


def make_adapter(model_dir: Path, folder: Path, base_weights: str) -> Path:
    """An adapter of every linear layer with weights of a trained one's size, saved as training saves it."""
    from stillhouse.students.training import _add_lora

    base = load_base(str(model_dir), base_weights=base_weights, dtype="float32")
    torch.manual_seed(1)
    model = _add_lora(base, base_weights, rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    return folder


def layer_tensors(tensors: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    return {part: tensors[f"{layer}.{part}"] for part in ("weight_packed", "weight_scale", "weight_shape")}


def load_in_a_process_without_stillhouse(asked: list[tuple[Path, str]], out: Path) -> list[dict]:
    """Load each (folder, dtype) as a user would, all in one process."""
    names = json.dumps([(str(folder), dtype) for folder, dtype in asked])
    command = [sys.executable, "-c", LOADER, names, str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=out.parent, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {architecture: make_model(folder / architecture, architecture) for architecture in ARCHITECTURES}


@pytest.mark.parametrize("base_weights", BASE_WEIGHTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_weights_are_the_decoded_base_plus_the_update(models, architecture, base_weights, tmp_path):
    """If this failed, the merged student would not be the model that was trained."""
    adapter = make_adapter(models[architecture], tmp_path / "adapter", base_weights)
    merged = merge_adapter(str(models[architecture]), adapter, tmp_path / "student", base_weights=base_weights, dtype="float32")
    student = load_file(merged / "model.safetensors")
    base = load_base(str(models[architecture]), base_weights=base_weights, dtype="float32")
    update = load_file(adapter / "adapter_model.safetensors")
    for name, module in base.named_modules():
        if not name.endswith("_proj"):
            continue
        lora_a, lora_b = (update[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        exact = dequantized_weight(module).double() + 2.0 * lora_b @ lora_a
        assert student[f"{name}.weight"].dtype == torch.bfloat16
        # One rounding to bfloat16 (8 significant bits) of a float32 sum.
        bound = exact.abs() * 2**-8 + 1e-6
        assert torch.all((student[f"{name}.weight"].double() - exact).abs() <= bound), name


@pytest.mark.parametrize("base_weights", BASE_WEIGHTS)
def test_merged_student_answers_like_base_plus_adapter(models, base_weights, tmp_path):
    """If this failed, merging onto the original weights (or with another scale) would go unnoticed."""
    model_dir = models["Qwen3"]
    adapter = make_adapter(model_dir, tmp_path / "adapter", base_weights)
    merged = merge_adapter(str(model_dir), adapter, tmp_path / "student", base_weights=base_weights, dtype="float32")
    base = load_base(str(model_dir), base_weights=base_weights, dtype="float32")
    if base_weights in ("int4", "nf4"):
        from peft import LoraConfig

        from stillhouse.kernels.peft_lora import register_with_peft

        adapted = PeftModel.from_pretrained(base, adapter, config=register_with_peft(LoraConfig.from_pretrained(adapter)))
    else:
        adapted = PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        expected = adapted(IDS).logits
        without_adapter = load_base(str(model_dir), base_weights=base_weights, dtype="float32")(IDS).logits
        got = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(IDS).logits
    error = (got - expected).norm() / expected.norm()
    moved = (without_adapter - expected).norm() / expected.norm()
    assert error < 0.02 < moved


@pytest.fixture(scope="module")
def emitted_and_loaded(tmp_path_factory):
    """For each architecture, tied and not: the student's folder, what was emitted, and that loaded in three dtypes."""
    folder = tmp_path_factory.mktemp("emitted")
    kinds = [(architecture, tied) for architecture in ARCHITECTURES for tied in (False, True)]
    made = {}
    for architecture, tied in kinds:
        student_dir = make_model(folder / f"student-{architecture}-{tied}", architecture, tied=tied)
        made[architecture, tied] = (
            student_dir,
            emit_checkpoint(student_dir, folder / f"{architecture}-{tied}", provenance={}, card="# A student"),
        )
    asked = [(made[kind][1].path, dtype) for kind in kinds for dtype in DTYPES]
    found = iter(load_in_a_process_without_stillhouse(asked, folder / "loaded.pt"))
    return {kind: (*made[kind], {dtype: next(found) for dtype in DTYPES}) for kind in kinds}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_users_load_the_checkpoint_without_stillhouse(architecture, tied, emitted_and_loaded):
    """If this failed, the shipped checkpoint would not load, or decode to other weights in bfloat16 than in float16."""
    student_dir, emitted, loaded = emitted_and_loaded[architecture, tied]
    assert check_checkpoint(emitted.path).problems == []
    stored = load_file(emitted.path / "model.safetensors")
    decoded = {layer: dequantize(from_compressed_tensors(layer_tensors(stored, layer), 32)) for layer in emitted.sqnr_db}
    assert len(decoded) == 14
    for dtype, found in loaded.items():
        assert found["dtype"] == f"torch.{dtype}"
        for layer, weight in decoded.items():
            packed = layer_tensors(found["packed"], layer)
            assert packed["weight_scale"].dtype == getattr(torch, dtype)
            assert torch.equal(dequantize(from_compressed_tensors(packed, 32)), weight), (dtype, layer)
            assert torch.equal(found["decoded"][layer].float(), weight.to(getattr(torch, dtype)).float()), (dtype, layer)
    # The logits are those of a plain model that holds the decoded weights.
    reference = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    with torch.no_grad():
        for layer, weight in decoded.items():
            reference.get_submodule(layer).weight.copy_(weight)
        expected = reference(IDS).logits
    torch.testing.assert_close(loaded["float32"]["logits"], expected, rtol=1e-4, atol=1e-4)
    assert (loaded["bfloat16"]["logits"] - expected).norm() < 0.05 * expected.norm()


def test_trained_merged_and_emitted_in_one_go(models, tmp_path):
    """If this failed, the stages would not fit together: adapter, student and checkpoint of one run."""
    from stillhouse.pipeline.records import Example
    from stillhouse.students.training import train_lora

    row = Example("r", "t", "p", tuple(range(60, 80)), (-100,) * 4 + tuple(range(64, 80)), "template")
    settings = {"base_weights": "int4", "dtype": "float32"}
    trained = train_lora(
        str(models["Qwen2"]), [row], tmp_path / "run", num_steps=20, rank=4, alpha=8, learning_rate=1e-2,
        tokens_per_step=64, max_length=64, **settings,
    )  # fmt: skip
    student_dir = merge_adapter(str(models["Qwen2"]), trained.adapter_dir, tmp_path / "student", **settings)
    emitted = emit_checkpoint(student_dir, tmp_path / "checkpoint", provenance={}, card="# A student")
    loaded = load_in_a_process_without_stillhouse([(emitted.path, "float32")], tmp_path / "out.pt")[0]
    student = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    with torch.no_grad():
        student_logits = student(IDS).logits
    assert (loaded["logits"] - student_logits).norm() < 0.3 * student_logits.norm()
    assert emitted.size_bytes < 0.6 * emitted.size_16bit_bytes


def test_the_folder_is_sealed_and_says_where_it_came_from(models, tmp_path):
    """If this failed, a checkpoint could not be traced to its run, or would be refused by the gate."""
    emitted = emit_checkpoint(
        models["Llama"], tmp_path / "checkpoint", provenance={"recipe_sha256": "abc", "base_model": "tiny"}, card="# Card"
    )
    manifest = read_manifest(emitted.path)
    assert verify_manifest(emitted.path) == []
    assert manifest["provenance"]["recipe_sha256"] == "abc"
    assert manifest["provenance"]["chat_template_sha256"] == template_hash(make_tokenizer())
    assert (emitted.path / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    assert not [path.name for path in tmp_path.iterdir() if path.name != "checkpoint"], "no temporary folder is left"
    before = emitted.manifest_sha256
    after = replace_card(emitted.path, "# Card\n\npass@1 0.86")
    assert after != before
    assert "pass@1 0.86" in (emitted.path / "README.md").read_text()
    assert check_checkpoint(emitted.path).problems == []


def test_a_killed_emission_leaves_no_half_checkpoint(models, tmp_path, monkeypatch):
    """If this failed, a folder without its last files would stand under the checkpoint's name."""
    from stillhouse.students import emitting

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    emit_checkpoint(models["Llama"], tmp_path / "checkpoint", provenance={}, card="# First")
    monkeypatch.setattr(emitting, "write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        emit_checkpoint(models["Llama"], tmp_path / "checkpoint", provenance={}, card="# Second")
    assert "# First" in (tmp_path / "checkpoint" / "README.md").read_text()
    assert verify_manifest(tmp_path / "checkpoint") == []
    monkeypatch.undo()
    emit_checkpoint(models["Llama"], tmp_path / "checkpoint", provenance={}, card="# Third")
    assert "# Third" in (tmp_path / "checkpoint" / "README.md").read_text()


def test_layers_that_do_not_fit_or_are_skipped_stay_in_16_bits_and_load(tmp_path):
    """If this failed, an odd width would stop the export, or a skipped layer would be rounded all the same."""
    student_dir = make_model(tmp_path / "student", "Llama", hidden_size=48)
    emitted = emit_checkpoint(student_dir, tmp_path / "checkpoint", skip=["layers.0.mlp.down_proj"], provenance={}, card="# A")
    # in_features 48 does not fit groups of 32; the down projections (96 wide) do.
    assert set(emitted.sqnr_db) == {"model.layers.1.mlp.down_proj"}
    assert emitted.left_in_16_bits["model.layers.0.mlp.down_proj"] == "quantize.skip names it"
    assert "in_features=48 is not a multiple" in emitted.left_in_16_bits["model.layers.0.self_attn.q_proj"]
    stored, original = (load_file(folder / "model.safetensors") for folder in (emitted.path, student_dir))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(stored[name], original[name])
    loaded = load_in_a_process_without_stillhouse([(emitted.path, "bfloat16")], tmp_path / "out.pt")[0]
    assert torch.isfinite(loaded["logits"]).all()
    with pytest.raises(RecipeError, match="no linear layer"):
        emit_checkpoint(student_dir, tmp_path / "other", skip=["mlp.nothing"], provenance={}, card="# A")


def test_rounding_noise_is_reported_and_zero_for_what_int4_holds(models, tmp_path):
    """If this failed, a layer ruined by quantization would look like the others in the report."""
    emitted = emit_checkpoint(models["Qwen3"], tmp_path / "checkpoint", provenance={}, card="# A")
    assert all(15 < value < 30 for value in emitted.sqnr_db.values())
    # A student that holds decoded int4 weights already loses nothing more. Small codes times 8-bit scales need 11 bits, so
    # the student is kept in float32 here.
    shutil.copytree(models["Qwen3"], tmp_path / "exact")
    model = AutoModelForCausalLM.from_pretrained(models["Qwen3"], dtype=torch.float32)
    stored = load_file(emitted.path / "model.safetensors")
    with torch.no_grad():
        for layer in emitted.sqnr_db:
            model.get_submodule(layer).weight.copy_(dequantize(from_compressed_tensors(layer_tensors(stored, layer), 32)))
    model.save_pretrained(tmp_path / "exact")
    again = emit_checkpoint(tmp_path / "exact", tmp_path / "again", provenance={}, card="# A")
    assert set(again.sqnr_db.values()) == {math.inf}


def test_an_adapter_of_another_kind_is_refused(models, tmp_path):
    """If this failed, part of an adapter would silently be left out of the student."""
    adapter = make_adapter(models["Qwen2"], tmp_path / "adapter", "bf16")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(RecipeError, match="use_dora"):
        merge_adapter(str(models["Qwen2"]), adapter, tmp_path / "student", base_weights="bf16", dtype="float32")
    with pytest.raises(RecipeError, match="is not an adapter"):
        merge_adapter(str(models["Qwen2"]), tmp_path, tmp_path / "student", base_weights="bf16", dtype="float32")
    assert not (tmp_path / "student").exists()
