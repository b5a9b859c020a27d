"""The 4-bit formats: what bytes mean, and how weights are rounded."""

from __future__ import annotations

import pytest
import torch

from stillhouse.kernels import reference
from stillhouse.kernels.formats import PackedWeight, dequantize, empty_packed, quantize
from stillhouse.kernels.rounding import MAX_SCALE, MIN_SCALE


def _groups_of(w: torch.Tensor, group_size: int) -> torch.Tensor:
    return w.view(w.shape[0], -1, group_size)


def test_int4_worked_example():
    """The eight numbers of kernels/README.md: a file read with the other nibble order would be noise."""
    codes = torch.tensor([[8, 9, 7, 15, 0, 12, 4, 8]], dtype=torch.uint8)
    packed = reference.pack_nibbles(codes, high_first=False)
    assert packed.tolist() == [[0x98, 0xF7, 0xC0, 0x84]]
    weight = PackedWeight("int4", (1, 8), packed, group_size=8, scales=torch.tensor([[0.5]], dtype=torch.float16))
    assert dequantize(weight).tolist() == [[0.0, 0.5, -0.5, 3.5, -4.0, 2.0, -2.0, 0.0]]


def test_nf4_worked_example():
    """The eight numbers of kernels/README.md in bitsandbytes' order, over two rows and two blocks."""
    codes = torch.tensor([0, 15, 7, 8, 15, 0, 7, 7], dtype=torch.uint8)
    packed = reference.pack_nibbles(codes, high_first=True)
    assert packed.tolist() == [0x0F, 0x78, 0xF0, 0x77]
    weight = PackedWeight("nf4", (2, 4), packed, block_size=4, absmax=torch.tensor([2.0, 3.0]))
    assert dequantize(weight).tolist() == [[-2.0, 2.0, 0.0, 2 * 0.07958029955625534], [3.0, -3.0, 0.0, 0.0]]


def test_fp4_worked_example():
    """All 16 codes in the order of the bytes: FP4's table is not sorted, and nf4's would read noise."""
    packed = reference.pack_nibbles(torch.arange(16, dtype=torch.uint8), high_first=True)
    assert packed.tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    weight = PackedWeight("fp4", (2, 8), packed, block_size=8, absmax=torch.tensor([12.0, 6.0]))
    assert dequantize(weight).tolist() == [
        [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0],
        [0.0, -0.03125, -4, -6, -2, -3, -1, -1.5],
    ]


def test_fp4_is_read_but_not_written():
    """If it failed, a new checkpoint would be written in the less accurate of two formats of the same size."""
    with pytest.raises(ValueError, match="not 'fp4', which is only read; nf4 has its layout and is more accurate"):
        quantize(torch.ones(2, 64), "fp4")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_search", [True, False])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.05, 40.0, 5e4])
def test_int4_scales_are_exact_in_both_16_bit_types(symmetric, scale_search, size):
    """If it failed, a checkpoint loaded in bfloat16 would decode to other weights than in float16."""
    w = torch.randn(9, 96, generator=torch.Generator().manual_seed(0)) * size
    scales = quantize(w, symmetric=symmetric, scale_search=scale_search).scales
    assert torch.equal(scales.to(torch.bfloat16).to(torch.float32), scales.to(torch.float32))
    assert scales.abs().min() >= MIN_SCALE
    assert scales.abs().max() <= MAX_SCALE


