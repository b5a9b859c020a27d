"""Quantizing while transformers loads a model, saving it packed, and reading it back, for the student architectures."""

from __future__ import annotations

import pickle

import pytest
import torch

from stillhouse.kernels.formats import dequantize, quantize
from stillhouse.kernels.huggingface import StillhouseConfig, mark_as_packed, register
from stillhouse.kernels.linear import Linear4bit, linear4bit_module_names

ARCHITECTURES = ("Qwen2", "Qwen3", "Llama")
SETTINGS = (
    {"format": "int4"},
    {"format": "int4", "group_size": 64, "symmetric": False},
    {"format": "nf4"},
    {"format": "nf4", "block_size": 128, "double_quant": False},
)


def _model(architecture: str, *, tied: bool = False, seed: int = 0):
    import transformers

    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=80,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **({"head_dim": 16} if architecture == "Qwen3" else {}),
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # biases too, which start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def _load(path, **kwargs):
    from transformers import AutoModelForCausalLM

    register()
    return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()


def _logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(24).view(2, 12)).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_quantize_on_load_save_and_reload(architecture, tied, settings, tmp_path):
    """If it failed, a 4-bit base would hold other weights than quantize() gives, or other ones after a restart."""
    model = _model(architecture, tied=tied)
    model.save_pretrained(tmp_path / "dense")
    loaded = _load(tmp_path / "dense", quantization_config=StillhouseConfig(**settings))
    assert len(linear4bit_module_names(loaded)) == 14
    for name in linear4bit_module_names(loaded):
        linear = model.get_submodule(name)
        packed = quantize(linear.weight, **settings)
        found = loaded.get_submodule(name).packed.tensors()
        assert found.keys() == packed.tensors().keys(), name
        assert all(torch.equal(found[part], tensor) for part, tensor in packed.tensors().items()), name
        linear.weight.data = dequantize(packed)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    logits = _logits(loaded)
    torch.testing.assert_close(logits, _logits(model), rtol=1e-5, atol=1e-5)

    loaded.save_pretrained(tmp_path / "packed")
    again = _load(tmp_path / "packed")
    before, after = loaded.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].device) == (tensor.dtype, tensor.device), name
        assert torch.equal(after[name], tensor), name
    assert torch.equal(_logits(again), logits)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "packed/model.safetensors").read_bytes()


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_reload_in_bfloat16_keeps_the_packed_weights(format, tmp_path):
    """If it failed, loading with another dtype would cast scales and so change every weight."""
    _model("Qwen2").save_pretrained(tmp_path / "dense")
    loaded = _load(tmp_path / "dense", quantization_config=StillhouseConfig(format=format, group_size=64, double_quant=False))
    loaded.save_pretrained(tmp_path / "packed")
    again = _load(tmp_path / "packed", dtype=torch.bfloat16)
    assert _logits(again).dtype == torch.bfloat16
    for name in linear4bit_module_names(loaded):
        before, after = loaded.get_submodule(name), again.get_submodule(name)
        assert after.dtype == torch.bfloat16
        assert torch.equal(after.dequantize_weight(torch.float32), before.dequantize_weight(torch.float32)), name
        assert (after.group_size, after.block_size) == (before.group_size, before.block_size)


def test_named_modules_stay_as_they_are(tmp_path):
    """If it failed, a layer that a user keeps in 16 bits would be rounded all the same."""
    model = _model("Llama")
    model.save_pretrained(tmp_path)
    config = StillhouseConfig(modules_to_not_convert=["lm_head", "down_proj"])
    loaded = _load(tmp_path, quantization_config=config)
    assert not any("down_proj" in name for name in linear4bit_module_names(loaded))
    assert torch.equal(loaded.model.layers[1].mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.weight)
    assert isinstance(loaded.model.layers[1].mlp.up_proj, Linear4bit)


def test_an_untied_head_is_quantized_when_asked_and_a_tied_one_never(tmp_path, caplog):
    """If it failed, packing a tied head would cut it loose from its embedding without a word."""
    for tied in (False, True):
        path = tmp_path / str(tied)
        _model("Llama", tied=tied).save_pretrained(path)
        loaded = _load(path, quantization_config=StillhouseConfig(modules_to_not_convert=[]))
        assert isinstance(loaded.lm_head, Linear4bit) == (not tied)
        assert torch.isfinite(_logits(loaded)).all()
        assert ("lm_head" in caplog.text) == tied


