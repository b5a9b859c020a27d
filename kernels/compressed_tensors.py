"""int4 weights to and from compressed-tensors' ``pack-quantized`` layout, bit for bit, without that library.

``weight_packed`` int32 (N, ceil(K / 8)): eight codes a word along K, the least significant nibble first. ``weight_scale``
float16 (N, K / g). ``weight_shape`` int64 [N, K]. Asymmetric: ``weight_zero_point`` int32 (ceil(N / 8), K / g), packed along N.
Codes and zero points are stored as they are here, 0…15 (the library calls them signed and adds 8). Checked against 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stillhouse.kernels import reference
from stillhouse.kernels.formats import PackedWeight, exact_float16, refuse_act_order


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
        "weight_packed": reference.bytes_to_words(packed.codes),
        "weight_scale": packed.scales.clone(),
        "weight_shape": torch.tensor(packed.shape, dtype=torch.int64),
    }
    if packed.zero_points is not None:
        along_rows = reference.pack_nibbles(packed.zero_points.T, high_first=False)
        tensors["weight_zero_point"] = reference.bytes_to_words(along_rows).T.contiguous()
    return tensors


def from_compressed_tensors(tensors: Mapping[str, torch.Tensor], group_size: int) -> PackedWeight:
    """Read one layer's tensors, named as :func:`to_compressed_tensors` names them, without rounding anything.

    Raises:
        ValueError: a tensor is missing, the shapes do not belong together, a scale does not fit float16 exactly, or columns
            were reordered by activation (``weight_g_idx``): a group is then no run of columns, and no format here holds it.
    """
    missing = {"weight_packed", "weight_scale", "weight_shape"} - set(tensors)
    if missing:
        raise ValueError(f"a pack-quantized layer needs {sorted(missing)}; it has {sorted(tensors)}")
    num_rows, num_columns = tensors["weight_shape"].tolist()
    words = tensors["weight_packed"]
    expected = (num_rows, -(-num_columns // 8))
    if words.dtype != torch.int32 or tuple(words.shape) != expected:
        raise ValueError(f"weight_packed must be int32 of shape {expected}, is {words.dtype} of shape {tuple(words.shape)}")
    refuse_act_order(tensors.get("weight_g_idx"), "weight_g_idx", num_columns, group_size)
    codes = reference.unpack_nibbles(reference.words_to_bytes(words), num_columns, high_first=False)
    zero_words = tensors.get("weight_zero_point")
    zero_points = None
    if zero_words is not None:
        expected = (-(-num_rows // 8), tensors["weight_scale"].shape[-1])
        if zero_words.dtype != torch.int32 or tuple(zero_words.shape) != expected:
            raise ValueError(
                f"weight_zero_point must be int32 of shape {expected}, is {zero_words.dtype} of shape {tuple(zero_words.shape)}"
            )
        zero_bytes = reference.words_to_bytes(zero_words.T)
        zero_points = reference.unpack_nibbles(zero_bytes, num_rows, high_first=False).T.contiguous()
    return PackedWeight(
        "int4",
        (num_rows, num_columns),
        reference.pack_nibbles(codes, high_first=False),
        group_size=group_size,
        scales=exact_float16(tensors["weight_scale"], "weight_scale"),
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
