"""nf4 and fp4 weights to and from bitsandbytes, bit for bit: its checkpoints' tensors, and its live parameters without a copy.

In a checkpoint a layer X is ``X.weight`` uint8 (ceil(N K / 2), 1), element 2i in the high nibble of byte i; ``X.weight.absmax``
float32 (B,), or uint8 (B,) when nested; ``X.weight.quant_map`` float32 (16,), the code's table; when nested
``X.weight.nested_absmax`` float32 (ceil(B / 256),) and ``X.weight.nested_quant_map`` float32 (256,); and
``X.weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``), uint8, the UTF-8 JSON of the rest. Checked against 0.50.2.

Two things to know of bitsandbytes on a CPU. Its decoder is right where K is a multiple of the block size; for many other
shapes it is not (0.28 relative error instead of 0.09 at 64 × 96), and ``formats.dequantize`` follows the formula instead.
And ``bnb.nn.Linear4bit`` repacks its weight in its first forward in eval mode (where the CPU has AVX-512 BF16), rounding the
scales to bfloat16; going back, as it does before saving, does not restore them. Such a weight is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from stillhouse.kernels import reference
from stillhouse.kernels.formats import PackedWeight

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

BLOCK_SIZES: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The only block sizes that bitsandbytes reads."""
DTYPES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
_STATE_KEY = "quant_state.bitsandbytes__"


def from_bnb_tensors(tensors: Mapping[str, torch.Tensor], prefix: str = "") -> PackedWeight:
    """Read one layer of a bitsandbytes 4-bit checkpoint, sharing its tensors' memory.

    Args:
        tensors: the checkpoint's tensors, or a module's ``state_dict()``; others may stand beside the layer's.
        prefix: the layer's full name (``model.layers.0.mlp.up_proj``); empty for names that begin with ``weight``.

    Raises:
        ValueError: a tensor is missing, does not fit the others, or says something that nf4 and fp4 as known here do not.
    """
    name = f"{prefix}.weight" if prefix else "weight"
    types = [kind for kind in reference.CODE_TABLES if f"{name}.{_STATE_KEY}{kind}" in tensors]
    missing = [key for key in (name, f"{name}.absmax", f"{name}.quant_map") if key not in tensors]
    if missing or len(types) != 1:
        found = sorted(key for key in tensors if key == name or key.startswith(f"{name}."))
        raise ValueError(
            f"a bitsandbytes 4-bit layer has {name}, {name}.absmax, {name}.quant_map and one {name}.{_STATE_KEY}nf4 or …fp4; "
            f"found {found}"
        )
    key = f"{name}.{_STATE_KEY}{types[0]}"
    try:
        state = json.loads(bytes(tensors[key].tolist()).decode())
        block_size, shape = state["blocksize"], state["shape"]
        quant_type, nested_settings = state["quant_type"], (state.get("nested_blocksize"), state.get("nested_dtype"))
        nested = f"{name}.nested_absmax" in tensors
        offset = torch.tensor([state["nested_offset"]], dtype=torch.float32) if nested else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{key} is not the JSON that bitsandbytes writes there: {error!r}") from error
    if quant_type != types[0]:
        raise ValueError(f"{key} says quant_type={quant_type!r}")
    return _packed(
        name,
        types[0],
        shape,
        block_size,
        tensors[name],
        tensors[f"{name}.absmax"],
        tensors[f"{name}.quant_map"],
        nested_absmax=tensors.get(f"{name}.nested_absmax"),
        nested_quant_map=tensors.get(f"{name}.nested_quant_map"),
        nested_offset=None if offset is None else offset.to(tensors[name].device),
        nested_settings=nested_settings,
    )


