"""int4 weights in groups of 32 to and from GGUF's Q4_0 blocks, bit for bit, without the gguf package.

A block is 18 bytes for 32 weights of a row: a little-endian float16 ``d``, then 16 bytes; the low nibbles are weights 0…15 of
the block, the high nibbles weights 16…31. ``w = d * (q - 8)``, which is this project's symmetric int4 with other nibble places:
codes and scales are the same numbers. (ggml's ``block_q4_0`` in ggml-common.h; GGUF version 3.)

Q4_1, ggml's asymmetric type, is not written: it holds a float16 minimum where int4 has a zero point, and float16 does not hold
``zero * scale`` exactly for some 1.5 % of the groups of a Gaussian weight: no whole layer would come through without rounding.
"""

from __future__ import annotations

import torch

from stillhouse.kernels import reference
from stillhouse.kernels.formats import PackedWeight

Q4_0_WEIGHTS = 32
Q4_0_BYTES = 18


def to_q4_0(packed: PackedWeight) -> torch.Tensor:
    """Write an int4 weight as Q4_0 blocks; the same codes and scales, so the same decoded weights.

    Args:
        packed: symmetric int4, group size 32, K a multiple of 32.

    Returns:
        uint8 (N, K / 32 * 18), a GGUF tensor's bytes row by row.

    Raises:
        ValueError: Q4_0 cannot hold the weight.
    """
    if packed.format != "int4":
        raise ValueError(f"GGUF Q4_0 holds int4 weights, not {packed.format}; quantize to int4 with group_size=32")
    if packed.zero_points is not None:
        raise ValueError(
            "GGUF Q4_0 holds symmetric weights, this one has zero points (and Q4_1 would round them); quantize with "
            "symmetric=True, or export compressed-tensors"
        )
    if packed.group_size != Q4_0_WEIGHTS:
        raise ValueError(
            f"GGUF Q4_0 holds groups of {Q4_0_WEIGHTS}, not group_size={packed.group_size}; quantize with "
            f"group_size={Q4_0_WEIGHTS}, or export compressed-tensors"
        )
    num_rows, num_columns = packed.shape
    _check_columns(num_columns)
    codes = reference.unpack_nibbles(packed.codes, num_columns, high_first=False).view(num_rows, -1, 2, Q4_0_WEIGHTS // 2)
    scales = packed.scales.contiguous().view(torch.uint8).view(num_rows, -1, 2)
    return torch.cat((scales, codes[:, :, 1] << 4 | codes[:, :, 0]), dim=-1).flatten(1)


def from_q4_0(blocks: torch.Tensor, shape: tuple[int, int]) -> PackedWeight:
    """Read Q4_0 blocks without rounding anything.

    Args:
        blocks: uint8, the tensor's bytes in any shape, ``num_weights / 32 * 18`` of them (``gguf.GGUFReader``'s ``data``).
        shape: (N, K). GGUF's own dimensions stand the other way round.

    Raises:
        ValueError: K is not a multiple of 32, or there are more or fewer bytes.
    """
    num_rows, num_columns = shape
    _check_columns(num_columns)
    expected = num_rows * num_columns // Q4_0_WEIGHTS * Q4_0_BYTES
    if blocks.dtype != torch.uint8 or blocks.numel() != expected:
        raise ValueError(
            f"a Q4_0 weight of shape {tuple(shape)} is {expected} bytes, uint8, not {blocks.numel()} of {blocks.dtype}"
        )
    blocks = blocks.reshape(num_rows, num_columns // Q4_0_WEIGHTS, Q4_0_BYTES)
    nibbles = blocks[..., 2:]
    codes = torch.cat((nibbles & 0x0F, nibbles >> 4), dim=-1).flatten(1)
    return PackedWeight(
        "int4",
        (num_rows, num_columns),
        reference.pack_nibbles(codes, high_first=False),
        group_size=Q4_0_WEIGHTS,
        scales=blocks[..., :2].clone(memory_format=torch.contiguous_format).view(torch.float16).squeeze(-1),
    )


def _check_columns(num_columns: int) -> None:
    if num_columns % Q4_0_WEIGHTS:
        raise ValueError(
            f"in_features={num_columns} does not fit GGUF Q4_0's blocks of {Q4_0_WEIGHTS}; export compressed-tensors, or leave "
            "the layer unquantized"
        )
