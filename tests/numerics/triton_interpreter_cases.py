"""What test_triton_interpreter.py runs in a process of its own, where TRITON_INTERPRET=1 was set before triton was imported.

The kernels run on the CPU as numpy, one program after the other, through the same dispatch as on a GPU. float16 and float32
only: the interpreter has no bfloat16 arithmetic. Every torch.empty is filled with NaN first (the ``poison`` fixture), so that
an output or a partial sum which no program writes is seen.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch

from stillhouse.kernels import formats, gpu, reference
from stillhouse.kernels.formats import PackedWeight

FLOATS = [torch.float16, torch.float32]
# (N, K). Words and tiles that do not divide; several tiles of N and of K, hence several splits; then no whole words, odd sizes.
IN_WORDS = [(70, 264), (136, 1024)]
ODD = [(33, 45), (7, 36), (3, 1)]
LAYOUTS = {
    "int4-32": ("int4", {"group_size": 32}),
    "int4-64-asymmetric": ("int4", {"group_size": 64, "symmetric": False}),
    "int4-128": ("int4", {"group_size": 128}),
    "int4-8-asymmetric": ("int4", {"group_size": 8, "symmetric": False}),
    "nf4": ("nf4", {"double_quant": False}),
    "nf4-nested": ("nf4", {}),
    "nf4-nested-128": ("nf4", {"block_size": 128}),
    "fp4-nested": ("fp4", {}),
    "fp4": ("fp4", {"double_quant": False}),
}
NOT_IN_WORDS = {
    "int4-12": ("int4", {"group_size": 12}),
    "int4-5-asymmetric": ("int4", {"group_size": 5, "symmetric": False}),
    "nf4-nested-20": ("nf4", {"block_size": 20}),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
swept_layouts = pytest.mark.parametrize("layout", ["int4-32", "int4-64-asymmetric", "nf4-nested"])


@pytest.fixture(autouse=True)
def poison():
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "fill_uninitialized_memory is off: nothing would be poisoned"
    yield
    torch.use_deterministic_algorithms(False)


def make_packed(layout: str, shape: tuple[int, int], seed: int = 0) -> PackedWeight:
    format, options = (LAYOUTS | NOT_IN_WORDS)[layout]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    packed = formats.quantize(weight, "nf4" if format == "fp4" else format, **options)
    return dataclasses.replace(packed, format=format)


def as_gpu_weight(packed: PackedWeight) -> gpu.GpuWeight:
    if packed.format == "int4":
        return gpu.GpuWeight(packed.shape, packed.group_size, packed.codes, packed.scales, packed.zero_points)
    nested = (packed.nested_absmax, packed.nested_quant_map, packed.nested_offset)
    return gpu.GpuWeight(packed.shape, packed.block_size, packed.codes, packed.absmax, None, *nested, packed.format)


def randn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: torch.Tensor, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """``actual`` is ``left @ right + bias`` within the roundings that the paths declare; ``right`` is exact, in float64."""
    bias = torch.zeros((), dtype=torch.float64) if bias is None else bias.double()
    expected = left.double() @ right + bias
    magnitude = left.double().abs() @ right.abs() + bias.abs()
    # The sum in float32, with a scale multiplied in and up to 32 splits; then one rounding, or two where a bias comes after.
    terms = right.shape[0] + 34
    bound = terms * 2.0**-24 * magnitude + torch.finfo(actual.dtype).eps * (expected.abs() + bias.abs())
    bound += torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps  # below the normal range
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), (error / bound).max()


@layouts
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", IN_WORDS + ODD)
def test_decode_is_the_reference(layout, dtype, shape):
    """If it failed, every product with many rows would be with another weight than the one in the file."""
    packed = make_packed(layout, shape)
    assert torch.equal(gpu.decode(as_gpu_weight(packed), dtype), formats.dequantize(packed, dtype))


@pytest.mark.parametrize("layout", NOT_IN_WORDS)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_groups_that_end_inside_a_word(layout, num_rows):
    """If it failed, the fast kernels would give weights at a group's border the neighbour's scale."""
    packed = make_packed(layout, (30, 64))
    weight = as_gpu_weight(packed)
    assert gpu.forward_path(num_rows, torch.float16, weight, "bf16") == "decode"
    assert torch.equal(gpu.decode(weight, torch.float16), formats.dequantize(packed, torch.float16))
    x = randn(num_rows, 64, dtype=torch.float16, seed=1)
    assert_close(gpu.linear(x, weight, None, "bf16"), x, formats.dequantize(packed, torch.float16).double().T)


@layouts
@pytest.mark.parametrize("num_columns", [256, 264])  # whole groups of words, for all groups up to 128; and not
@pytest.mark.parametrize("num_rows", [1, 16, 64])
def test_one_hot_activations_give_the_decoded_weight(layout, num_rows, num_columns):
    """If it failed, a fused kernel would multiply by another weight than the file's: a nibble, a scale or a place mixed up."""
    packed = make_packed(layout, (70, num_columns))
    weight = as_gpu_weight(packed)
    expected = formats.dequantize(packed, torch.float16)
    eye = torch.eye(num_columns, dtype=torch.float16)
    # One row at a time is slow under the interpreter: one word's places, another word, and the end of the row.
    columns = [*range(160, 168), num_columns - 1] if num_rows == 1 else range(num_columns)
    assert gpu.forward_path(num_rows, torch.float16, weight, "bf16") == ("gemv" if num_rows == 1 else "skinny")
    for rows in _batched(columns, num_rows):
        if num_rows == 1 or len(rows) > 1:
            assert torch.equal(gpu.linear(eye[rows], weight, None, "bf16"), expected.T[rows])