@pytest.mark.parametrize("scale_search", [True, False])
def test_int4_codes_are_the_nearest_for_the_stored_scale(scale_search):
    """If it failed, codes would have been chosen for a scale that is not the one in the file."""
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    packed = quantize(w, scale_search=scale_search)
    scales = packed.scales.to(torch.float32).repeat_interleave(32, dim=1)
    levels = scales.unsqueeze(-1) * torch.arange(-8.0, 8.0)
    best = (w.unsqueeze(-1) - levels).abs().amin(-1)
    assert torch.equal((w - dequantize(packed)).abs(), best)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scale_search_is_never_worse_and_mostly_better(symmetric):
    """If it failed, the default rounding would lose accuracy that the plain one keeps."""
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    errors = {
        search: _groups_of(w - dequantize(quantize(w, symmetric=symmetric, scale_search=search)), 32).square().sum(-1)
        for search in (True, False)
    }
    assert (errors[True] <= errors[False]).all()
    assert errors[True].sum() < 0.95 * errors[False].sum()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_weights_on_an_int4_grid_are_kept_exactly(sign):
    """All 16 levels, the lone extreme of either sign: if it failed, a second quantization would not be lossless."""
    levels = sign * 0.0390625 * torch.arange(-8.0, 8.0).repeat(2)
    packed = quantize(levels.view(1, 32))
    assert torch.equal(dequantize(packed), levels.view(1, 32))
    assert (packed.scales > 0).all() == (sign > 0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_steps", range(1, 8))
@pytest.mark.parametrize("step", [0.0390625, 2.0**-14])
def test_weights_on_a_coarser_grid_are_kept_exactly(symmetric, num_steps, step):
    """Groups that use few of the 16 levels: if it failed, weights rounded elsewhere (5 levels, say) would be rounded again."""
    w = step * torch.arange(-num_steps, num_steps + 1.0).view(1, -1)
    assert torch.equal(dequantize(quantize(w, symmetric=symmetric)), w)


def test_int4_decodes_without_loss_to_float16():
    """If it failed, a float16 server would compute with other weights than the float32 reference."""
    packed = quantize(torch.randn(8, 96, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(dequantize(packed, torch.float16).to(torch.float32), dequantize(packed))


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_zero_groups_decode_to_zero_beside_others(format):
    """If it failed, a pruned row would turn into NaN through 0 / 0."""
    w = torch.randn(4, 128, generator=torch.Generator().manual_seed(4))
    w[1] = 0.0
    w[2, 64:] = 0.0
    for options in ({"symmetric": True}, {"symmetric": False}) if format == "int4" else ({"double_quant": True}, {}):
        decoded = dequantize(quantize(w, format, **options))
        assert torch.equal(decoded[1], torch.zeros(128))
        assert torch.equal(decoded[2, 64:], torch.zeros(64))
        assert decoded[0].abs().min() >= 0
        assert torch.isfinite(decoded).all()
    packed = quantize(torch.zeros(1, 32))
    assert packed.scales.item() == 1.0
    assert (packed.codes == 0x88).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 33), (7, 95), (2, 130)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_ragged_last_group_is_a_group_of_its_own(shape, symmetric):
    """If it failed, layers whose width is no multiple of 32 would decode to shifted weights."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    decoded = dequantize(quantize(w, symmetric=symmetric))
    assert decoded.shape == w.shape
    columns = [dequantize(quantize(w[:, i : i + 32], symmetric=symmetric)) for i in range(0, shape[1], 32)]
    assert torch.equal(decoded, torch.cat(columns, dim=1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_a_weight_that_is_not_finite_is_refused_with_its_position(bad, format):
    """If it failed, one NaN would spoil a whole group silently."""
    w = torch.ones(4, 40)
    w[2, 37] = bad
    with pytest.raises(ValueError, match=r"weight\[2, 37\] is -?(nan|inf) \(1 such"):
        quantize(w, format)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((torch.ones(2, 3) * 1e6),), r"weights must lie within ±456960; weight\[0, 0\]"),
        ((torch.ones(2, 3), "int3"), "format must be one of"),
        ((torch.ones(3),), "float matrix"),
        ((torch.ones(2, 3, dtype=torch.int32),), "float matrix"),
        ((torch.ones(0, 3),), "float matrix"),
    ],
)
def test_what_cannot_be_quantized_is_refused(arguments, message):
    """If it failed, a wrong call would give a checkpoint of clipped or meaningless weights."""
    with pytest.raises(ValueError, match=message):
        quantize(*arguments)


def test_tensors_that_do_not_belong_together_are_refused():
    """If it failed, a truncated or mislabelled file would decode to noise."""
    good = quantize(torch.randn(4, 64))
    with pytest.raises(ValueError, match=r"scales must be float16 of shape \(4, 2\), is float16 of shape \(4, 1\)"):
        PackedWeight("int4", (4, 64), good.codes, group_size=32, scales=good.scales[:, :1])
    with pytest.raises(ValueError, match="absmax must be absent"):
        PackedWeight("int4", (4, 64), good.codes, group_size=32, scales=good.scales, absmax=torch.ones(4))
    with pytest.raises(ValueError, match="block_size >= 1"):
        PackedWeight("nf4", (4, 64), good.codes)
    with pytest.raises(ValueError, match="an fp4 weight has a block_size >= 1 and no group_size"):
        PackedWeight("fp4", (4, 64), good.codes, group_size=32, scales=good.scales)
    with pytest.raises(ValueError, match=r"format must be one of .*'fp4'.*not 'int8'"):
        PackedWeight("int8", (4, 64), good.codes)


@pytest.mark.parametrize(
    ("format", "options", "bits"),
    [
        ("int4", {"group_size": 32}, 4.5),
        ("int4", {"group_size": 128}, 4.125),
        ("nf4", {"double_quant": False}, 4.5),
        ("nf4", {"double_quant": True}, 4.127),
    ],
)
def test_sizes_are_what_the_formats_promise(format, options, bits):
    """If it failed, a plan of disk and memory made from bits per weight would be wrong; empty_packed must agree."""
    packed = quantize(torch.randn(512, 1024), format, scale_search=False, **options)
    map_bytes = 1028 if packed.nested_absmax is not None else 0  # the 256 levels and the offset, once a weight
    assert 8 * (packed.size_bytes - map_bytes) / (512 * 1024) == pytest.approx(bits, abs=5e-4)
    empty = empty_packed((512, 1024), format, device="meta", **options)
    assert {n: (t.shape, t.dtype) for n, t in empty.tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in packed.tensors().items()
    }
    assert packed.to("meta").device == torch.device("meta")


# nf4: the encoder against bitsandbytes', and against the formula (the decoder: test_bnb_tensors.py)


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_encoder_is_no_worse_than_bitsandbytes(double_quant):
    """If it failed, our QLoRA bases would start further from the 16-bit model than bitsandbytes' do."""
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(128, 512, generator=torch.Generator().manual_seed(8)) * 0.02
    theirs = functional.dequantize_4bit(
        *functional.quantize_4bit(w, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    )
    ours = dequantize(quantize(w, "nf4", double_quant=double_quant))
    # 1e-4 of slack: values near a midpoint may go either way by the last bit of a quotient.
    assert (ours - w).norm() <= (theirs - w).norm() * (1 + 1e-4)


def test_dynamic_map_is_bitsandbytes_own():
    """If it failed, nested scales written here would decode differently there."""
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(reference.dynamic_map(torch.device("cpu")), functional.create_dynamic_map())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 33), (64, 96), (5, 129), (130, 257)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_follows_the_formula_on_every_shape(shape, double_quant):
    """Blocks that cross rows, odd sizes, a short last block: bitsandbytes itself is wrong on some of these."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    packed = quantize(w, "nf4", double_quant=double_quant)
    decoded = dequantize(packed).view(-1)
    scales = packed.absmax
    if double_quant:
        group = torch.arange(scales.numel()) >> 8
        scales = packed.nested_quant_map[scales.long()] * packed.nested_absmax[group] + packed.nested_offset
    flat = torch.arange(w.numel())
    byte = packed.codes[flat // 2].long()
    code = torch.where(flat % 2 == 0, byte >> 4, byte & 15)
    assert torch.equal(decoded, torch.tensor(reference.NF4_TABLE)[code] * scales[flat // 64])
    # Half of the widest gap between levels (1 - 0.7230, lower side 1 - 0.6962) bounds the error of nearest rounding; a
    # nested absmax is off by at most half its map's widest step, 0.0079, of the largest deviation from the mean.
    slack = 0.0 if not double_quant else 0.008 * packed.nested_absmax.max()
    bound = (0.1520 * scales[flat // 64].abs() + slack).view(shape)
    assert ((decoded.view(shape) - w).abs() <= bound).all()
