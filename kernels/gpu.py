"""4-bit matmuls on NVIDIA GPUs (compute capability 8.0 and up): which kernel serves, and ``register`` for the torch operators.

Every path reads the canonical tensors; nothing is repacked and nothing is kept between calls. By M, the rows of x:

| M          | forward                                          | backward (dx = dy @ W)            |
|------------|--------------------------------------------------|-----------------------------------|
| 1          | ``gemv_kernel`` (any float up to 32 bits)        | as 2 … 16                         |
| 2 … 16     | ``skinny_kernel``: tensor cores, K split         | ``skinny_grad_x_kernel``, N split |
| 17 … 64    | ``skinny_kernel``                                | decode kernel + torch.matmul      |
| more       | decode kernel + torch.matmul (cuBLAS)            | decode kernel + torch.matmul      |

The first three need words of eight weights: K, group_size and block_size multiples of 8, and codes that start at a multiple of
4 bytes. Everything else, and float32 with M > 1, goes through the decode kernels, which take any shape. ``exact``, and
float64, is the plain-torch reference. float32 products are never TF32.

The decoded weight is scratch from torch's caching allocator, freed with the call: the next layer gets the same block. A
buffer kept here would be raced for by two streams, and one that grows would free memory which a captured CUDA graph still
writes to. Nothing waits for the device, so a call can be captured in a graph; the first call of each kernel compiles it, and
has to come before the capture.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stillhouse.kernels import reference

WORD = 8
"""Weights in a 32-bit word of codes."""
MAX_SKINNY_ROWS = 64
MAX_SKINNY_GRADIENT_ROWS = 16
MIN_CAPABILITY = (8, 0)
_MANTISSA = 0x4B000000  # the bits of 2.0**23; see triton_decode.decode
_LAUNCH = {"num_stages": 1, "enable_fp_fusion": False}
_DECODE_BYTES = 1024  # per program of the decode kernels: 16 stores of 16 bytes by each of 128 threads in float16


@dataclass(frozen=True, eq=False)
class GpuWeight:
    """The tensors of a packed weight as the kernels take them.

    Args:
        shape: (N, K).
        group: weights that share a scale: group_size along K (int4), block_size of the flattened weight (nf4, fp4).
        codes: as in ``PackedWeight``.
        scales: float16 (N, G) for int4; absmax for nf4 and fp4.
        zero_points: int4 only, or None.
        nested_absmax, quant_map, offset: nested nf4 and fp4 only, or None.
        table: ``nf4``, ``fp4``, or None for int4.
    """

    shape: tuple[int, int]
    group: int
    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None = None
    nested_absmax: torch.Tensor | None = None
    quant_map: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    table: str | None = None


def register(library: torch.library.Library) -> bool:
    """Put the CUDA implementations of the four operators into ``library``; whether it did.

    Does nothing but register: no device is touched and triton is not imported. Warns, and leaves the plain-torch
    implementations in place, where triton is not installed or torch is built for AMD.

    Args:
        library: that defined ``stillhouse::linear_int4`` and the others.
    """
    if torch.version.hip is not None:
        missing = "they are checked on NVIDIA GPUs only, and this torch is built for AMD"
    elif importlib.util.find_spec("triton") is None:
        missing = "triton is not installed; pip install 'stillhouse[gpu]'"
    else:
        missing = ""
    if missing:
        warnings.warn(f"4-bit layers on the GPU decode their weight with plain torch at each call: {missing}", stacklevel=2)
        return False
    for function in (_linear_int4, _linear_int4_grad_x, _linear_nf4, _linear_nf4_grad_x):
        library.impl(function.__name__.removeprefix("_"), function, "CUDA")
    return True


def _linear_int4(x, codes, scales, zero_points, bias, in_features, group_size, activations):
    weight = GpuWeight((codes.shape[0], in_features), group_size, codes, scales, zero_points)
    return linear(x, weight, bias, activations)


def _linear_int4_grad_x(dy, codes, scales, zero_points, in_features, group_size, activations):
    return linear_grad_x(dy, GpuWeight((codes.shape[0], in_features), group_size, codes, scales, zero_points), activations)


def _linear_nf4(x, codes, absmax, nested, quant_map, offset, bias, out_features, in_features, block_size, table, activations):
    weight = GpuWeight((out_features, in_features), block_size, codes, absmax, None, nested, quant_map, offset, table)
    return linear(x, weight, bias, activations)


def _linear_nf4_grad_x(dy, codes, absmax, nested, quant_map, offset, out_features, in_features, block_size, table, activations):
    weight = GpuWeight((out_features, in_features), block_size, codes, absmax, None, nested, quant_map, offset, table)
    return linear_grad_x(dy, weight, activations)


def forward_path(num_rows: int, dtype: torch.dtype, weight: GpuWeight, activations: str) -> str:
    """Name what serves ``y = x @ W.T`` for that many rows: ``gemv``, ``skinny``, ``decode`` or ``reference``."""
    if activations == "exact" or dtype == torch.float64:
        return "reference"
    if num_rows == 1 and _in_words(weight):
        return "gemv"
    if 1 < num_rows <= MAX_SKINNY_ROWS and dtype != torch.float32 and _in_words(weight):
        return "skinny"
    return "decode"


def backward_path(num_rows: int, dtype: torch.dtype, weight: GpuWeight, activations: str) -> str:
    """Name what serves ``dx = dy @ W`` for that many rows: ``skinny``, ``decode`` or ``reference``."""
    if activations == "exact" or dtype == torch.float64:
        return "reference"
    if 0 < num_rows <= MAX_SKINNY_GRADIENT_ROWS and dtype != torch.float32 and _in_words(weight):
        return "skinny"
    return "decode"


def linear(x: torch.Tensor, weight: GpuWeight, bias: torch.Tensor | None, activations: str) -> torch.Tensor:
    """Multiply by a 4-bit weight on its device: ``y = x @ W.T + bias``.

    Args:
        x: (..., K), any float dtype.
        weight: of shape (N, K).
        bias: (N,), any float dtype, or None.
        activations: ``exact`` takes the reference; ``bf16`` and ``int8`` compute in the dtype of x. There is no int8 path on
            the GPU: asking for it warns once.

    Returns:
        (..., N), dtype of x. Sums are float32 and rounded once, after the bias (cuBLAS may round partial sums, as torch lets
        it). With one row the weight is not rounded to the dtype of x before it multiplies; elsewhere it is.

    Raises:
        ValueError: x does not fit the weight or lies on another device, or ``activations`` is unknown.
    """
    num_rows, num_columns = weight.shape
    _check(x, "x", num_columns, weight, activations)
    x_MK = x.reshape(-1, num_columns).contiguous()
    path = forward_path(x_MK.shape[0], x.dtype, weight, activations) if _has_tensor_cores(x.device) else "reference"
    with _on(x.device):
        if path == "gemv":
            y_MN = _gemv(x_MK, weight, bias)
        elif path == "skinny":
            y_MN = _skinny(x_MK, weight, bias)
        elif path == "decode":
            with _no_tf32(x.dtype), reference.without_autocast(x.device.type):
                y_MN = F.linear(x_MK, decode(weight, x.dtype), None if bias is None else bias.to(x.dtype))
        else:
            with _no_tf32(torch.float32):
                y_MN = reference.linear_reference(x_MK, _decode_plainly(weight), bias, activations)
    return y_MN.view(*x.shape[:-1], num_rows)


def linear_grad_x(dy: torch.Tensor, weight: GpuWeight, activations: str) -> torch.Tensor:
    """Multiply by a 4-bit weight from the other side, ``dx = dy @ W``: (..., N) to (..., K); see :func:`linear`."""
    num_rows, num_columns = weight.shape
    _check(dy, "dy", num_rows, weight, activations)
    dy_MN = dy.reshape(-1, num_rows).contiguous()
    path = backward_path(dy_MN.shape[0], dy.dtype, weight, activations) if _has_tensor_cores(dy.device) else "reference"
    with _on(dy.device):
        if path == "skinny":
            dx_MK = _skinny_grad_x(dy_MN, weight)
        elif path == "decode":
            with _no_tf32(dy.dtype), reference.without_autocast(dy.device.type):
                dx_MK = dy_MN @ decode(weight, dy.dtype)  # [M, N] @ [N, K]
        else:
            with _no_tf32(torch.float32):
                dx_MK = reference.input_gradient_reference(dy_MN, _decode_plainly(weight), activations)
    return dx_MK.view(*dy.shape[:-1], num_columns)


def decode(weight: GpuWeight, dtype: torch.dtype) -> torch.Tensor:
    """Decode a weight with one kernel, (N, K): computed in float32, rounded once to ``dtype``. Any shape, group and block."""
    from stillhouse.kernels import triton_forward as kernels

    num_rows, num_columns = weight.shape
    out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
    if weight.table is None:
        zeros = None if weight.zero_points is None else weight.zero_points.contiguous()
        num_bytes = codes.shape[1]
        block = min(_DECODE_BYTES, _power_of_two(num_bytes))
        kernels.decode_int4_kernel[(num_rows, _ceil_div(num_bytes, block))](
            codes, scales, zeros, out, num_columns, num_bytes, scales.shape[1], weight.group, block, **_LAUNCH
        )
        return out
    table = _table(weight.table, codes.device)
    nested = (weight.nested_absmax, weight.quant_map, weight.offset)
    kernels.decode_table_kernel[(_ceil_div(codes.numel(), _DECODE_BYTES),)](
        codes, scales, *nested, table, out, out.numel(), weight.group, _DECODE_BYTES, **_LAUNCH
    )
    return out


def _gemv(x_1K: torch.Tensor, weight: GpuWeight, bias: torch.Tensor | None) -> torch.Tensor:
    from stillhouse.kernels import triton_forward as kernels

    num_rows, num_columns = weight.shape
    y_1N = x_1K.new_empty((1, num_rows))
    block_n, block_w, num_warps = gemv_tile(num_rows)
    kernels.gemv_kernel[(_ceil_div(num_rows, block_n),)](
        x_1K,
        *_pointers(weight),
        bias,
        y_1N,
        num_rows,
        _MANTISSA,
        num_columns // WORD,
        weight.group // WORD,
        block_n,
        block_w,
        weight.table is None,
        num_warps=num_warps,
        **_LAUNCH,
    )
    return y_1N


def _skinny(x_MK: torch.Tensor, weight: GpuWeight, bias: torch.Tensor | None) -> torch.Tensor:
    from stillhouse.kernels import triton_forward as kernels

    num_rows, num_columns = weight.shape
    m = x_MK.shape[0]
    block_m, block_n, block_w, num_warps = skinny_tile(_capability(x_MK.device), m)
    num_tiles = _ceil_div(num_rows, block_n)
    steps = _ceil_div(num_columns, WORD * block_w)
    splits = num_splits(num_tiles, steps, num_columns // (16 * m), _num_multiprocessors(x_MK.device))
    y_MN = x_MK.new_empty((m, num_rows))
    parts = y_MN if splits == 1 else x_MK.new_empty((splits, m, num_rows), dtype=torch.float32)
    kernels.skinny_kernel[(num_tiles, splits)](
        x_MK,
        *_pointers(weight),
        bias,
        parts,
        m,
        num_rows,
        _MANTISSA,
        num_columns // WORD,
        weight.group // WORD,
        block_m,
        block_n,
        block_w,
        splits,
        num_warps=num_warps,
        **_LAUNCH,
    )
    if splits > 1:
        _add_splits(parts, bias, y_MN)
    return y_MN


def _skinny_grad_x(dy_MN: torch.Tensor, weight: GpuWeight) -> torch.Tensor:
    from stillhouse.kernels import triton_backward as kernels

    num_rows, num_columns = weight.shape
    m = dy_MN.shape[0]
    block_m, block_n, block_w, num_warps = GRADIENT_TILE
    num_tiles = _ceil_div(num_columns, WORD * block_w)
    steps = _ceil_div(num_rows, block_n)
    splits = num_splits(num_tiles, steps, num_rows // (16 * m), _num_multiprocessors(dy_MN.device))
    rows_a_split = _ceil_div(_ceil_div(num_rows, block_n), splits) * block_n
    dx_MK = dy_MN.new_empty((m, num_columns))
    parts = dx_MK if splits == 1 else dy_MN.new_empty((splits, m, num_columns), dtype=torch.float32)
    kernels.skinny_grad_x_kernel[(num_tiles, splits)](
        dy_MN,
        *_pointers(weight),
        parts,
        m,
        num_rows,
        _MANTISSA,
        rows_a_split,
        num_columns // WORD,
        weight.group // WORD,
        block_m,
        block_n,
        block_w,
        num_warps=num_warps,
        **_LAUNCH,
    )
    if splits > 1:
        _add_splits(parts, None, dx_MK)
    return dx_MK


def _add_splits(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    from stillhouse.kernels import triton_forward as kernels

    block = 512
    grid = (_ceil_div(out.numel(), block),)
    kernels.add_splits_kernel[grid](parts, bias, out, out.numel(), out.shape[1], parts.shape[0], block, **_LAUNCH)


# Tiles, chosen from the compiled code (registers, spills, instructions a weight; see test_triton_compile.py), not timed: no GPU
# was at hand. kernels/bench/gpu.py times them.

GRADIENT_TILE = (16, 32, 32, 4)
"""(BLOCK_M, BLOCK_N, BLOCK_W, warps) of ``skinny_grad_x_kernel``: eight 16 × 32 accumulators take 32 of a thread's 96
registers."""


def gemv_tile(num_rows: int) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_W, warps) of ``gemv_kernel``. BLOCK_W = threads, so that a thread has one word of every row.

    Eight rows share one load of x; four where eight would leave fewer than about four programs for each of 132 multiprocessors.
    """
    return (8 if num_rows >= 4096 else 4), 128, 4


