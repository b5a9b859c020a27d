"""The 4-bit formats as plain tensors: ``PackedWeight``, ``quantize``, ``dequantize``.

int4 (what is emitted and served): ``w = scale * (q - 8)``, q in 0…15, one float16 scale a group along K. codes are uint8
(N, ceil(K / 2)), the low nibble is the even k. 4.5 bits a weight at group size 32.
nf4 (QLoRA bases, bitsandbytes): ``w = NF4_TABLE[q] * absmax``, one absmax a block of the flattened row-major weight. codes are
uint8 (ceil(N K / 2),), element 2i in the high nibble of byte i. 4.5 bits a weight, 4.127 with nested absmax.
fp4 (bitsandbytes' other type): nf4's layout with the table FP4_TABLE. A ``PackedWeight`` can hold it, but ``quantize`` does not
write it: nf4 is the more accurate of the two at the same size.

Into and out of other people's layouts without rounding: ``compressed_tensors.py``, ``gptq.py``, ``gguf.py`` (int4),
``bitsandbytes.py`` (nf4, fp4). Files of our own: ``packed_file.py``.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from stillhouse.kernels import cpu, reference, rounding

Format = Literal["int4", "nf4"]
FORMATS: tuple[str, ...] = ("int4", "nf4")
"""What ``quantize`` writes."""
ReadableFormat = Literal["int4", "nf4", "fp4"]
READABLE_FORMATS: tuple[str, ...] = (*FORMATS, "fp4")
"""What a ``PackedWeight`` may be in."""
TENSOR_NAMES = (
    "codes",
    "scales",
    "zero_points",
    "absmax",
    "nested_absmax",
    "nested_quant_map",
    "nested_offset",
)
"""Every tensor that a packed weight may have, in the order ``PackedWeight.tensors`` gives them."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight of N × K numbers in 4 bits: a few plain tensors and what it takes to read them.

    Args:
        format: ``int4``, ``nf4`` or ``fp4``.
        shape: (N, K), out_features and in_features.
        codes: uint8; int4 (N, ceil(K / 2)), low nibble = even k; nf4 and fp4 (ceil(N K / 2),), element 2i in the high nibble.
        group_size: int4 only: weights along K that share one scale; the last group of a row may be shorter.
        scales: int4 only: float16 (N, ceil(K / group_size)).
        zero_points: asymmetric int4 only: uint8 like scales, values 0…15; None means 8.
        block_size: nf4 and fp4 only: weights of the flattened tensor that share one absmax; a block may cross rows.
        absmax: nf4 and fp4 only: float32 (B,) with B = ceil(N K / block_size), or uint8 (B,) when nested.
        nested_absmax, nested_quant_map, nested_offset: nested nf4 and fp4 only: float32 (ceil(B / 256),), (256,) and (1,).

    Raises:
        ValueError: the tensors do not belong together.
    """

    format: ReadableFormat
    shape: tuple[int, int]
    codes: torch.Tensor
    group_size: int | None = None
    scales: torch.Tensor | None = None
    zero_points: torch.Tensor | None = None
    block_size: int | None = None
    absmax: torch.Tensor | None = None
    nested_absmax: torch.Tensor | None = None
    nested_quant_map: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name, expected in _expected_tensors(self).items():
            tensor = getattr(self, name)
            found = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
            if found != expected:
                raise ValueError(
                    f"{self.format} weight of shape {tuple(self.shape)}, group_size={self.group_size}, "
                    f"block_size={self.block_size}: {name} must be {_describe(expected)}, is {_describe(found)}"
                )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that there are, by name: all that a file has to hold beside the metadata."""
        return {name: getattr(self, name) for name in TENSOR_NAMES if getattr(self, name) is not None}

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight with its tensors on another device."""
        return dataclasses.replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; see :func:`stillhouse.kernels.packed_file.save_packed`."""
        from stillhouse.kernels.packed_file import save_packed

        save_packed(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PackedWeight:
        """Read what :meth:`save` wrote; see :func:`stillhouse.kernels.packed_file.load_packed`."""
        from stillhouse.kernels.packed_file import load_packed

        return load_packed(path)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


def quantize(
    w: torch.Tensor,
    format: Format = "int4",
    *,
    group_size: int = 32,
    symmetric: bool = True,
    scale_search: bool = True,
    block_size: int = 64,
    double_quant: bool = True,
) -> PackedWeight:
    """Round a weight to 4 bits.

    int4 scales are exact in float16 and in bfloat16, and ``quantize(dequantize(quantize(w)))`` decodes to the same bits as
    ``quantize(w)`` (asymmetric: with ``scale_search`` only). nf4 has that property with ``double_quant=False``; the second
    rounding of nested absmax, bitsandbytes' layout, cannot keep it.

    Args:
        w: shape (N, K), any float dtype, at least one weight, all finite; N and K need not be multiples of anything.
        format: ``int4`` or ``nf4`` (fp4 is only read).
        group_size, symmetric: int4: weights along K that share one scale; whether each group has its own zero point.
        scale_search: int4: take the scale of the least squared error; False takes absmax / 7.
        block_size, double_quant: nf4: weights that share one absmax; whether absmax are themselves rounded to 8 bits.

    Raises:
        ValueError: w is not a finite float matrix (the position of the first bad value is named), a weight is too large for
            a float16 scale, or a setting is out of range.
    """
    if format not in FORMATS:
        read_only = ", which is only read; nf4 has its layout and is more accurate" if format in READABLE_FORMATS else ""
        raise ValueError(f"format must be one of {FORMATS}, not {format!r}{read_only}")
    if w.dim() != 2 or w.numel() == 0 or not w.is_floating_point():
        raise ValueError(
            f"a weight to quantize is a float matrix (N, K) with N, K >= 1, not {_describe((tuple(w.shape), w.dtype))}"
        )
    w = w.detach().to(torch.float32).contiguous()
    _refuse(w, ~torch.isfinite(w), "a weight to quantize must be finite")
    num_rows, num_columns = w.shape
    if format == "nf4":
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        codes, tensors = _encode_nf4(w, block_size, double_quant)
        return PackedWeight("nf4", (num_rows, num_columns), codes, block_size=block_size, **tensors)
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, not {group_size}")
    _refuse(
        w, w.abs() > 7 * rounding.MAX_SCALE, f"int4 scales are float16: weights must lie within ±{7 * rounding.MAX_SCALE:.0f}"
    )
    codes, scales, zero_points = _encode_int4(w, group_size, symmetric, scale_search)
    return PackedWeight("int4", (num_rows, num_columns), codes, group_size=group_size, scales=scales, zero_points=zero_points)


def _encode_int4(
    w: torch.Tensor, group_size: int, symmetric: bool, scale_search: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and zero points of a float32 weight: compiled where that is possible, the same bits either way."""
    if w.device.type == "cpu" and cpu.library() is not None:
        return cpu.quantize_int4(w, group_size, symmetric, scale_search)
    num_rows, num_columns = w.shape
    num_groups = -(-num_columns // group_size)
    groups = F.pad(w, (0, num_groups * group_size - num_columns)).view(-1, group_size)
    codes, scales, zero_points = rounding.round_int4(groups, symmetric=symmetric, scale_search=scale_search)
    packed = reference.pack_nibbles(codes.view(num_rows, -1)[:, :num_columns], high_first=False)
    zero_points = None if zero_points is None else zero_points.view(num_rows, num_groups)
    return packed, scales.view(num_rows, num_groups), zero_points


def _encode_nf4(w: torch.Tensor, block_size: int, double_quant: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Codes and scale tensors of a float32 weight, as ``_encode_int4``."""
    if w.device.type == "cpu" and cpu.library() is not None:
        absmax = cpu.block_absmax(w, block_size)
        tensors = rounding.round_absmax(absmax) if double_quant else {"absmax": absmax}
        decoded = reference.decode_absmax(
            tensors["absmax"], tensors.get("nested_absmax"), tensors.get("nested_quant_map"), tensors.get("nested_offset")
        )
        return cpu.quantize_nf4(w, block_size, decoded), tensors
    codes, tensors = rounding.round_nf4(w, block_size=block_size, double_quant=double_quant)
    return reference.pack_nibbles(codes, high_first=True), tensors


def dequantize(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decode a packed weight, shape (N, K): computed in float32, rounded once to ``dtype``."""
    if packed.device.type == "cpu" and dtype in cpu.DTYPES and cpu.serves(*packed.tensors().values()):
        return cpu.dequantize(cpu.packed_weight(packed), dtype)
    if packed.format == "int4":
        weight = reference.decode_int4(packed.codes, packed.scales, packed.zero_points, packed.shape[1], packed.group_size)
    else:
        weight = reference.decode_nf4(
            packed.codes,
            packed.absmax,
            packed.nested_absmax,
            packed.nested_quant_map,
            packed.nested_offset,
            packed.shape,
            packed.block_size,
            table=packed.format,
        )
    return weight.to(dtype)


def empty_packed(
    shape: tuple[int, int],
    format: ReadableFormat,
    *,
    group_size: int = 32,
    symmetric: bool = True,
    block_size: int = 64,
    double_quant: bool = True,
    device: torch.device | str = "cpu",
) -> PackedWeight:
    """A packed weight with uninitialised tensors of the right shapes, to load a file into; arguments as in ``quantize``."""
    layout = _layout(
        format,
        shape,
        group_size=group_size if format == "int4" else None,
        asymmetric=not symmetric,
        block_size=None if format == "int4" else block_size,
        nested=double_quant,
    )
    tensors = {name: torch.empty(spec[0], dtype=spec[1], device=device) for name, spec in layout.items() if spec}
    settings = {"group_size": group_size} if format == "int4" else {"block_size": block_size}
    return PackedWeight(format, tuple(shape), **tensors, **settings)


def exact_float16(scales: torch.Tensor, name: str) -> torch.Tensor:
    """Bring another library's scales to float16 without rounding any; a ValueError names the tensor where that cannot be."""
    exact = scales.to(torch.float16)
    if not torch.equal(exact.to(torch.float32), scales.to(torch.float32)):
        raise ValueError(f"{name} ({scales.dtype}) has values that float16 does not hold; they would decode to other weights")
    return exact


def refuse_act_order(g_idx: torch.Tensor | None, name: str, num_columns: int, group_size: int) -> None:
    """Refuse, with a ValueError, columns whose group is not k // group_size; None, or -1 everywhere, stands for that."""
    if g_idx is None or bool((g_idx == -1).all()):
        return
    plain = torch.arange(num_columns, device=g_idx.device) // group_size
    if g_idx.shape != plain.shape or not torch.equal(g_idx.to(plain.dtype), plain):
        raise ValueError(
            f"{name} is not k // {group_size}: the columns were reordered by activation (desc_act, actorder), or the group "
            "size is another. A PackedWeight keeps the columns in order; quantize the model again without act-order"
        )


_Spec = tuple[tuple[int, ...], torch.dtype] | None


def _expected_tensors(packed: PackedWeight) -> dict[str, _Spec]:
    return _layout(
        packed.format,
        packed.shape,
        group_size=packed.group_size,
        asymmetric=packed.zero_points is not None,
        block_size=packed.block_size,
        nested=packed.nested_absmax is not None,
    )


def _layout(
    format: str, shape: tuple[int, int], *, group_size: int | None, asymmetric: bool, block_size: int | None, nested: bool
) -> dict[str, _Spec]:
    """Shape and dtype of every tensor of a packed weight; None for those it must not have."""
    num_rows, num_columns = shape
    layout: dict[str, _Spec] = dict.fromkeys(TENSOR_NAMES)
    if format == "int4":
        if group_size is None or group_size < 1 or block_size is not None:
            raise ValueError(f"an int4 weight has a group_size >= 1 and no block_size, not {group_size} and {block_size}")
        grouped = (num_rows, -(-num_columns // group_size))
        layout["codes"] = ((num_rows, -(-num_columns // 2)), torch.uint8)
        layout["scales"] = (grouped, torch.float16)
        layout["zero_points"] = (grouped, torch.uint8) if asymmetric else None
    elif format in READABLE_FORMATS:
        if block_size is None or block_size < 1 or group_size is not None:
            raise ValueError(f"an {format} weight has a block_size >= 1 and no group_size, not {block_size} and {group_size}")
        num_blocks = -(-num_rows * num_columns // block_size)
        layout["codes"] = ((-(-num_rows * num_columns // 2),), torch.uint8)
        layout["absmax"] = ((num_blocks,), torch.uint8 if nested else torch.float32)
        if nested:
            layout["nested_absmax"] = ((-(-num_blocks // reference.NF4_NESTED_BLOCK),), torch.float32)
            layout["nested_quant_map"] = ((256,), torch.float32)
            layout["nested_offset"] = ((1,), torch.float32)
    else:
        raise ValueError(f"format must be one of {READABLE_FORMATS}, not {format!r}")
    return layout


def _describe(spec: _Spec) -> str:
    return "absent" if spec is None else f"{str(spec[1]).removeprefix('torch.')} of shape {spec[0]}"


def _refuse(w: torch.Tensor, bad: torch.Tensor, expected: str) -> None:
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"{expected}; weight[{row}, {column}] is {w[row, column].item()} ({int(bad.sum())} such values)")
