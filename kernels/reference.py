"""What the two 4-bit formats mean, in plain torch: the specification that every faster kernel is tested against.

int4: ``w[n, k] = scales[n, k // group_size] * (q[n, k] - z)`` with ``z`` 8 or the group's zero point, in float32. The product
of an 11-bit float16 scale and a 5-bit integer is exact in float32, so decoding loses nothing.
nf4: ``w = NF4_TABLE[q] * absmax`` over blocks of the flattened row-major tensor, in float32, as bitsandbytes does. fp4, which
is read and not written, is the same with ``FP4_TABLE``.

Suffixes: N rows (out_features), K columns (in_features), G groups along K, B blocks of the flattened tensor.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import torch.nn.functional as F

# The 16 levels of NormalFloat (QLoRA, arXiv:2305.14314), as bitsandbytes stores them.
NF4_TABLE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# The 16 values of bitsandbytes' FP4: a sign, two bits of exponent and one of fraction, divided by 12. In the order of the bit
# patterns, so not sorted: ``bitsandbytes.functional.get_4bit_type("fp4")``, 0.50.2. Code 8 is +0.0 there too, not -0.0.
FP4_TABLE = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
    0.0,
    -0.0052083334885537624,
    -0.6666666865348816,
    -1.0,
    -0.3333333432674408,
    -0.5,
    -0.1666666716337204,
    -0.25,
)
CODE_TABLES = {"nf4": NF4_TABLE, "fp4": FP4_TABLE}
"""What a 4-bit code stands for, before it is multiplied by its block's absmax, by format."""
ACTIVATION_BLOCK = 32
"""Activations along K that share one 8-bit scale, as in llama.cpp's Q8_0."""
NF4_NESTED_BLOCK = 256
"""Blocks whose 8-bit absmax share one nested absmax; bitsandbytes knows no other value."""


def pack_nibbles(codes: torch.Tensor, *, high_first: bool) -> torch.Tensor:
    """Put two 4-bit codes into each byte, along the last dimension.

    Args:
        codes: values 0…15, shape (..., K), any integer dtype.
        high_first: False: element 2i is the low nibble of byte i (int4); True: the high nibble (nf4).

    Returns:
        uint8, shape (..., ceil(K / 2)); with odd K the last byte's free nibble is 0.
    """
    codes = codes.to(torch.uint8)
    if codes.shape[-1] % 2:
        codes = F.pad(codes, (0, 1))
    even, odd = codes[..., 0::2], codes[..., 1::2]
    return (even << 4 | odd) if high_first else (odd << 4 | even)


def unpack_nibbles(packed: torch.Tensor, num_codes: int, *, high_first: bool) -> torch.Tensor:
    """Undo :func:`pack_nibbles`: uint8 codes of shape (..., num_codes)."""
    high, low = packed >> 4, packed & 0x0F
    pair = (high, low) if high_first else (low, high)
    return torch.stack(pair, dim=-1).flatten(-2)[..., :num_codes]


def bytes_to_words(packed: torch.Tensor) -> torch.Tensor:
    """Join each row's bytes four to an int32 word, the first byte lowest: uint8 (..., n) to int32 (..., ceil(n / 4)).

    With the low nibble first in each byte (:func:`pack_nibbles`), a word's least significant nibble is its first code. A row's
    end is filled with zeros.
    """
    padded = F.pad(packed, (0, -packed.shape[-1] % 4)).contiguous()
    # Seen as one line: a single row or column counts as contiguous whatever its strides, which then forbid the other dtype.
    return padded.view(-1).view(torch.int32).view(*packed.shape[:-1], -1)


def words_to_bytes(words: torch.Tensor) -> torch.Tensor:
    """Undo :func:`bytes_to_words`: uint8 (..., 4 n), whatever the strides of ``words``."""
    return words.contiguous().view(-1).view(torch.uint8).view(*words.shape[:-1], -1)


def decode_int4(
    codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, in_features: int, group_size: int
) -> torch.Tensor:
    """Decode an int4 weight to float32, shape (N, K).

    Args:
        codes: uint8 (N, ceil(K / 2)), the low nibble is the even k.
        scales: (N, G) with G = ceil(K / group_size); the last group may be shorter.
        zero_points: uint8 (N, G), values 0…15, or None for 8 everywhere.
    """
    num_rows, num_bytes = codes.shape
    num_groups = scales.shape[1]
    # Writing the two halves beats torch.stack and a byte table: one pass each, straight to float32.
    weight_NK = torch.empty((num_rows, num_bytes, 2), dtype=torch.float32, device=codes.device)
    weight_NK[..., 0] = codes & 0x0F
    weight_NK[..., 1] = codes >> 4
    scales_NG = scales.to(torch.float32)
    zeros_NG = 8.0 if zero_points is None else zero_points.to(torch.float32)
    if num_groups * group_size == in_features == 2 * num_bytes:
        grouped = weight_NK.view(num_rows, num_groups, group_size)
        grouped.sub_(8.0 if zero_points is None else zeros_NG.unsqueeze(-1)).mul_(scales_NG.unsqueeze(-1))
        return grouped.view(num_rows, in_features)
    weight_NK = weight_NK.view(num_rows, 2 * num_bytes)[:, :in_features]
    if zero_points is not None:
        zeros_NG = zeros_NG.repeat_interleave(group_size, dim=1)[:, :in_features]
    return (weight_NK - zeros_NG) * scales_NG.repeat_interleave(group_size, dim=1)[:, :in_features]