def skinny_tile(capability: tuple[int, int], m: int) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_W, warps) of ``skinny_kernel``.

    BLOCK_N = 64 a group of four warps is the least that Hopper's wgmma takes. 32 words a step halve the barriers, where the
    registers allow it: on 9.0 up to 16 rows. From 33 rows 128 × 16 words over eight warps keep 8.0 (mma.sync) from spilling.
    """
    if m <= 16:
        return 16, 64, (32 if capability >= (9, 0) else 16), 4
    if m <= 32:
        return 32, 64, 16, 4
    return 64, 128, 16, 8


def num_splits(num_tiles: int, num_steps: int, most: int, num_multiprocessors: int) -> int:
    """Into how many parts to cut the summed dimension: a power of two, about three programs a multiprocessor, two steps a part.

    Args:
        num_tiles: programs there are without a cut.
        num_steps: iterations of the loop that is cut.
        most: no more than so many. A 16 M-th of the summed dimension is where the partial sums (float32, written and read) are
            as many bytes as the weight.
    """
    wanted = min(3 * num_multiprocessors / num_tiles, num_steps / 2)
    splits = 1
    while splits * 1.5 <= wanted and 2 * splits <= most and splits < 32:
        splits *= 2
    return splits


def _in_words(weight: GpuWeight) -> bool:
    codes, (num_rows, num_columns) = weight.codes, weight.shape
    return (
        num_columns % WORD == 0
        and weight.group % WORD == 0
        and all(tensor is None or tensor.is_contiguous() for tensor in (codes, weight.scales, weight.zero_points))
        and codes.storage_offset() % 4 == 0
        and codes.data_ptr() % 4 == 0
        # The kernels count words, and rows times columns of x, in 32 bits.
        and num_rows * num_columns < 2**31 * WORD
        and MAX_SKINNY_ROWS * max(num_rows, num_columns) < 2**31
    )


def _pointers(weight: GpuWeight) -> tuple[torch.Tensor | None, ...]:
    """Codes as words, scales, zero points, nested absmax, map, offset, table: the order in which every kernel takes them."""
    words = weight.codes.view(torch.int32)
    nested = (weight.nested_absmax, weight.quant_map, weight.offset)
    table = None if weight.table is None else _table(weight.table, words.device)
    return words, weight.scales, weight.zero_points, *nested, table


def _decode_plainly(weight: GpuWeight) -> torch.Tensor:
    if weight.table is None:
        return reference.decode_int4(weight.codes, weight.scales, weight.zero_points, weight.shape[1], weight.group)
    nested = (weight.nested_absmax, weight.quant_map, weight.offset)
    return reference.decode_nf4(weight.codes, weight.scales, *nested, weight.shape, weight.group, table=weight.table)


def _check(vector: torch.Tensor, name: str, features: int, weight: GpuWeight, activations: str) -> None:
    from stillhouse.kernels.ops import check_operand  # ops calls register: at the top it would be a circle

    check_operand(vector, name, features, weight.shape, activations)
    if vector.device != weight.codes.device:
        raise ValueError(f"{name} is on {vector.device}, the 4-bit weight on {weight.codes.device}: move one of them")
    if activations == "int8":
        _warn_no_int8()


@functools.cache
def _warn_no_int8() -> None:
    warnings.warn("activations='int8' on a GPU multiplies in the dtype of x: the int8 path is the CPU's", stacklevel=4)


@functools.cache
def _has_tensor_cores(device: torch.device) -> bool:
    """Whether the kernels serve ``device``; says so, once for each, where they do not."""
    if _capability(device) >= MIN_CAPABILITY:
        return True
    warnings.warn(
        f"4-bit layers on {device} (compute capability {_capability(device)}) decode their weight with plain torch at each "
        f"call: the kernels need {MIN_CAPABILITY}",
        stacklevel=4,
    )
    return False


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    # On the CPU only triton's interpreter runs the kernels; it has no tiles to choose.
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@functools.cache
def _table(name: str, device: torch.device) -> torch.Tensor:
    """The 16 values of ``reference.CODE_TABLES[name]``, float32, at a multiple of 64 bytes as every allocation of torch's."""
    with torch.inference_mode(False):
        table = torch.tensor(reference.CODE_TABLES[name], dtype=torch.float32, device=device)
    assert table.data_ptr() % 64 == 0, "triton_decode.decode ors offsets into the table's address"
    return table


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make ``device`` current for what is launched: triton launches on the current device, not on its arguments'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@contextlib.contextmanager
def _no_tf32(dtype: torch.dtype) -> Iterator[None]:
    """Multiply float32 in float32, whatever ``torch.set_float32_matmul_precision`` says; nothing for other dtypes."""
    matmul = torch.backends.cuda.matmul
    # Not torch.get_float32_matmul_precision: it raises where somebody has used the newer setting.
    if dtype != torch.float32 or matmul.fp32_precision != "tf32":
        yield
        return
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = "tf32"


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
