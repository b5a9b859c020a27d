"""int4 weights to and from GPTQ's layout, bit for bit, and from AWQ's, without either library.

GPTQ (GPTQModel, AutoGPTQ; vLLM and transformers read it): ``qweight`` int32 (K / 8, N): eight codes a word along K, the least
significant nibble first. ``qzeros`` int32 (K / g, N / 8): eight zero points a word along N. ``scales`` float16 (K / g, N).
``g_idx`` int32 (K,): the group of each column. ``w = scales * (q - zero)``. ``checkpoint_format`` ``gptq`` (v1, the usual one)
stores zero - 1, so that a symmetric weight's words are 0x77777777; ``gptq_v2`` stores the zero point itself.

v1 cannot hold a zero point of 0, and it is refused here in both directions. 0 - 1 does not fit a nibble, and readers differ:
GPTQModel subtracts 0x11111111 from whole words and adds it back, so that the borrow runs into the next column's nibble; kernels
that add 1 to each nibble make 0 or 16 of the same bits, and misread the neighbour too. A stored nibble of 15 is the trace.

AWQ (AutoAWQ's GEMM layout): ``qweight`` int32 (K, N / 8), nibble i of word c is column 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i];
``qzeros`` int32 (K / g, N / 8) in the same order, the zero point itself; ``scales`` float16 (K / g, N).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stillhouse.kernels import reference
from stillhouse.kernels.formats import PackedWeight, exact_float16, refuse_act_order

CHECKPOINT_FORMATS: tuple[str, ...] = ("gptq", "gptq_v2")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column, within its eight, of each nibble of an AWQ word."""


def to_gptq(packed: PackedWeight, checkpoint_format: str = "gptq") -> dict[str, torch.Tensor]:
    """Write an int4 weight as GPTQ does; the same codes and scales, so the same decoded weights.

    Args:
        packed: int4; K a multiple of 8 and of the group size, N a multiple of 8.
        checkpoint_format: ``gptq`` stores zero - 1, ``gptq_v2`` the zero point; the config's ``checkpoint_format`` must say it.

    Returns:
        ``qweight``, ``qzeros``, ``scales`` and ``g_idx``; a checkpoint prefixes them with the layer's name. The config's
        ``sym`` is ``packed.zero_points is None``, ``desc_act`` is false.

    Raises:
        ValueError: the weight is not int4, its shape does not fit, or ``gptq`` would have to hold a zero point of 0.
    """
    _check_checkpoint_format(checkpoint_format)
    if packed.format != "int4":
        raise ValueError(f"GPTQ holds int4 weights, not {packed.format}; quantize to int4")
    (num_rows, num_columns), group_size = packed.shape, packed.group_size
    _check_sizes("GPTQ", num_rows, num_columns, group_size)
    if num_columns % 8:
        raise ValueError(f"in_features={num_columns} is not a multiple of 8, which GPTQ needs; export compressed-tensors")
    zeros_NG = torch.full_like(packed.scales, 8, dtype=torch.uint8) if packed.zero_points is None else packed.zero_points
    if checkpoint_format == "gptq":
        if (zeros_NG == 0).any():
            raise ValueError(
                f"{int((zeros_NG == 0).sum())} of {zeros_NG.numel()} zero points are 0, and checkpoint_format 'gptq' stores "
                "zero - 1: readers disagree about what that means. Write checkpoint_format='gptq_v2'"
            )
        zeros_NG = zeros_NG - 1
    return {
        "qweight": reference.bytes_to_words(packed.codes).T.contiguous(),
        "qzeros": reference.bytes_to_words(reference.pack_nibbles(zeros_NG.T, high_first=False)),
        "scales": packed.scales.T.contiguous(),
        "g_idx": torch.arange(num_columns, dtype=torch.int32, device=packed.device) // group_size,
    }


