"""nf4 and fp4 weights against bitsandbytes: the same decoded bits, the same checkpoint bytes, the same memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from stillhouse.kernels import reference
from stillhouse.kernels.bitsandbytes import from_bnb_tensors, from_params4bit, to_bnb_tensors, to_quant_state
from stillhouse.kernels.formats import PackedWeight, dequantize, quantize

bnb = pytest.importorskip("bitsandbytes")
functional = bnb.functional

NUM_WEIGHTS = 2 * 256 * 64  # every byte 64 times


def _random_packed(
    kind: str, shape: tuple[int, int], block_size: int, nested: bool, seed: int = 0, sizes: tuple[float, ...] = (1.0,)
) -> PackedWeight:
    """Every byte equally often, in random places; absmax over many orders of magnitude, or all 256 nested codes."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = -(-shape[0] * shape[1] // 2)
    num_blocks = -(-shape[0] * shape[1] // block_size)
    codes = (torch.randperm(num_bytes, generator=generator) % 256).to(torch.uint8)
    scales = {}
    if nested:
        scales["absmax"] = (torch.randperm(num_blocks, generator=generator) % 256).to(torch.uint8)
        scales["nested_absmax"] = torch.rand(-(-num_blocks // 256), generator=generator) + 0.01
        scales["nested_quant_map"] = reference.dynamic_map(torch.device("cpu")).clone()
        scales["nested_offset"] = torch.rand(1, generator=generator)
    else:
        absmax = torch.rand(num_blocks, generator=generator) + 0.5
        scales["absmax"] = absmax * torch.tensor(sizes)[torch.arange(num_blocks) % len(sizes)]
    return PackedWeight(kind, shape, codes, block_size=block_size, **scales)


def _formula(packed: PackedWeight) -> np.ndarray:
    """The formula, one weight after the other in numpy's float32: slow, and too plain to be wrong."""
    table = np.array(reference.CODE_TABLES[packed.format], dtype=np.float32)
    tensors = {name: tensor.numpy() for name, tensor in packed.tensors().items()}
    weights = np.empty(packed.shape[0] * packed.shape[1], dtype=np.float32)
    for i in range(weights.size):
        byte = int(tensors["codes"][i // 2])
        block = i // packed.block_size
        scale = tensors["absmax"][block]
        if "nested_absmax" in tensors:
            product = tensors["nested_quant_map"][scale] * tensors["nested_absmax"][block // 256]
            scale = product + tensors["nested_offset"][0]
        weights[i] = table[byte >> 4 if i % 2 == 0 else byte & 15] * scale
    return weights.reshape(packed.shape)


def _layer(kind: str, nested: bool, storage: torch.dtype = torch.uint8):
    torch.manual_seed(3)
    layer = bnb.nn.Linear4bit(
        128, 96, bias=False, compress_statistics=nested, quant_type=kind, compute_dtype=torch.bfloat16, quant_storage=storage
    )
    return layer.to("cpu")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_tables_are_bitsandbytes_own(kind):
    """If it failed, every weight of a bitsandbytes checkpoint would decode to a neighbouring value."""
    assert torch.equal(torch.tensor(reference.CODE_TABLES[kind]), functional.get_4bit_type(kind, device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("block_size", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_all_code_pairs_decode_bit_for_bit_as_bitsandbytes(kind, block_size, nested, dtype):
    """All 256 bytes under many absmax: if it failed, adapters trained on a bitsandbytes base would see another base."""
    sizes = (1.0, 0.0, 1e-3, 2.0**-20, 300.0) if dtype == torch.float16 else (1.0, 0.0, 1e-3, 1e-30, 1e30)
    for columns in (block_size, 2 * block_size):
        packed = _random_packed(kind, (NUM_WEIGHTS // columns, columns), block_size, nested, seed=columns, sizes=sizes)
        assert packed.codes.unique().numel() == 256
        theirs = functional.dequantize_4bit(packed.codes.view(-1, 1), to_quant_state(packed, dtype))
        assert theirs.dtype == dtype
        assert torch.equal(_bits(dequantize(packed, dtype)), _bits(theirs))


@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((1, 1), 64), ((3, 5), 64), ((7, 33), 64), ((64, 96), 64), ((5, 129), 64), ((130, 67), 32), ((9, 100), 128), ((2, 5), 3)],
)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_other_shape_follows_the_formula(kind, shape, block_size, nested):
    """Blocks that cross rows, odd sizes, a short last block: bitsandbytes' CPU decoder itself is wrong on some of these."""
    packed = _random_packed(kind, shape, block_size, nested, sizes=(1.0, 1e-3))
    expected = torch.from_numpy(_formula(packed))
    assert torch.equal(dequantize(packed), expected)
    assert torch.equal(dequantize(packed, torch.bfloat16), expected.to(torch.bfloat16))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_checkpoint_goes_through_byte_for_byte(kind, nested, storage):
    """If it failed, a bitsandbytes checkpoint would not come back as it was taken over."""
    layer = _layer(kind, nested, storage)
    theirs = {f"model.up.{name}": tensor for name, tensor in layer.state_dict().items()}
    packed = from_bnb_tensors(theirs | {"model.up.bias": torch.zeros(96), "model.weight": torch.ones(2)}, "model.up")
    assert (packed.format, packed.shape, packed.nested_absmax is not None) == (kind, (96, 128), nested)
    assert packed.codes.data_ptr() == layer.weight.data_ptr()
    assert torch.equal(dequantize(packed), functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    ours = {f"model.up.{name}": tensor for name, tensor in to_bnb_tensors(packed, torch.float32).items()}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name].view(torch.uint8).view(-1), tensor.contiguous().view(torch.uint8).view(-1)), name
    assert from_bnb_tensors(layer.state_dict()).codes.data_ptr() == layer.weight.data_ptr()


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_loads_the_file_that_was_written(tmp_path, double_quant):
    """If it failed, a base quantized here could not be used with PEFT + bitsandbytes elsewhere."""
    from safetensors.torch import load_file, save_file

    packed = quantize(torch.randn(48, 256, generator=torch.Generator().manual_seed(1)), "nf4", double_quant=double_quant)
    save_file(to_bnb_tensors(packed, torch.bfloat16), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    weight = state.pop("weight")
    param = bnb.nn.Params4bit.from_prequantized(weight, state, device="cpu")
    theirs = functional.dequantize_4bit(param.data, param.quant_state)
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs, dequantize(packed, torch.bfloat16))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_live_parameter_is_taken_over_and_given_back_without_a_copy(kind, nested):
    """If it failed, swapping a loaded model's layers would hold the weights twice, or compute with others."""
    layer = _layer(kind, nested)
    param = layer.weight
    packed = from_params4bit(param)
    assert type(packed.codes) is torch.Tensor
    state = param.quant_state
    sources = {"codes": param, "absmax": state.absmax}
    if nested:
        sources |= {"nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code, "nested_offset": state.offset}
    assert packed.tensors().keys() == sources.keys()
    back = to_quant_state(packed, torch.float32)
    for name, source in sources.items():
        assert packed.tensors()[name].data_ptr() == source.data_ptr(), name
    assert back.absmax.data_ptr() == state.absmax.data_ptr()
    if nested:
        assert back.offset.data_ptr() == state.offset.data_ptr()
    expected = functional.dequantize_4bit(param.data, state)
    assert torch.equal(dequantize(packed), expected)
    assert torch.equal(functional.dequantize_4bit(packed.codes.view(-1, 1), back), expected)


@pytest.mark.parametrize("nested", [True, False])
def test_a_weight_that_bitsandbytes_repacked_is_refused(nested):
    """If it failed, a model taken over after one evaluation would compute with scrambled weights or rounded scales."""
    layer = _layer("nf4", nested)
    # What Linear4bit.forward does on a CPU with AVX-512 BF16, called directly so that the test runs on every CPU.
    layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    with pytest.raises(ValueError, match=r"repacked this weight for an eval forward.*Load the checkpoint again"):
        from_params4bit(layer.weight)
    saved = layer.state_dict()  # turns the codes back, and has lost the scales
    with pytest.raises(ValueError, match="repacked this weight for an eval forward"):
        from_params4bit(layer.weight)
    if nested:  # whole again as a file, with other scales: read as what it says
        assert torch.equal(
            dequantize(from_bnb_tensors(saved)), functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        )
    else:
        with pytest.raises(ValueError, match=r"absmax has the shape \(2, 96\).*saved before inference"):
            from_bnb_tensors(saved)


def test_scales_that_are_added_in_another_dtype_are_refused():
    """bitsandbytes writes such a file for a bfloat16 model saved after evaluation: read as float32 it is another weight."""
    torch.manual_seed(5)
    layer = bnb.nn.Linear4bit(128, 96, bias=False, compress_statistics=True, quant_type="nf4").to(torch.bfloat16).to("cpu")
    weight = layer.weight
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(ValueError, match=r"nested_dtype='bfloat16'.*saved before inference"):
        from_bnb_tensors(layer.state_dict())


def test_scales_in_16_bits_are_widened():
    """If it failed, checkpoints with half-precision absmax could not be read, though bitsandbytes reads them."""
    state = _layer("nf4", nested=False).state_dict()
    state["weight.absmax"] = state["weight.absmax"].to(torch.bfloat16)
    packed = from_bnb_tensors(state)
    assert torch.equal(packed.absmax, state["weight.absmax"].to(torch.float32))


def _edited(state: dict[str, torch.Tensor], **changes) -> dict[str, torch.Tensor]:
    key = "weight.quant_state.bitsandbytes__nf4"
    settings = json.loads(bytes(state[key].tolist())) | changes
    return state | {key: torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)}


def test_what_does_not_fit_is_refused():
    """If it failed, a foreign or broken checkpoint would decode to noise, or be written where nobody can read it."""
    state = _layer("nf4", nested=True).state_dict()
    key = "weight.quant_state.bitsandbytes__nf4"
    with pytest.raises(ValueError, match=r"layer has up\.weight, up\.weight\.absmax.*found \[\]"):
        from_bnb_tensors(state, "up")
    with pytest.raises(ValueError, match=r"found \['weight'\]"):
        from_bnb_tensors({"weight": torch.ones(4, 4)})
    with pytest.raises(ValueError, match="is not the JSON"):
        from_bnb_tensors(state | {key: torch.tensor([1, 2], dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"is not the JSON.*blocksize"):
        from_bnb_tensors(state | {key: torch.tensor(list(b"{}"), dtype=torch.uint8)})
    with pytest.raises(ValueError, match="says quant_type='fp4'"):
        from_bnb_tensors(_edited(state, quant_type="fp4"))
    with pytest.raises(ValueError, match=r"matrix \(N, K\) with a block size; bitsandbytes gives the shape \[2, 48, 128\]"):
        from_bnb_tensors(_edited(state, shape=[2, 48, 128]))
    with pytest.raises(ValueError, match=r"weight: nf4 weight of shape \(96, 64\).*codes must be uint8 of shape \(3072,\)"):
        from_bnb_tensors(_edited(state, shape=[96, 64]))
    with pytest.raises(ValueError, match=r"gives the shape \[96, 128\] and the blocksize '64'"):
        from_bnb_tensors(_edited(state, blocksize="64"))
    with pytest.raises(ValueError, match="nested_blocksize=128"):
        from_bnb_tensors(_edited(state, nested_blocksize=128))
    with pytest.raises(ValueError, match="quant_map is not nf4's table"):
        from_bnb_tensors(state | {"weight.quant_map": functional.get_4bit_type("fp4", device="cpu")})
    with pytest.raises(ValueError, match="has no quant_state: bitsandbytes quantizes a layer when it is moved"):
        from_params4bit(bnb.nn.Linear4bit(64, 64).weight)
    with pytest.raises(ValueError, match=r"holds .* weights, not int4"):
        to_bnb_tensors(quantize(torch.ones(2, 64)), torch.bfloat16)
    with pytest.raises(ValueError, match="not block_size=48"):
        to_quant_state(quantize(torch.ones(2, 96), "nf4", block_size=48), torch.bfloat16)
    with pytest.raises(ValueError, match=r"decodes to .*not torch.float64"):
        to_bnb_tensors(quantize(torch.ones(2, 64), "nf4"), torch.float64)
