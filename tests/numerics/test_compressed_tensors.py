"""int4 weights as compressed-tensors stores them, checked by that library and by a transformers load."""

from __future__ import annotations

import json

import pytest
import torch

from stillhouse.kernels.compressed_tensors import from_compressed_tensors, quantization_config, to_compressed_tensors
from stillhouse.kernels.formats import dequantize, quantize

SHAPES = [((24, 64), 32), ((16, 32), 32), ((7, 96), 32), ((9, 192), 64), ((33, 128), 128), ((5, 14), 7), ((3, 10), 5)]


def _scheme(group_size: int, symmetric: bool):
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig(**quantization_config(group_size, symmetric))
    return config.config_groups["group_0"]


@pytest.mark.parametrize(("shape", "group_size"), SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_library_decodes_the_same_weights(shape, group_size, symmetric, dtype):
    """If it failed, the weights that others load would not be the ones that were validated, in one dtype or in both."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    packed = quantize(w, group_size=group_size, symmetric=symmetric)
    tensors = to_compressed_tensors(packed)
    tensors["weight_scale"] = tensors["weight_scale"].to(dtype)  # what a loader does for the config's dtype
    theirs = PackedQuantizationCompressor.decompress(tensors, _scheme(group_size, symmetric))["weight"]
    assert theirs.dtype == dtype
    assert torch.equal(theirs, dequantize(packed, dtype))


@pytest.mark.parametrize(("shape", "group_size"), SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_librarys_own_bytes_are_read_and_written_back(shape, group_size, symmetric):
    """If it failed, a checkpoint made by llm-compressor could not be taken over, or not given back, byte for byte."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    packed = quantize(w, group_size=group_size, symmetric=symmetric)
    state = {"weight": w, "weight_scale": packed.scales}
    if not symmetric:
        state["weight_zero_point"] = packed.zero_points.to(torch.int8) - 8
    theirs = PackedQuantizationCompressor.compress(state, _scheme(group_size, symmetric))
    ours = to_compressed_tensors(from_compressed_tensors(theirs, group_size))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_what_cannot_be_held_is_refused():
    """If it failed, a broken checkpoint would be written, or a foreign one would decode to other weights."""
    with pytest.raises(ValueError, match="int4 weights, not nf4"):
        to_compressed_tensors(quantize(torch.ones(2, 64), "nf4"))
    with pytest.raises(ValueError, match="in_features=40 is not a multiple of group_size=32"):
        to_compressed_tensors(quantize(torch.ones(2, 40)))
    tensors = to_compressed_tensors(quantize(torch.ones(2, 64)))
    with pytest.raises(ValueError, match=r"needs \['weight_scale'\]"):
        from_compressed_tensors({k: v for k, v in tensors.items() if k != "weight_scale"}, 32)
    with pytest.raises(ValueError, match=r"weight_packed must be int32 of shape \(2, 8\)"):
        from_compressed_tensors({**tensors, "weight_packed": tensors["weight_packed"][:, :7]}, 32)
    with pytest.raises(ValueError, match="float16 does not hold"):
        from_compressed_tensors({**tensors, "weight_scale": torch.full((2, 2), 1 / 3)}, 32)
    with pytest.raises(ValueError, match=r"weight_g_idx is not k // 32: the columns were reordered"):
        from_compressed_tensors({**tensors, "weight_g_idx": torch.arange(64).flip(0) // 32}, 32)
    plain = {**tensors, "weight_g_idx": torch.arange(64, dtype=torch.int32) // 32}
    assert torch.equal(from_compressed_tensors(plain, 32).codes, from_compressed_tensors(tensors, 32).codes)
    tensors = to_compressed_tensors(quantize(torch.ones(9, 64), symmetric=False))
    with pytest.raises(ValueError, match=r"weight_zero_point must be int32 of shape \(2, 2\), is torch.int8 of shape \(9, 2\)"):
        from_compressed_tensors({**tensors, "weight_zero_point": torch.zeros(9, 2, dtype=torch.int8)}, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_transformers_loads_a_packed_model(tmp_path, dtype):
    """If it failed, AutoModelForCausalLM.from_pretrained of an emitted checkpoint would break or decode differently."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config)
    state, packed = {}, {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            packed[name] = quantize(tensor)
            prefix = name.removesuffix("weight")
            state |= {prefix + key: value for key, value in to_compressed_tensors(packed[name]).items()}
        else:
            state[name] = tensor.to(dtype)
    assert len(packed) == 7
    (tmp_path / "packed").mkdir()
    save_file(state, tmp_path / "packed/model.safetensors", metadata={"format": "pt"})
    written = config.to_dict() | {"dtype": str(dtype).removeprefix("torch."), "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "packed/config.json").write_text(json.dumps(written | {"quantization_config": quantization_config()}))
    for name, weight in packed.items():
        model.get_parameter(name).data.copy_(dequantize(weight))
    model.save_pretrained(tmp_path / "dense")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto").eval()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype).eval()
    ids = torch.arange(12).view(1, 12)
    with torch.inference_mode():
        logits = loaded(ids).logits
        assert logits.dtype == dtype
        assert torch.equal(logits, dense(ids).logits)
    for name, weight in packed.items():  # decompressed by that forward
        assert torch.equal(loaded.get_parameter(name), dequantize(weight, dtype)), name