def from_gptq(
    tensors: Mapping[str, torch.Tensor], group_size: int, *, sym: bool = True, checkpoint_format: str = "gptq"
) -> PackedWeight:
    """Read one layer's 4-bit tensors, named as :func:`to_gptq` names them, without rounding anything.

    Args:
        tensors: ``g_idx`` may be missing where columns were not reordered.
        group_size: as in the checkpoint's config; -1 means one group a row.
        sym: as in the config: True promises that every zero point is 8, which is checked; False keeps the zero points.
        checkpoint_format: as in the config; a config without it means ``gptq``.

    Raises:
        ValueError: a tensor is missing or has another shape, columns were reordered by activation (``desc_act``), a scale does
            not fit float16 exactly, ``sym`` does not hold, or a zero point is one that ``gptq`` cannot hold.
    """
    _check_checkpoint_format(checkpoint_format)
    _check_present(tensors, ("qweight", "qzeros", "scales"), "GPTQ")
    num_rows, num_columns = tensors["qweight"].shape[-1], 8 * tensors["qweight"].shape[0]
    group_size = num_columns if group_size == -1 else group_size
    _check_sizes("GPTQ", num_rows, num_columns, group_size)
    num_groups = num_columns // group_size
    _check_tensor(tensors, "qweight", (num_columns // 8, num_rows), torch.int32)
    _check_tensor(tensors, "qzeros", (num_groups, num_rows // 8), torch.int32)
    _check_tensor(tensors, "scales", (num_groups, num_rows))
    refuse_act_order(tensors.get("g_idx"), "g_idx", num_columns, group_size)
    zeros_GN = reference.unpack_nibbles(reference.words_to_bytes(tensors["qzeros"]), num_rows, high_first=False)
    if checkpoint_format == "gptq":
        if (zeros_GN == 15).any():
            raise ValueError(
                f"{int((zeros_GN == 15).sum())} of {zeros_GN.numel()} stored zero points are 15, a zero point of 0 or 16 in "
                "checkpoint_format 'gptq': readers disagree about what that means. Is the checkpoint 'gptq_v2'? Otherwise "
                "convert it to 'gptq_v2' with the library that wrote it"
            )
        zeros_GN = zeros_GN + 1
    if sym and not (zeros_GN == 8).all():
        found = sorted(set(zeros_GN.unique().tolist()))
        other = "gptq_v2" if checkpoint_format == "gptq" else "gptq"
        likely = found == ([9] if checkpoint_format == "gptq" else [7])
        hint = f"the checkpoint is {other!r}, whatever its config says" if likely else "pass sym=False"
        raise ValueError(f"a symmetric {checkpoint_format!r} weight has only zero points of 8, this one has {found}; {hint}")
    return PackedWeight(
        "int4",
        (num_rows, num_columns),
        reference.words_to_bytes(tensors["qweight"].T),
        group_size=group_size,
        scales=exact_float16(tensors["scales"].T.contiguous(), "scales"),
        zero_points=None if sym else zeros_GN.T.contiguous(),
    )


def from_awq(tensors: Mapping[str, torch.Tensor], group_size: int) -> PackedWeight:
    """Read one layer of an AWQ checkpoint (``version`` gemm, 4 bits), without rounding anything.

    Args:
        tensors: ``qweight``, ``qzeros`` and ``scales``.
        group_size: as in the checkpoint's config; -1 means one group a row.

    Raises:
        ValueError: a tensor is missing or has another shape, or a scale does not fit float16 exactly.
    """
    _check_present(tensors, ("qweight", "qzeros", "scales"), "AWQ")
    num_rows, num_columns = 8 * tensors["qweight"].shape[-1], tensors["qweight"].shape[0]
    group_size = num_columns if group_size == -1 else group_size
    _check_sizes("AWQ", num_rows, num_columns, group_size)
    num_groups = num_columns // group_size
    _check_tensor(tensors, "qweight", (num_columns, num_rows // 8), torch.int32)
    _check_tensor(tensors, "qzeros", (num_groups, num_rows // 8), torch.int32)
    _check_tensor(tensors, "scales", (num_groups, num_rows))
    codes_KN, zeros_GN = (_awq_columns(tensors[name], num_rows) for name in ("qweight", "qzeros"))
    return PackedWeight(
        "int4",
        (num_rows, num_columns),
        reference.pack_nibbles(codes_KN.T, high_first=False),
        group_size=group_size,
        scales=exact_float16(tensors["scales"].T.contiguous(), "scales"),
        zero_points=zeros_GN.T.contiguous(),
    )


def _awq_columns(words: torch.Tensor, num_columns: int) -> torch.Tensor:
    """Unpack AWQ words (R, n) to nibbles (R, 8 n) in the order of the columns."""
    nibbles = reference.unpack_nibbles(reference.words_to_bytes(words), num_columns, high_first=False)
    position = sorted(range(8), key=_AWQ_ORDER.__getitem__)
    return nibbles.view(words.shape[0], -1, 8)[..., position].flatten(1)


def _check_checkpoint_format(checkpoint_format: str) -> None:
    if checkpoint_format not in CHECKPOINT_FORMATS:
        raise ValueError(f"checkpoint_format must be one of {CHECKPOINT_FORMATS}, not {checkpoint_format!r}")


def _check_sizes(layout: str, num_rows: int, num_columns: int, group_size: int) -> None:
    if group_size < 1 or num_columns % group_size:
        raise ValueError(
            f"in_features={num_columns} is not a multiple of group_size={group_size}, which {layout} needs; "
            "choose a group size that divides it, or leave the layer unquantized"
        )
    if num_rows % 8:
        raise ValueError(f"out_features={num_rows} is not a multiple of 8, which {layout} needs; export compressed-tensors")


def _check_present(tensors: Mapping[str, torch.Tensor], names: tuple[str, ...], layout: str) -> None:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"a {layout} layer needs {missing}; it has {sorted(tensors)}")
    if tensors["qweight"].dim() != 2:
        raise ValueError(f"a {layout} layer's qweight is a matrix, not of shape {tuple(tensors['qweight'].shape)}")


def _check_tensor(
    tensors: Mapping[str, torch.Tensor], name: str, shape: tuple[int, int], dtype: torch.dtype | None = None
) -> None:
    tensor = tensors[name]
    if tuple(tensor.shape) != shape or (dtype or tensor.dtype) != tensor.dtype:
        raise ValueError(
            f"{name} must be {dtype or 'float'} of shape {shape} in 4 bits, is {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
