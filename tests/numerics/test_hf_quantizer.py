"""Quantizing while transformers loads a model, saving it packed, and reading it back, for the student architectures."""

from __future__ import annotations

import pickle

import pytest
import torch

from stillhouse.kernels.formats import dequantize, quantize
from stillhouse.kernels.huggingface import StillhouseConfig, register
from stillhouse.kernels.linear import Linear4bit, linear4bit_module_names

ARCHITECTURES = ("Qwen2", "Qwen3", "Llama")


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
@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_quantize_on_load_save_and_reload(architecture, tied, format, tmp_path):
    """If it failed, a 4-bit base would hold other weights than quantize() gives, or other ones after a restart."""
    model = _model(architecture, tied=tied)
    model.save_pretrained(tmp_path / "dense")
    loaded = _load(tmp_path / "dense", quantization_config=StillhouseConfig(format=format))
    assert len(linear4bit_module_names(loaded)) == 14
    for name in linear4bit_module_names(loaded):
        linear = model.get_submodule(name)
        linear.weight.data = dequantize(quantize(linear.weight, format))
        assert torch.equal(loaded.get_submodule(name).weight, linear.weight), name
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


def test_config_survives_json_and_pickle_and_refuses_unknown_settings():
    """If it failed, a saved model's config.json or a Ray worker would not get the same settings."""
    register()
    register()
    config = StillhouseConfig(format="nf4", block_size=128, double_quant=False, modules_to_not_convert=["a"])
    assert StillhouseConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="format must be one of"):
        StillhouseConfig(format="int8")
    with pytest.raises(TypeError, match="group"):
        StillhouseConfig(group=32)
