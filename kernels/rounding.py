"""Which 4-bit codes and scales stand for given weights: the encoders, in plain torch.

The decoders in ``reference.py`` define the formats; an encoder is free to choose. What holds for every choice made here:

- int4 scales have 8 significant bits inside float16's normal range, so float16 and bfloat16 both hold them exactly, and
  codes are chosen after the scale is rounded. A checkpoint decodes to the same weights whichever dtype a loader picks.
- Encoding a decoded int4 weight gives the same decoded weight, bit for bit: the candidates hold ``absmax / m`` for every
  integer m a code can have, so one of them has no error at all. (Asymmetric without the search has no such candidate.)

``csrc/encode.cpp`` makes the same choices bit for bit; what is here defines them, and serves where nothing was compiled.

Cost and worth of the scale search: 35 scales a group, 80 ns a weight on one Zen 5 core against 10 ns (compiled for AVX2: 6 ns
against 1.6); on Gaussian weights in groups of 32 it takes the relative error from 0.097 to 0.081 (1.6 dB).
"""

from __future__ import annotations

import torch

from stillhouse.kernels import reference

MIN_SCALE = 2.0**-14
"""float16's smallest normal number."""
MAX_SCALE = 65280.0
"""The largest number of 8 significant bits that float16 holds."""

# Scales tried are absmax / d. Beyond d = 8 the largest weight is clipped, which pays off when it stands alone.
_GRID = tuple(6.0 + 0.25 * i for i in range(13))
_CHUNK_WEIGHTS = 1 << 16
"""Weights searched at a time: the working set stays in a core's cache."""