def to_bnb_tensors(packed: PackedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Write an nf4 or fp4 weight as a bitsandbytes checkpoint holds it; the same bytes, sharing the weight's memory.

    Args:
        packed: nf4 or fp4 with one of bitsandbytes' ``BLOCK_SIZES``.
        dtype: what bitsandbytes decodes to, the model's dtype: float16, bfloat16 or float32.

    Returns:
        ``weight``, ``weight.absmax``, ``weight.quant_map``, ``weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``) and, when
        nested, ``weight.nested_absmax`` and ``weight.nested_quant_map``; a checkpoint prefixes them with the layer's name.

    Raises:
        ValueError: bitsandbytes cannot hold the weight, or decode to that dtype.
    """
    _check_writable(packed, dtype)
    state: dict[str, Any] = {
        "quant_type": packed.format,
        "blocksize": packed.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(packed.shape),
    }
    tensors = {"weight": packed.codes.view(-1, 1), "weight.absmax": packed.absmax, "weight.quant_map": _quant_map(packed)}
    if packed.nested_absmax is not None:
        tensors["weight.nested_absmax"] = packed.nested_absmax
        tensors["weight.nested_quant_map"] = packed.nested_quant_map
        state["nested_blocksize"] = reference.NF4_NESTED_BLOCK
        state["nested_dtype"] = "float32"
        state["nested_offset"] = packed.nested_offset.item()
    text = json.dumps(state).encode()
    tensors[f"weight.{_STATE_KEY}{packed.format}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def from_params4bit(param: torch.Tensor) -> PackedWeight:
    """Take over a live ``bnb.nn.Params4bit``: the packed weight shares the parameter's memory, and nothing is copied.

    As long as both are used, bitsandbytes must not repack the parameter: do not call the old layer's forward in eval mode.

    Raises:
        ValueError: the parameter is not quantized yet, was repacked by an eval forward on the CPU, or holds what nf4 and fp4 as
            known here do not.
    """
    state = getattr(param, "quant_state", None)
    if state is None:
        raise ValueError(
            f"a {type(param).__name__} of {param.dtype} and shape {tuple(param.shape)} has no quant_state: bitsandbytes "
            "quantizes a layer when it is moved to its device, layer.to('cpu') for example"
        )
    if hasattr(state, "packing_format_for_cpu"):
        raise ValueError(
            "bitsandbytes repacked this weight for an eval forward on the CPU and rounded its scales to bfloat16, which cannot "
            "be undone. Load the checkpoint again, and take the layer over before its first forward"
        )
    nested = state.state2
    return _packed(
        "weight",
        state.quant_type,
        None if state.shape is None else list(state.shape),
        state.blocksize,
        param.data.as_subclass(torch.Tensor),
        state.absmax,
        state.code,
        nested_absmax=None if nested is None else nested.absmax,
        nested_quant_map=None if nested is None else nested.code,
        nested_offset=None if nested is None else state.offset.view(1),
        nested_settings=(None, None) if nested is None else (nested.blocksize, str(nested.dtype).removeprefix("torch.")),
    )


def to_quant_state(packed: PackedWeight, dtype: torch.dtype) -> QuantState:
    """Make the ``QuantState`` with which bitsandbytes reads ``packed.codes.view(-1, 1)``, sharing the scales' memory.

    Args:
        packed: nf4 or fp4 with one of bitsandbytes' ``BLOCK_SIZES``.
        dtype: what bitsandbytes decodes to: float16, bfloat16 or float32.

    Raises:
        ValueError: as :func:`to_bnb_tensors`.
    """
    from bitsandbytes.functional import QuantState

    _check_writable(packed, dtype)
    offset = nested = None
    if packed.nested_absmax is not None:
        offset = packed.nested_offset.view(())
        nested = QuantState(
            absmax=packed.nested_absmax,
            code=packed.nested_quant_map,
            blocksize=reference.NF4_NESTED_BLOCK,
            dtype=torch.float32,
        )
    return QuantState(
        absmax=packed.absmax,
        shape=torch.Size(packed.shape),
        code=_quant_map(packed),
        blocksize=packed.block_size,
        quant_type=packed.format,
        dtype=dtype,
        offset=offset,
        state2=nested,
    )


def _packed(
    name: str,
    quant_type: str,
    shape: list[int] | None,
    block_size: int,
    weight: torch.Tensor,
    absmax: torch.Tensor,
    quant_map: torch.Tensor,
    *,
    nested_absmax: torch.Tensor | None,
    nested_quant_map: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    nested_settings: tuple[int | None, str | None],
) -> PackedWeight:
    """Check what both sources have in common, and put it together without a copy."""
    if quant_type not in reference.CODE_TABLES:
        raise ValueError(f"{name}: quant_type must be one of {sorted(reference.CODE_TABLES)}, not {quant_type!r}")
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(size, int) for size in [*shape, block_size]):
        raise ValueError(
            f"{name}: a 4-bit weight here is a matrix (N, K) with a block size; bitsandbytes gives the shape {shape} and the "
            f"blocksize {block_size!r}"
        )
    table = torch.tensor(reference.CODE_TABLES[quant_type])
    # bitsandbytes' kernels use the type's own constants whatever the map says; a map that is another one names another type.
    if quant_map.shape != table.shape or not torch.allclose(quant_map.float().cpu(), table, rtol=0.0, atol=1e-6):
        raise ValueError(f"{name}.quant_map is not {quant_type}'s table: {quant_map.flatten()[:16].tolist()}")
    if absmax.dim() != 1:
        raise ValueError(
            f"{name}.absmax has the shape {tuple(absmax.shape)}, not one a block: bitsandbytes repacked this weight for an "
            "eval forward on the CPU before it was saved, and its scales are lost. Take a checkpoint saved before inference"
        )
    if nested_absmax is not None and nested_settings != (reference.NF4_NESTED_BLOCK, "float32"):
        raise ValueError(
            f"{name}: nested absmax must be of {reference.NF4_NESTED_BLOCK} blocks each and added in float32, not "
            f"nested_blocksize={nested_settings[0]} and nested_dtype={nested_settings[1]!r}; bitsandbytes writes such a "
            "file after an eval forward on the CPU. Take a checkpoint saved before inference"
        )
    # Some files keep plain scales in 16 bits; bitsandbytes widens them as here, exactly.
    scales = absmax.to(torch.float32) if absmax.is_floating_point() else absmax
    try:
        return PackedWeight(
            quant_type,
            (shape[0], shape[1]),
            weight.contiguous().view(torch.uint8).view(-1),  # the storage dtype may be any, quant_storage=torch.bfloat16 say
            block_size=block_size,
            absmax=scales,
            nested_absmax=nested_absmax,
            nested_quant_map=nested_quant_map,
            nested_offset=None if nested_offset is None else nested_offset.to(torch.float32),
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_writable(packed: PackedWeight, dtype: torch.dtype) -> None:
    if packed.format not in reference.CODE_TABLES:
        raise ValueError(f"bitsandbytes holds {sorted(reference.CODE_TABLES)} weights, not {packed.format}; quantize to nf4")
    if packed.block_size not in BLOCK_SIZES:
        raise ValueError(
            f"bitsandbytes has blocks of {BLOCK_SIZES}, not block_size={packed.block_size}; quantize to one of them"
        )
    if dtype not in DTYPES:
        raise ValueError(f"bitsandbytes decodes to {DTYPES}, not {dtype}")


def _quant_map(packed: PackedWeight) -> torch.Tensor:
    return torch.tensor(reference.CODE_TABLES[packed.format], dtype=torch.float32, device=packed.device)
