"""int4 weights to and from compressed-tensors' ``pack-quantized`` layout, bit for bit, without that library.

``weight_packed`` int32 (N, ceil(K / 8)): eight codes a word along K, the least significant nibble first. ``weight_scale``
float16 (N, K / g). ``weight_shape`` int64 [N, K]. Asymmetric: ``weight_zero_point`` int32 (ceil(N / 8), K / g), packed along N.
Codes and zero points are stored as they are here, 0…15 (the library calls them signed and adds 8). Checked against 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from stillhouse.kernels import reference
from stillhouse.kernels.formats import PackedWeight


def to_compressed_tensors(packed: PackedWeight) -> dict[str, torch.Tensor]:
    """Write an int4 weight as compressed-tensors does; the same codes and scales, so the same decoded weights.

    Returns:
        ``weight_packed``, ``weight_scale``, ``weight_shape`` and, where there are zero points, ``weight_zero_point``; a
        checkpoint prefixes them with the layer's name. Scales stay float16.

    Raises:
        ValueError: the weight is nf4, or K is not a multiple of the group size (the library refuses to load that).
    """
    if packed.format != "int4":
        raise ValueError(f"compressed-tensors pack-quantized holds int4 weights, not {packed.format}; quantize to int4")
    num_columns, group_size = packed.shape[1], packed.group_size
    if num_columns % group_size:
        raise ValueError(
            f"in_features={num_columns} is not a multiple of group_size={group_size}, which compressed-tensors needs; "
            "choose a group size that divides it, or leave the layer unquantized"
        )
    tensors = {
        "weight_packed": _bytes_to_words(packed.codes),
        "weight_scale": packed.scales.clone(),
        "weight_shape": torch.tensor(packed.shape, dtype=torch.int64),
    }
    if packed.zero_points is not None:
        along_rows = reference.pack_nibbles(packed.zero_points.T, high_first=False)
        tensors["weight_zero_point"] = _bytes_to_words(along_rows).T.contiguous()
    return tensors


def from_compressed_tensors(tensors: Mapping[str, torch.Tensor], group_size: int) -> PackedWeight:
    """Read one layer's tensors, named as :func:`to_compressed_tensors` names them, without rounding anything.

    Raises:
        ValueError: a tensor is missing, the shapes do not belong together, or a scale does not fit float16 exactly.
    """
    missing = {"weight_packed", "weight_scale", "weight_shape"} - set(tensors)
    if missing:
        raise ValueError(f"a pack-quantized layer needs {sorted(missing)}; it has {sorted(tensors)}")
    num_rows, num_columns = tensors["weight_shape"].tolist()
    words = tensors["weight_packed"]
    expected = (num_rows, -(-num_columns // 8))
    if words.dtype != torch.int32 or tuple(words.shape) != expected:
        raise ValueError(f"weight_packed must be int32 of shape {expected}, is {words.dtype} of shape {tuple(words.shape)}")
    codes = reference.unpack_nibbles(words.contiguous().view(torch.uint8), num_columns, high_first=False)
    scales = tensors["weight_scale"]
    zero_words = tensors.get("weight_zero_point")
    zero_points = None
    if zero_words is not None:
        # clone: the transpose of a contiguous column counts as contiguous, but its stride does not let it be seen as bytes
        zero_bytes = zero_words.T.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        zero_points = reference.unpack_nibbles(zero_bytes, num_rows, high_first=False).T.contiguous()
    exact = scales.to(torch.float16)
    if not torch.equal(exact.to(torch.float32), scales.to(torch.float32)):
        raise ValueError(
            f"weight_scale ({scales.dtype}) has values that float16 does not hold; they would decode to other weights"
        )
    return PackedWeight(
        "int4",
        (num_rows, num_columns),
        reference.pack_nibbles(codes, high_first=False),
        group_size=group_size,
        scales=exact,
        zero_points=zero_points,
    )


def quantization_config(group_size: int = 32, symmetric: bool = True, ignore: Sequence[str] = ("lm_head",)) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint's config.json whose linear layers are int4, all but ``ignore``."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        },
    }


def _bytes_to_words(packed: torch.Tensor) -> torch.Tensor:
    """Join each row's bytes four to an int32 word, the first byte lowest; a row's end is filled with zeros."""
    return F.pad(packed, (0, -packed.shape[1] % 4)).contiguous().view(torch.int32)