def round_int4(
    groups: torch.Tensor, *, symmetric: bool, scale_search: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Choose int4 codes, scales and zero points for groups of weights.

    Args:
        groups: float32 (R, g), finite; one row shares a scale.
        symmetric: zero point 8 for all; otherwise one a group, and every scale positive.
        scale_search: take the scale of the least squared error among some 30; False takes ``absmax / 7``, or the
            range over 15 when not symmetric.

    Returns:
        codes uint8 (R, g) in 0…15, scales float16 (R,), zero points uint8 (R,) or None.
    """
    rows_at_once = max(1, _CHUNK_WEIGHTS // groups.shape[1])
    choose = _choose_symmetric if symmetric else _choose_asymmetric
    parts = [choose(chunk, scale_search) for chunk in groups.split(rows_at_once)]
    codes, scales, zeros = (torch.cat(column) for column in zip(*parts))
    return codes.to(torch.uint8), scales.to(torch.float16), None if symmetric else zeros.to(torch.uint8)


def _choose_symmetric(groups: torch.Tensor, scale_search: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True)).squeeze(1)
    if scale_search:
        # A scale of the extreme's own sign maps it to +d, which is clipped at 7; of the other sign to -d, clipped at -8.
        candidates = [-extreme / m for m in range(1, 9)]
        candidates += [sign * extreme / d for d in _GRID for sign in (1.0, -1.0)]
    else:
        candidates = [extreme.abs() / 7]
    scales, codes, error = _try_symmetric(groups, candidates[0])
    for candidate in candidates[1:]:
        scales, codes, error = _keep_better((scales, codes, error), _try_symmetric(groups, candidate))
    if scale_search:
        # The least-squares scale of the winning codes, as one more candidate.
        fitted = _sum_in_halves(groups * codes) / _sum_in_halves(codes.square()).clamp(min=1.0)
        scales, codes, error = _keep_better((scales, codes, error), _try_symmetric(groups, fitted))
        scales, codes = _prefer_positive(scales, codes)
    scales = torch.where((codes == 0).all(1), 1.0, scales)
    return codes + 8, scales, torch.full_like(scales, 8.0)


def _choose_asymmetric(groups: torch.Tensor, scale_search: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low = groups.amin(1).clamp(max=0.0)
    span = groups.amax(1).clamp(min=0.0) - low
    divisors = [15.0]
    if scale_search:
        divisors += [float(n) for n in range(1, 15)] + [15.0 + 0.5 * i for i in range(1, 10)]
    best = _try_asymmetric(groups, low, span / divisors[0])
    for divisor in divisors[1:]:
        best = _keep_better(best, _try_asymmetric(groups, low, span / divisor))
    scales, codes, _, zeros = best
    flat = (codes == zeros.unsqueeze(1)).all(1)
    scales, zeros = torch.where(flat, 1.0, scales), torch.where(flat, 8.0, zeros)
    return torch.where(flat.unsqueeze(1), 8.0, codes), scales, zeros


def _round_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round to 8 significant bits (bfloat16's) and into float16's normal range, keeping the sign."""
    rounded = scale.to(torch.bfloat16).to(torch.float32)
    return torch.copysign(rounded.abs().clamp(MIN_SCALE, MAX_SCALE), rounded)


def _try_symmetric(groups: torch.Tensor, candidate: torch.Tensor) -> tuple[torch.Tensor, ...]:
    scales = _round_scale(candidate)
    # A true division: multiplying by the reciprocal would miss exact codes.
    codes = (groups / scales.unsqueeze(1)).round_().clamp_(-8, 7)
    error = _sum_in_halves(torch.addcmul(groups, codes, scales.unsqueeze(1), value=-1).square_())
    return scales, codes, error


def _try_asymmetric(groups: torch.Tensor, low: torch.Tensor, candidate: torch.Tensor) -> tuple[torch.Tensor, ...]:
    scales = _round_scale(candidate)
    zeros = (-low / scales).round_().clamp_(0, 15)
    codes = (groups / scales.unsqueeze(1)).round_().add_(zeros.unsqueeze(1)).clamp_(0, 15)
    decoded = (codes - zeros.unsqueeze(1)) * scales.unsqueeze(1)
    error = _sum_in_halves((groups - decoded).square_())
    return scales, codes, error, zeros


def _sum_in_halves(terms: torch.Tensor) -> torch.Tensor:
    """Sum the columns of ``terms``, which it overwrites: column i takes column i + 2^k, until one is left.

    ``terms.sum(1)`` adds in an order that depends on the processor, and the better of two close scales would with it. This
    order is the same everywhere, and the one of ``csrc/encode.cpp``, which chooses bit for bit what is chosen here.
    """
    width = terms.shape[1]
    while width > 1:
        half = 1 << ((width - 1).bit_length() - 1)
        terms[:, : width - half] += terms[:, half:width]
        width = half
    return terms[:, 0]


def _keep_better(best: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Take, row by row, the one of less error (index 2); the earlier one on a tie."""
    better = other[2] < best[2]
    return tuple(torch.where(better.unsqueeze(1) if new.dim() == 2 else better, new, old) for old, new in zip(best, other))


def _prefer_positive(scales: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn negative scales positive wherever the same weights can be written so.

    A negative scale is needed only for a group whose largest weight is positive and takes the code -8; a zero then decodes
    to -0.0. Deciding the sign by the weights alone keeps even that bit the same when a decoded weight is encoded again.
    """
    halved = torch.where((scales < 0) & (codes.remainder(2) == 0).all(1) & (scales.abs() * 2 <= MAX_SCALE), 2.0, 1.0)
    scales, codes = scales * halved, codes / halved.unsqueeze(1)
    flip = torch.where((scales < 0) & (codes > -8).all(1), -1.0, 1.0)
    return scales * flip, codes * flip.unsqueeze(1)


def round_nf4(weight: torch.Tensor, *, block_size: int, double_quant: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Choose NF4 codes and scales for a weight.

    With ``double_quant`` the absmax are themselves rounded to 8 bits in bitsandbytes' layout, and the codes are chosen for
    the rounded ones (bitsandbytes' encoder uses the unrounded, which costs a little accuracy; its decoder cannot tell).

    Args:
        weight: float32, finite, any shape; blocks run over the flattened row-major tensor.
        block_size: weights that share one absmax.

    Returns:
        codes uint8 (num_weights,) in 0…15, and the scale tensors by their names in ``PackedWeight``.
    """
    flat = weight.reshape(-1)
    num_blocks = -(-flat.numel() // block_size)
    blocks = torch.nn.functional.pad(flat, (0, num_blocks * block_size - flat.numel())).view(num_blocks, block_size)
    absmax_B = blocks.abs().amax(1)
    tensors = round_absmax(absmax_B) if double_quant else {"absmax": absmax_B}
    decoded_B1 = reference.decode_absmax(
        tensors["absmax"], tensors.get("nested_absmax"), tensors.get("nested_quant_map"), tensors.get("nested_offset")
    ).unsqueeze(1)
    # An absmax rounded to 0 decodes every code to 0; code 7 says so plainly.
    relative = torch.where(decoded_B1 == 0, 0.0, blocks / decoded_B1)
    codes = torch.bucketize(relative, reference.nf4_bounds(weight.device), out_int32=True)
    return codes.view(-1)[: flat.numel()].to(torch.uint8), tensors


def round_absmax(absmax_B: torch.Tensor) -> dict[str, torch.Tensor]:
    """Round absmax to 8 bits: dynamic code × nested absmax of 256 blocks + mean, bitsandbytes' double quantization."""
    nested_block = reference.NF4_NESTED_BLOCK
    offset = absmax_B.mean().view(1)
    centred = absmax_B - offset
    num_nested = -(-centred.numel() // nested_block)
    padded = torch.nn.functional.pad(centred, (0, num_nested * nested_block - centred.numel())).view(num_nested, nested_block)
    nested_absmax = padded.abs().amax(1)
    relative = torch.where(nested_absmax.unsqueeze(1) == 0, 0.0, padded / nested_absmax.unsqueeze(1))
    levels = reference.dynamic_map(absmax_B.device)
    codes = torch.bucketize(relative, (levels[:-1] + levels[1:]) / 2, out_int32=True)
    return {
        "absmax": codes.view(-1)[: absmax_B.numel()].to(torch.uint8),
        "nested_absmax": nested_absmax,
        "nested_quant_map": levels.clone(),
        "nested_offset": offset,
    }
