"""Properties of nibble packing, and of encode-decode round trips, on arbitrary shapes and values."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.kernels.compressed_tensors import from_compressed_tensors, to_compressed_tensors
from stillhouse.kernels.formats import PackedWeight, dequantize, quantize
from stillhouse.kernels.reference import pack_nibbles, unpack_nibbles

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
@given(weights, st.sampled_from([1, 3, 32, 64]), st.booleans())
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


@some
@given(codes_rows, st.integers(0, 2**31), st.sampled_from([1, 5, 32]), st.booleans())
def test_compressed_tensors_round_trip_keeps_every_byte(rows, seed, group_size, asymmetric):
    """If it failed, what is emitted would not be the weight that was trained and tested."""
    codes = torch.tensor(rows, dtype=torch.uint8).repeat(1, group_size)
    num_rows, num_columns = codes.shape
    generator = torch.Generator().manual_seed(seed)
    grouped = (num_rows, num_columns // group_size)
    packed = PackedWeight(
        "int4",
        (num_rows, num_columns),
        pack_nibbles(codes, high_first=False),
        group_size=group_size,
        scales=torch.randn(grouped, generator=generator).to(torch.float16),
        zero_points=torch.randint(0, 16, grouped, generator=generator, dtype=torch.uint8) if asymmetric else None,
    )
    back = from_compressed_tensors(to_compressed_tensors(packed), group_size)
    assert back.tensors().keys() == packed.tensors().keys()
    assert all(torch.equal(back.tensors()[name], tensor) for name, tensor in packed.tensors().items())