def _batched(values: Sequence[int], size: int) -> list[list[int]]:
    return [list(values[start : start + size]) for start in range(0, len(values), size)]


@layouts
@pytest.mark.parametrize("num_columns", [256, 264])
def test_one_hot_gradients_give_the_decoded_weight(layout, num_columns):
    """If it failed, the fused backward would multiply by another weight than the forward."""
    packed = make_packed(layout, (70, num_columns))
    weight = as_gpu_weight(packed)
    eye = torch.eye(70, dtype=torch.float16)
    for rows in _batched(range(70), 16):
        assert gpu.backward_path(len(rows), torch.float16, weight, "bf16") == "skinny"
        assert torch.equal(gpu.linear_grad_x(eye[rows], weight, "bf16"), formats.dequantize(packed, torch.float16)[rows])


@swept_layouts
@pytest.mark.parametrize("shape", [*IN_WORDS, ODD[0]])
@pytest.mark.parametrize(
    ("num_rows", "dtype"), [*itertools.product([1, 65], FLOATS), *((m, FLOATS[0]) for m in (2, 16, 17, 33, 64))]
)
def test_forward_is_within_derived_bounds(layout, dtype, shape, num_rows):
    """If it failed, 4-bit inference on a GPU would carry an error beyond the rounding it declares."""
    packed = make_packed(layout, shape)
    weight = as_gpu_weight(packed)
    x = randn(num_rows, shape[1], dtype=dtype, seed=num_rows)
    bias = randn(shape[0], dtype=dtype, seed=2)
    # With one row the weight is not rounded to the dtype of x.
    rounds_weight = gpu.forward_path(num_rows, dtype, weight, "bf16") != "gemv"
    exact = formats.dequantize(packed, dtype if rounds_weight else torch.float32).double()
    assert_close(gpu.linear(x, weight, bias, "bf16"), x, exact.T, bias)
    assert_close(gpu.linear(x, weight, None, "bf16"), x, exact.T)


@swept_layouts
@pytest.mark.parametrize("shape", [(70, 264), (520, 136), ODD[0]])
@pytest.mark.parametrize(("num_rows", "dtype"), [*itertools.product([1, 17], FLOATS), (2, FLOATS[0]), (16, FLOATS[0])])
def test_backward_is_within_derived_bounds(layout, dtype, shape, num_rows):
    """If it failed, adapters below a 4-bit layer would train on gradients of another weight."""
    packed = make_packed(layout, shape)
    dy = randn(num_rows, shape[0], dtype=dtype, seed=num_rows)
    dx = gpu.linear_grad_x(dy, as_gpu_weight(packed), "bf16")
    assert_close(dx, dy, formats.dequantize(packed, dtype).double())


