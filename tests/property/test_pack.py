"""Properties of nibble packing, and of round trips through encoders, other layouts and files, on arbitrary shapes."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.kernels.bitsandbytes import from_bnb_tensors, to_bnb_tensors
from stillhouse.kernels.compressed_tensors import from_compressed_tensors, to_compressed_tensors
from stillhouse.kernels.formats import PackedWeight, dequantize, quantize
from stillhouse.kernels.gguf import from_q4_0, to_q4_0
from stillhouse.kernels.gptq import from_gptq, to_gptq
from stillhouse.kernels.reference import dynamic_map, pack_nibbles, unpack_nibbles

# No deadline: a first call may import or compile; two cores are shared.
some = settings(deadline=None, max_examples=60)

codes_rows = st.integers(1, 5).flatmap(
    lambda rows: st.integers(1, 19).flatmap(
        lambda columns: st.lists(st.lists(st.integers(0, 15), min_size=columns, max_size=columns), min_size=rows, max_size=rows)
    )
)
weights = st.tuples(
    st.integers(1, 6), st.integers(1, 90), st.integers(0, 2**31), st.sampled_from([1e-5, 1e-3, 0.05, 1.0, 300.0])
)


def _weight(spec: tuple[int, int, int, float]) -> torch.Tensor:
    rows, columns, seed, size = spec
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * size


@some
@given(codes_rows, st.booleans())
def test_unpack_undoes_pack(rows, high_first):
    """If it failed, a saved weight would come back with other codes."""
    codes = torch.tensor(rows, dtype=torch.uint8)
    packed = pack_nibbles(codes, high_first=high_first)
    assert packed.shape == (codes.shape[0], (codes.shape[1] + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, codes.shape[1], high_first=high_first), codes)


@some
@given(codes_rows)
def test_the_two_nibble_orders_are_each_other_with_nibbles_swapped(rows):
    """If it failed, int4 and nf4 bytes would not be what compressed-tensors and bitsandbytes read."""
    codes = torch.tensor(rows, dtype=torch.uint8)
    low, high = pack_nibbles(codes, high_first=False), pack_nibbles(codes, high_first=True)
    assert torch.equal((low >> 4) | (low << 4), high)
    assert torch.equal(low[:, 0] & 0x0F, codes[:, 0])


@some
@given(weights, st.sampled_from([1, 3, 32, 64, 128]), st.booleans())
def test_encoding_a_decoded_int4_weight_changes_no_bit(spec, group_size, symmetric):
    """If it failed, quantizing a model twice would drift away from the one that was validated."""
    once = dequantize(quantize(_weight(spec), "int4", group_size=group_size, symmetric=symmetric))
    twice = dequantize(quantize(once, "int4", group_size=group_size, symmetric=symmetric))
    assert torch.equal(once.view(torch.int32), twice.view(torch.int32))


@some
@given(weights, st.sampled_from([1, 3, 64]))
def test_encoding_a_decoded_plain_nf4_weight_changes_no_bit(spec, block_size):
    """If it failed, saving and re-quantizing an nf4 base would move the weights an adapter was trained on."""
    once = dequantize(quantize(_weight(spec), "nf4", block_size=block_size, double_quant=False))
    twice = dequantize(quantize(once, "nf4", block_size=block_size, double_quant=False))
    assert torch.equal(once.view(torch.int32), twice.view(torch.int32))


def _random_int4(rows: int, columns: int, group_size: int, seed: int, asymmetric: bool, lowest_zero: int = 0) -> PackedWeight:
    """Any codes, any float16 scales of either sign, any zero points: what a file may hold, not only what we quantize to."""
    generator = torch.Generator().manual_seed(seed)
    grouped = (rows, -(-columns // group_size))
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(lowest_zero, 16, grouped, generator=generator, dtype=torch.uint8)
    return PackedWeight(
        "int4",
        (rows, columns),
        pack_nibbles(codes, high_first=False),
        group_size=group_size,
        scales=torch.randn(grouped, generator=generator).to(torch.float16),
        zero_points=zeros if asymmetric else None,
    )


def _random_blocks(rows: int, columns: int, block_size: int, seed: int, kind: str, nested: bool) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    num_blocks = -(-rows * columns // block_size)
    codes = torch.randint(0, 16, (rows * columns,), generator=generator, dtype=torch.uint8)
    scales = {"absmax": torch.rand(num_blocks, generator=generator)}
    if nested:
        scales = {
            "absmax": torch.randint(0, 256, (num_blocks,), generator=generator, dtype=torch.uint8),
            "nested_absmax": torch.rand(-(-num_blocks // 256), generator=generator),
            "nested_quant_map": dynamic_map(torch.device("cpu")).clone(),
            "nested_offset": torch.rand(1, generator=generator),
        }
    packed = pack_nibbles(codes, high_first=True)
    return PackedWeight(kind, (rows, columns), packed, block_size=block_size, **scales)


def _assert_same(back: PackedWeight, packed: PackedWeight) -> None:
    assert dataclasses.replace(back, **packed.tensors()).__dict__ == packed.__dict__  # all but the tensors' values
    assert back.tensors().keys() == packed.tensors().keys()
    for name, tensor in packed.tensors().items():
        assert torch.equal(back.tensors()[name], tensor), name


any_shape = {"rows": st.integers(1, 40), "columns": st.integers(1, 150), "seed": st.integers(0, 2**31)}
some_groups = {"group_size": st.sampled_from([1, 5, 32, 64, 128]), "num_groups": st.integers(1, 3)}


@some
@given(rows=any_shape["rows"], seed=any_shape["seed"], asymmetric=st.booleans(), **some_groups)
def test_compressed_tensors_round_trip_keeps_every_byte(rows, seed, asymmetric, group_size, num_groups):
    """If it failed, what is emitted would not be the weight that was trained and tested."""
    packed = _random_int4(rows, num_groups * group_size, group_size, seed, asymmetric)
    _assert_same(from_compressed_tensors(to_compressed_tensors(packed), group_size), packed)


@some
@given(
    eights=st.integers(1, 5),
    seed=any_shape["seed"],
    asymmetric=st.booleans(),
    checkpoint_format=st.sampled_from(["gptq", "gptq_v2"]),
    group_size=st.sampled_from([8, 24, 32, 64, 128]),
    num_groups=st.integers(1, 3),
)
def test_gptq_round_trip_keeps_every_byte(eights, seed, asymmetric, checkpoint_format, group_size, num_groups):
    """If it failed, a GPTQ checkpoint taken over and written back would serve other weights."""
    lowest_zero = 1 if checkpoint_format == "gptq" else 0
    packed = _random_int4(8 * eights, num_groups * group_size, group_size, seed, asymmetric, lowest_zero)
    back = from_gptq(to_gptq(packed, checkpoint_format), group_size, sym=not asymmetric, checkpoint_format=checkpoint_format)
    _assert_same(back, packed)


@some
@given(rows=any_shape["rows"], seed=any_shape["seed"], num_blocks=st.integers(1, 5))
def test_q4_0_round_trip_keeps_every_byte(rows, seed, num_blocks):
    """If it failed, a GGUF file taken over and written back would hold other weights."""
    packed = _random_int4(rows, 32 * num_blocks, 32, seed, asymmetric=False)
    _assert_same(from_q4_0(to_q4_0(packed), packed.shape), packed)


@some
@given(**any_shape, block_size=st.sampled_from([32, 64, 256]), kind=st.sampled_from(["nf4", "fp4"]), nested=st.booleans())
def test_bitsandbytes_round_trip_keeps_every_byte(rows, columns, seed, block_size, kind, nested):
    """If it failed, a base taken over from bitsandbytes and given back would not be the base adapters were trained on."""
    packed = _random_blocks(rows, columns, block_size, seed, kind, nested)
    _assert_same(from_bnb_tensors(to_bnb_tensors(packed, torch.bfloat16)), packed)


@some
@given(**any_shape, size=st.sampled_from([1, 7, 32, 64]), kind=st.sampled_from(["int4", "nf4", "fp4"]), more=st.booleans())
def test_a_file_gives_back_what_was_saved(rows, columns, seed, size, kind, more):
    """Any shape, odd ones too: if it failed, a saved weight would come back shifted, cut or as another format."""
    if kind == "int4":
        packed = _random_int4(rows, columns, size, seed, asymmetric=more)
    else:
        packed = _random_blocks(rows, columns, size, seed, kind, nested=more)
    with tempfile.TemporaryDirectory() as folder:
        packed.save(Path(folder, "weight.safetensors"))
        _assert_same(PackedWeight.load(Path(folder, "weight.safetensors")), packed)