def test_a_nan_weight_stops_the_load_and_names_the_layer(tmp_path, capfd, caplog):
    """If it failed, a broken checkpoint would become a broken 4-bit model. transformers prints our sentence, then raises."""
    model = _model("Llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        _load(tmp_path, quantization_config=StillhouseConfig())
    assert "layer 'model.layers.1.mlp.up_proj': a weight to quantize must be finite; weight[3, 5] is nan" in "".join(
        (*capfd.readouterr(), caplog.text)
    )


def test_a_config_written_before_a_setting_existed_still_loads():
    """If it failed, checkpoints saved by an earlier version could not be read any more."""
    old = {
        "quant_method": "stillhouse",
        "format": "int4",
        "group_size": 64,
        "block_size": 64,
        "double_quant": True,
        "modules_to_not_convert": ["lm_head"],
    }
    config = StillhouseConfig.from_dict(old)
    assert (config.group_size, config.symmetric, config.head) == (64, True, None)


def test_activations_are_loaded_and_saved_with_the_model(tmp_path):
    """If it failed, a model meant to be served with 8-bit activations would come back slower, or answer otherwise."""
    _model("Llama", tied=True).save_pretrained(tmp_path / "dense")
    config = StillhouseConfig(activations="int8", head="int4", head_activations="exact")
    loaded = _load(tmp_path / "dense", quantization_config=config)
    loaded.save_pretrained(tmp_path / "packed")
    again = _load(tmp_path / "packed")
    for model in (loaded, again):
        modes = {model.get_submodule(name).activations for name in linear4bit_module_names(model)}
        assert (modes, model.lm_head.activations) == ({"int8"}, "exact")
    assert torch.equal(_logits(again), _logits(loaded))
    plain = _load(tmp_path / "dense", quantization_config=StillhouseConfig(head="int4"))
    assert not torch.equal(_logits(plain), _logits(loaded))
    with pytest.raises(ValueError, match="activations must be one of"):
        StillhouseConfig(activations="int4")


def test_fp4_is_read_and_never_written(tmp_path):
    """If it failed, a user who asks for fp4 would get something else, or a crash in the middle of loading."""
    _model("Llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fp4 is only read"):
        _load(tmp_path, quantization_config=StillhouseConfig(format="fp4"))


def test_a_model_packed_by_hand_saves_and_reloads(tmp_path):
    """If it failed, layers put in place without the loader would be saved under a config that reads them as something else."""
    model = _model("Llama")
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "mlp" in name]
    for name in names:
        model.set_submodule(name, Linear4bit.from_linear(model.get_submodule(name), "int4", symmetric=False))
    mark_as_packed(model)
    model.save_pretrained(tmp_path)
    again = _load(tmp_path)
    assert linear4bit_module_names(again) == names
    assert torch.equal(_logits(again), _logits(model))


@pytest.mark.parametrize("kind", ["two formats", "a foreign layer", "a name that matches another", "nothing"])
def test_what_no_config_describes_refuses_to_be_saved(kind, tmp_path, caplog):
    """If it failed, save_pretrained would write a folder that reloads as another model, or as noise."""
    model = _model("Llama")
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and kind != "nothing":
            model.set_submodule(name, Linear4bit.from_linear(module, "int4"))
    if kind == "two formats":
        model.model.layers[0].mlp.up_proj = Linear4bit.from_linear(torch.nn.Linear(64, 96, bias=False), "nf4")
    if kind == "a foreign layer":
        import bitsandbytes

        model.model.layers[0].mlp.up_proj = bitsandbytes.nn.Linear4bit(64, 96, bias=False)
    if kind == "a name that matches another":
        model.up_proj = torch.nn.Linear(2, 2)
    mark_as_packed(model)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    expected = {
        "two formats": "packed in 2 ways",
        "a foreign layer": "layer 'model.layers.0.mlp.up_proj' is packed by another library",
        "a name that matches another": "also match ['model.layers.0.mlp.up_proj', 'model.layers.1.mlp.up_proj']",
        "nothing": "nothing in it is packed",
    }[kind]
    assert expected in caplog.text
    assert not list(tmp_path.iterdir())


def test_config_survives_json_and_pickle_and_refuses_unknown_settings():
    """If it failed, a saved model's config.json or a Ray worker would not get the same settings."""
    register()
    register()
    config = StillhouseConfig(
        format="nf4", block_size=128, double_quant=False, modules_to_not_convert=["a"], symmetric=False, head="int8"
    )
    assert StillhouseConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="format must be one of"):
        StillhouseConfig(format="int8")
    with pytest.raises(ValueError, match="head must be None or one of"):
        StillhouseConfig(head="nf4")
    with pytest.raises(TypeError, match="group"):
        StillhouseConfig(group=32)
