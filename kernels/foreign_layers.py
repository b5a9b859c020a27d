"""Read a layer that another library packed, as it stands in a loaded model, into a ``PackedWeight``.

bitsandbytes: nf4 and fp4, taken over without a copy; its CPU repacking undone. compressed-tensors: int4, from the packed
tensors that transformers loads, from the dense weights that a first forward leaves behind, or from the checkpoint's files. What
is read is checked: the same codes and scales, or a ``NotTaken`` with the reason.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.kernels import formats, reference
from stillhouse.kernels.formats import PackedWeight

_TENSOR_NAMES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
_ROWS_AT_A_TIME = 32  # a multiple of bitsandbytes' block of rows, and of the rows in a word of zero points


class NotTaken(Exception):
    """Why one layer cannot be taken over; the text is for the user."""


def read_layer(module: nn.Module, name: str, files: Mapping[str, Path]) -> tuple[PackedWeight, torch.dtype, str]:
    """The weight that a linear layer holds, in a layout of ours.

    Args:
        module: a linear layer of any kind.
        name: its name in the model, and in ``files``.
        files: the file of each tensor of the checkpoint that a dense model was decoded from (``checkpoint_files``), or empty.

    Returns:
        the weight, sharing the layer's tensors where it can; the dtype that the layer stands for; what it was, in words.

    Raises:
        NotTaken: it is not packed, or not in a way that can be taken over exactly.
    """
    if type(module).__module__.startswith("bitsandbytes."):
        return _from_bitsandbytes(module)
    if hasattr(module, "weight_packed"):
        return _from_compressed(module)
    if _status(module) == "decompressed":
        return _from_decompressed(module)
    if f"{name}.weight_packed" in files:
        return _from_files(module, name, files)
    raise NotTaken("not packed" if type(module) is nn.Linear else f"a {type(module).__name__}, which is not known here")


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of a checkpoint folder.

    Raises:
        ValueError: there is no safetensors checkpoint in the folder.
    """
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"checkpoint={str(folder)!r} holds neither model.safetensors nor model.safetensors.index.json")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def _from_bitsandbytes(module: nn.Module) -> tuple[PackedWeight, torch.dtype, str]:
    import bitsandbytes

    from stillhouse.kernels.bitsandbytes import from_params4bit

    if not isinstance(module, bitsandbytes.nn.Linear4bit):
        raise NotTaken(f"a bitsandbytes {type(module).__name__}, which is not 4-bit")
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if weight.is_meta:
        raise NotTaken("offloaded: its weight is on the meta device")
    if getattr(state, "packing_format_for_cpu", False):
        return _undo_repacking(weight.data, state), state.original_dtype, f"bitsandbytes {state.quant_type}, repacked"
    try:
        return from_params4bit(weight), state.dtype, f"bitsandbytes {state.quant_type}"
    except ValueError as error:
        raise NotTaken(str(error)) from error


