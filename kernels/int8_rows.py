"""Matrices in 8 bits with a scale a group of columns: rounding, decoding, and ``torch.ops.stillhouse.linear_int8``.

For embeddings and output heads (``embedding.py``), where torch's own operators serve: the product decodes 4,096 rows at a time
into torch's matmul. Where one scale serves a whole row, torch's int8 kernel takes few bfloat16 tokens on a CPU.

    linear_int8(x, codes, scales, bias?, group_size) -> y
    linear_int8_grad_x(dy, codes, scales, group_size) -> dx
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

_ROWS_AT_A_TIME = 4096
# Beyond these tokens torch's int8 kernel is slower than decoding into its bfloat16 matmul (151,936 × 896 on two Zen 5 cores: 15
# to 30 ms at 16, 128 to 70 at 128). It reads past the end of rows that are not a multiple of 16 long, and crashes (torch 2.13).
_INT8PACK_MAX_TOKENS = 32
_INT8PACK_COLUMNS = 64


@dataclass(frozen=True, eq=False)
class Int8Rows:
    """A matrix in 8 bits, ``w = scales * codes``.

    Args:
        codes: int8 (N, K), -127…127.
        scales: float16 (N, ceil(K / group_size)), exact in bfloat16 too.
        group_size: weights along K that share one scale.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    group_size: int
    zero_points: None = None
    format: Literal["int8"] = "int8"

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.codes.shape)


def quantize_int8(w: torch.Tensor, *, group_size: int = 32) -> Int8Rows:
    """Round a matrix to 8 bits, each weight by at most half its group's scale.

    A scale is the group's largest magnitude / 127, rounded up to 8 significant bits, so that nothing is clipped and float16 and
    bfloat16 hold it exactly.

    Raises:
        ValueError: w is not a finite float matrix, is too large for a float16 scale, or group_size < 1.
    """
    if w.dim() != 2 or w.numel() == 0 or not w.is_floating_point():
        raise ValueError(f"a weight to quantize is a float matrix (N, K), not {w.dtype} of shape {tuple(w.shape)}")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, not {group_size}")
    num_rows, num_columns = w.shape
    codes = torch.empty((num_rows, num_columns), dtype=torch.int8, device=w.device)
    scales = torch.empty((num_rows, -(-num_columns // group_size)), dtype=torch.float16, device=w.device)
    for rows in _row_blocks(num_rows):
        block = w[rows].detach().float()
        padded = nn.functional.pad(block, (0, -num_columns % group_size)).unflatten(1, (-1, group_size))
        absmax = padded.abs().amax(-1)
        if not bool((absmax <= 127 * 65280.0).all()):  # 65280: the largest float16 of 8 significant bits; NaN fails too
            raise ValueError("a weight to quantize must be finite and within ±8290560, what int8 with float16 scales holds")
        step = torch.ldexp(torch.ones_like(absmax), torch.frexp(absmax / 127).exponent - 8).clamp(min=2**-24)
        scale = (absmax / 127 / step).ceil() * step
        codes[rows] = (padded / scale.unsqueeze(-1)).nan_to_num(0).round().to(torch.int8).flatten(1)[:, :num_columns]
        scales[rows] = scale.to(torch.float16)
    return Int8Rows(codes, scales, group_size)


def decode_int8(codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """Decode rows of int8: ``scales * codes`` in float32, exactly; shapes as in :class:`Int8Rows`."""
    num_columns, num_groups = codes.shape[1], scales.shape[1]
    if num_columns % group_size:
        return codes.float() * scales.float().repeat_interleave(group_size, dim=1)[:, :num_columns]
    return codes.float().unflatten(1, (num_groups, group_size)).mul_(scales.float().unsqueeze(-1)).flatten(1)


# The int8 product as operators, so that autograd keeps no decoded weight and torch.compile sees one node.


def _linear_int8(x, codes, scales, bias, group_size):
    _check_operand(x, "x", codes.shape[1])
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    suits_torch = scales.shape[1] == 1 and x.dtype == torch.bfloat16 and codes.shape[1] % _INT8PACK_COLUMNS == 0
    if x.device.type == "cpu" and suits_torch and 0 < flat.shape[0] <= _INT8PACK_MAX_TOKENS:
        y = torch._weight_int8pack_mm(flat, codes, scales.view(-1).to(torch.bfloat16))
    else:
        y = flat.new_empty((flat.shape[0], codes.shape[0]))
        for rows in _row_blocks(codes.shape[0]):
            y[:, rows] = flat @ decode_int8(codes[rows], scales[rows], group_size).to(x.dtype).T  # [M, K] @ [K, rows]
    if bias is not None:
        y += bias.to(y.dtype)
    return y.view(*x.shape[:-1], codes.shape[0])


def _linear_int8_fake(x, codes, scales, bias, group_size):
    _check_operand(x, "x", codes.shape[1])
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _linear_int8_grad_x(dy, codes, scales, group_size):
    _check_operand(dy, "dy", codes.shape[0])
    flat = dy.reshape(-1, dy.shape[-1])
    dx = torch.zeros((flat.shape[0], codes.shape[1]), dtype=torch.promote_types(dy.dtype, torch.float32), device=dy.device)
    for rows in _row_blocks(codes.shape[0]):
        dx += flat[:, rows] @ decode_int8(codes[rows], scales[rows], group_size).to(dy.dtype)  # [M, rows] @ [rows, K]
    return dx.to(dy.dtype).view(*dy.shape[:-1], codes.shape[1])


def _linear_int8_grad_x_fake(dy, codes, scales, group_size):
    _check_operand(dy, "dy", codes.shape[0])
    return dy.new_empty((*dy.shape[:-1], codes.shape[1]))


def _check_operand(vector: torch.Tensor, name: str, features: int) -> None:
    if vector.dim() == 0 or vector.shape[-1] != features or not vector.is_floating_point():
        raise ValueError(
            f"an int8 head needs a float {name} of shape (..., {features}), not {vector.dtype} {tuple(vector.shape)}"
        )


def _row_blocks(num_rows: int) -> list[slice]:
    return [slice(start, min(start + _ROWS_AT_A_TIME, num_rows)) for start in range(0, num_rows, _ROWS_AT_A_TIME)]


def _save_int8(ctx, inputs, output):
    _, codes, scales, bias, ctx.group_size = inputs
    ctx.save_for_backward(codes, scales)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_int8(ctx, dy):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.stillhouse.linear_int8_grad_x(dy, *ctx.saved_tensors, ctx.group_size)
    if ctx.needs_input_grad[3]:
        grad_bias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None


_LIBRARY = torch.library.Library("stillhouse", "FRAGMENT")
_LIBRARY.define("linear_int8(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int group_size) -> Tensor")
_LIBRARY.define("linear_int8_grad_x(Tensor dy, Tensor codes, Tensor scales, int group_size) -> Tensor")
_LIBRARY.impl("linear_int8", _linear_int8, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_int8_grad_x", _linear_int8_grad_x, "CompositeExplicitAutograd")
torch.library.register_fake("stillhouse::linear_int8", _linear_int8_fake, lib=_LIBRARY)
torch.library.register_fake("stillhouse::linear_int8_grad_x", _linear_int8_grad_x_fake, lib=_LIBRARY)
torch.library.register_autograd("stillhouse::linear_int8", _backward_int8, setup_context=_save_int8, lib=_LIBRARY)