def decode_absmax(
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_quant_map: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
) -> torch.Tensor:
    """Decode the scales of an nf4 or fp4 weight to float32, shape (B,): the identity unless they are nested (uint8)."""
    if nested_absmax is None:
        return absmax
    per_block = nested_absmax.repeat_interleave(NF4_NESTED_BLOCK)[: absmax.numel()]
    # Two roundings, product then sum: an fma would differ from bitsandbytes in the last bit.
    return nested_quant_map[absmax.to(torch.int32)] * per_block + nested_offset


def decode_nf4(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_quant_map: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    shape: tuple[int, int],
    block_size: int,
    *,
    table: str = "nf4",
    levels: str = "float32",
) -> torch.Tensor:
    """Decode an nf4 or fp4 weight to float32, shape (N, K).

    Args:
        codes: uint8 (ceil(N K / 2),) over the flattened row-major weight, element 2i in the high nibble of byte i.
        absmax: float32 (B,) with B = ceil(N K / block_size), or uint8 (B,) when nested.
        nested_absmax, nested_quant_map, nested_offset: float32 (ceil(B / 256),), (256,), (1,), or None.
        shape: (N, K).
        block_size: weights that share one absmax; a block may cross rows, and the last may be shorter.
        table: which of ``CODE_TABLES`` the codes index, ``nf4`` or ``fp4``.
        levels: ``float32``, the format's own; ``int8``, rounded to 127ths, as a product with int8 activations takes them.
    """
    num_weights = shape[0] * shape[1]
    scales_B = decode_absmax(absmax, nested_absmax, nested_quant_map, nested_offset)
    values = F.embedding(codes.to(torch.int32), _decoded_pairs(table, levels, codes.device)).view(-1)
    if scales_B.numel() * block_size == num_weights == values.numel():
        return values.view(-1, block_size).mul_(scales_B.unsqueeze(-1)).view(shape)
    per_weight = scales_B.repeat_interleave(block_size)[:num_weights]
    return (values[:num_weights] * per_weight).view(shape)


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activations: str) -> torch.Tensor:
    """Multiply by a decoded weight: ``y = x @ weight.T + bias``.

    Args:
        x: (..., K), float16, bfloat16, float32 or float64.
        weight: decoded, float32 (N, K).
        bias: (N,) or None.
        activations: ``bf16`` multiplies in the dtype of x (a 16-bit x meets a weight rounded to the same dtype); ``exact``
            multiplies in at least float32 and rounds the result once; ``int8`` does so after rounding x to 8 bits.

    Returns:
        (..., N), dtype of x.
    """
    compute = compute_dtype(x.dtype, activations)
    dtype = x.dtype
    if activations == "int8":
        x = round_activations(x.to(compute))
    bias = None if bias is None else bias.to(compute)
    with without_autocast(x.device.type):
        return F.linear(x.to(compute), weight.to(compute), bias).to(dtype)  # [..., K] @ [K, N]


def round_activations(x: torch.Tensor) -> torch.Tensor:
    """Round activations to 8 bits and back: each 32 along K share the scale absmax / 127, shape and dtype as x.

    A block that holds NaN or infinity becomes NaN as a whole.
    """
    num_columns = x.shape[-1]
    blocks = F.pad(x, (0, -num_columns % ACTIVATION_BLOCK)).unflatten(-1, (-1, ACTIVATION_BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    rounded = (blocks / torch.where(scale == 0, 1.0, scale)).round() * scale
    return rounded.flatten(-2)[..., :num_columns]


def input_gradient_reference(dy: torch.Tensor, weight: torch.Tensor, activations: str) -> torch.Tensor:
    """Multiply by a decoded weight from the other side: ``dx = dy @ weight``, shapes (..., N) to (..., K), dtype of dy."""
    compute = compute_dtype(dy.dtype, activations)
    with without_autocast(dy.device.type):
        return (dy.to(compute) @ weight.to(compute)).to(dy.dtype)  # [..., N] @ [N, K]


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Switch autocast off for a product whose dtype is already decided; inside an operator it would still act."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def compute_dtype(x_dtype: torch.dtype, activations: str) -> torch.dtype:
    """Name the dtype in which a product is computed for activations of ``x_dtype``."""
    return x_dtype if activations == "bf16" else torch.promote_types(x_dtype, torch.float32)


@functools.cache
def _decoded_pairs(table: str, levels: str, device: torch.device) -> torch.Tensor:
    """Byte to two decoded values, float32 (256, 2): one look-up decodes two weights."""
    with torch.inference_mode(False):
        values = torch.tensor(CODE_TABLES[table], dtype=torch.float32)
        if levels == "int8":
            values = (values * 127).round() / 127
        byte = torch.arange(256)
        return torch.stack((values[byte >> 4], values[byte & 0x0F]), dim=-1).to(device)


@functools.cache
def nf4_bounds(device: torch.device) -> torch.Tensor:
    """The 15 midpoints between neighbouring NF4 levels, float32: nearest code = number of bounds below the value."""
    with torch.inference_mode(False):
        table = torch.tensor(NF4_TABLE, dtype=torch.float32)
        return ((table[:-1] + table[1:]) / 2).to(device)


@functools.cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """The 256 levels of the signed dynamic 8-bit type, float32, rising, for nested absmax.

    Equals ``bitsandbytes.functional.create_dynamic_map()``; from 8-Bit Optimizers, arXiv:2110.02861.
    """
    levels = [0.0, 1.0]
    with torch.inference_mode(False):
        for exponent in range(7):
            edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
            middles = (edges[:-1] + edges[1:]) / 2.0
            levels += (10 ** (exponent - 6) * middles).tolist()
            levels += (-(10 ** (exponent - 6)) * middles).tolist()
        return torch.tensor(sorted(levels), dtype=torch.float32).to(device)