def _undo_repacking(repacked: torch.Tensor, state: Any) -> PackedWeight:
    """The weight that bitsandbytes multiplies by after an eval forward on a CPU, in the canonical layout.

    That forward reordered the codes, (N / 32, K / 2, 32) bytes whose low nibbles are two columns of a block's rows 0…15 and
    high nibbles those of rows 16…31, and rounded the scales to bfloat16: that cannot be undone, and they are kept as they are.
    """
    num_rows, num_columns = state.shape
    codes = torch.empty((num_rows, num_columns // 2), dtype=torch.uint8, device=repacked.device)
    for rows in _row_blocks(num_rows):
        bytes_RKB = repacked[rows].view(-1, num_columns // 2, 32)
        pairs_RKBP = torch.cat((bytes_RKB & 0x0F, bytes_RKB >> 4), dim=-1).unflatten(-1, (32, 2))
        codes[rows] = ((pairs_RKBP[..., 0] << 4) | pairs_RKBP[..., 1]).transpose(1, 2).flatten(0, 1)
    absmax = state.absmax.T.float().flatten()
    return PackedWeight(state.quant_type, (num_rows, num_columns), codes.view(-1), block_size=state.blocksize, absmax=absmax)


def _status(module: nn.Module) -> str | None:
    status = getattr(module, "quantization_status", None)
    return None if status is None else str(getattr(status, "value", status))


def _int4_settings(module: nn.Module) -> None:
    """Refuse a compressed-tensors layer that is not plain int4 weights, 16-bit activations."""
    scheme = getattr(module, "quantization_scheme", None)
    weights = getattr(scheme, "weights", None)
    if weights is None:
        raise NotTaken("no quantization scheme beside its packed weight")
    kind = str(getattr(weights.type, "value", weights.type))
    if (weights.num_bits, kind) != (4, "int"):
        raise NotTaken(f"compressed-tensors {kind}{weights.num_bits}; only int4 is known here")
    if scheme.input_activations is not None or scheme.output_activations is not None:
        raise NotTaken("its activations are quantized too, which Linear4bit does not do in the same way")
    if getattr(module, "weight_g_idx", None) is not None:
        raise NotTaken("its columns are reordered (actorder)")


def _group_size(num_columns: int, scale: torch.Tensor) -> int:
    if scale.dim() != 2 or num_columns % scale.shape[1]:
        raise NotTaken(f"scales of shape {tuple(scale.shape)} do not divide {num_columns} columns into equal groups")
    return num_columns // scale.shape[1]


def _from_compressed(module: nn.Module) -> tuple[PackedWeight, torch.dtype, str]:
    _int4_settings(module)
    tensors = {name: tensor.detach() for name in _TENSOR_NAMES if (tensor := getattr(module, name, None)) is not None}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise NotTaken("offloaded: its weight is on the meta device")
    return _read_packed(tensors), tensors["weight_scale"].dtype, "compressed-tensors int4"


def _read_packed(tensors: Mapping[str, torch.Tensor]) -> PackedWeight:
    """``from_compressed_tensors`` a few rows at a time, so that no unpacked layer stands beside the packed one."""
    from stillhouse.kernels.compressed_tensors import from_compressed_tensors

    num_rows, num_columns = tensors["weight_shape"].tolist()
    group_size = _group_size(num_columns, tensors["weight_scale"])
    codes = torch.empty((num_rows, -(-num_columns // 2)), dtype=torch.uint8, device=tensors["weight_packed"].device)
    parts = []
    for rows in _row_blocks(num_rows):
        piece = {
            "weight_packed": tensors["weight_packed"][rows],
            "weight_scale": tensors["weight_scale"][rows],
            "weight_shape": torch.tensor([min(rows.stop, num_rows) - rows.start, num_columns]),
        }
        if "weight_zero_point" in tensors:  # packed along rows, eight a word
            piece["weight_zero_point"] = tensors["weight_zero_point"][rows.start // 8 : rows.stop // 8]
        try:
            part = from_compressed_tensors(piece, group_size)
        except ValueError as error:
            raise NotTaken(str(error)) from error
        codes[rows] = part.codes
        parts.append((part.scales, part.zero_points))
    scales, zero_points = zip(*parts)
    return PackedWeight(
        "int4",
        (num_rows, num_columns),
        codes,
        group_size=group_size,
        scales=torch.cat(scales),
        zero_points=None if zero_points[0] is None else torch.cat(zero_points),
    )


def _from_decompressed(module: nn.Module) -> tuple[PackedWeight, torch.dtype, str]:
    """Codes from a dense weight and the scales that it was decoded with."""
    _int4_settings(module)
    weight, scale = module.weight.detach(), module.weight_scale.detach()
    zero_points = getattr(module, "weight_zero_point", None)
    if weight.is_meta:
        raise NotTaken("offloaded: its weight is on the meta device")
    if not bool((scale.to(torch.float16).float() == scale.float()).all()):
        raise NotTaken(f"weight_scale ({scale.dtype}) has values that float16 does not hold")
    group_size = _group_size(weight.shape[1], scale)
    zero_points = None if zero_points is None else (zero_points.detach().to(torch.int16) + 8).to(torch.uint8)
    codes = _codes_of_dense(weight, scale, zero_points, group_size)
    packed = PackedWeight(
        "int4",
        tuple(weight.shape),
        codes,
        group_size=group_size,
        scales=scale.to(torch.float16).contiguous(),
        zero_points=None if zero_points is None else zero_points.contiguous(),
    )
    if not _holds(packed, weight):
        raise NotTaken("its weights were changed since they were decoded and no longer lie on the int4 grid")
    return packed, weight.dtype, "compressed-tensors int4, decompressed"


def _codes_of_dense(
    weight: torch.Tensor, scale: torch.Tensor, zero_points: torch.Tensor | None, group_size: int
) -> torch.Tensor:
    """The int4 codes nearest to a dense weight, a few rows at a time: no second dense weight stands beside it."""
    num_rows, num_columns = weight.shape
    packed = torch.empty((num_rows, -(-num_columns // 2)), dtype=torch.uint8, device=weight.device)
    for rows in _row_blocks(num_rows):
        ratio = weight[rows].float().unflatten(1, (-1, group_size)) / scale[rows].float().unsqueeze(-1)
        codes = ratio.nan_to_num(0).round() + (8 if zero_points is None else zero_points[rows].unsqueeze(-1))
        packed[rows] = reference.pack_nibbles(codes.clamp(0, 15).to(torch.uint8).flatten(1), high_first=False)
    return packed


def _holds(packed: PackedWeight, weight: torch.Tensor) -> bool:
    """Whether a dense weight was decoded from these codes: equal but for a rounding to its dtype and one to float16."""
    tolerance = max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float16).eps)
    for rows in _row_blocks(packed.shape[0]):
        parts = {name: tensor[rows] for name, tensor in packed.tensors().items()}
        decoded = formats.dequantize(dataclasses.replace(packed, shape=(parts["codes"].shape[0], packed.shape[1]), **parts))
        if not bool(((weight[rows].float() - decoded).abs() <= tolerance * decoded.abs()).all()):
            return False
    return True


def _row_blocks(num_rows: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS_AT_A_TIME) for start in range(0, num_rows, _ROWS_AT_A_TIME))


def _from_files(module: nn.Module, name: str, files: Mapping[str, Path]) -> tuple[PackedWeight, torch.dtype, str]:
    from safetensors import safe_open

    tensors = {}
    for suffix in _TENSOR_NAMES:
        if f"{name}.{suffix}" in files:
            with safe_open(files[f"{name}.{suffix}"], "pt") as file:
                tensors[suffix] = file.get_tensor(f"{name}.{suffix}")
    missing = {"weight_packed", "weight_scale", "weight_shape"} - set(tensors)
    if missing:
        raise NotTaken(f"the checkpoint has no {sorted(missing)} of it")
    weight = module.weight.detach()
    packed = _read_packed(tensors).to(weight.device)
    if packed.shape != tuple(weight.shape) or not _holds(packed, weight):
        raise NotTaken("its weights are not those of the checkpoint")
    return packed, weight.dtype, "compressed-tensors int4, from the files"