def test_the_shapes_above_cut_the_sum_into_parts():
    """If it failed, no test here would add up partial sums, and a mistake in the splits would go out unseen."""
    device = torch.device("cpu")
    _, block_n, block_w, _ = gpu.skinny_tile(gpu._capability(device), 2)
    forward = gpu.num_splits(-(-136 // block_n), 1024 // (8 * block_w), 1024 // (16 * 2), gpu._num_multiprocessors(device))
    _, block_n, block_w, _ = gpu.GRADIENT_TILE
    backward = gpu.num_splits(-(-136 // (8 * block_w)), -(-520 // block_n), 520 // (16 * 2), gpu._num_multiprocessors(device))
    assert (forward, backward) == (2, 8)


@pytest.mark.parametrize("num_rows", [1, 2, 65])
@pytest.mark.parametrize("layout", ["int4-32", "nf4-nested"])
def test_nan_and_infinity_come_through(layout, num_rows):
    """If it failed, a diverged activation would come out of a 4-bit layer as an ordinary number."""
    packed = make_packed(layout, (16, 64))
    x = randn(num_rows, 64, dtype=torch.float16, seed=3)
    x[0, 5], x[-1, 40] = float("nan"), float("inf")
    y = gpu.linear(x, as_gpu_weight(packed), None, "bf16")
    expected = reference.linear_reference(x.float(), formats.dequantize(packed, torch.float32), None, "bf16")
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y[y.isinf()].float(), expected[expected.isinf()])


def test_codes_that_are_a_slice_of_a_file():
    """If it failed, a safetensors file mapped at an odd offset would crash or be read a byte off."""
    packed = make_packed("int4-32", (24, 64))
    storage = torch.zeros(packed.codes.numel() + 1, dtype=torch.uint8)
    storage[1:] = packed.codes.flatten()
    sliced = dataclasses.replace(packed, codes=storage[1:].view(packed.codes.shape))
    weight = as_gpu_weight(sliced)
    x = randn(2, 64, dtype=torch.float16, seed=4)
    assert gpu.forward_path(2, torch.float16, weight, "bf16") == "decode"
    assert_close(gpu.linear(x, weight, None, "bf16"), x, formats.dequantize(packed, torch.float16).double().T)


@pytest.mark.parametrize("layout", ["int4-32", "nf4-nested"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_exact_mode_is_the_reference(layout, dtype):
    """If it failed, a test that compares files in exact mode would compare a kernel's rounding."""
    packed = make_packed(layout, (70, 264))
    x, dy = randn(3, 264, dtype=dtype, seed=5), randn(3, 70, dtype=dtype, seed=6)
    weight, decoded = as_gpu_weight(packed), formats.dequantize(packed)
    assert torch.equal(gpu.linear(x, weight, None, "exact"), reference.linear_reference(x, decoded, None, "exact"))
    assert torch.equal(gpu.linear_grad_x(dy, weight, "exact"), reference.input_gradient_reference(dy, decoded, "exact"))


@pytest.mark.parametrize("num_rows", [1, 2])
def test_leading_dimensions_and_strides(num_rows):
    """If it failed, a batch of sequences, a transposed activation or an empty batch would be multiplied as something else."""
    packed = make_packed("int4-32", (24, 64))
    weight, decoded = as_gpu_weight(packed), formats.dequantize(packed, torch.float16).double()
    x = randn(64, num_rows, dtype=torch.float16, seed=7).T
    y = gpu.linear(x.unsqueeze(0), weight, None, "bf16")
    assert y.shape == (1, num_rows, 24)
    assert_close(y[0], x, decoded.T if num_rows > 1 else formats.dequantize(packed).double().T)
    assert gpu.linear(x[:0], weight, None, "bf16").shape == (0, 24)
    assert gpu.linear_grad_x(x.new_empty(0, 24), weight, "bf16").shape == (0, 64)
