"""The compiled CPU kernels: which library serves on this machine, and calls into it with torch tensors.

One shared library per instruction set stands beside this file (sources and C interface: ``csrc/``), built at installation
where there is a C++ compiler. The best one that the processor can run is loaded with ctypes after torch, so that both use one
OpenMP runtime and torch's number of threads. ``STILLHOUSE_CPU_ISA`` forces another: ``avx512``, ``avx2``, ``generic``, or
``torch`` for the plain-torch reference. Where nothing was built, plain torch serves and a warning says so, once.

The libraries read the canonical tensors of a :class:`~stillhouse.kernels.formats.PackedWeight`. There is no second layout.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stillhouse.kernels import reference

if TYPE_CHECKING:
    from stillhouse.kernels.formats import PackedWeight

ISAS = ("avx512", "avx2", "generic")
"""From the most to the least demanding."""
ISA_VARIABLE = "STILLHOUSE_CPU_ISA"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes that the libraries take and give, with their numbers in csrc/api.h."""
_MODES = {"bf16": 0, "exact": 1, "int8": 2}
_INT4, _TABLE16 = 0, 1
_ERRORS = {1: "the kernel does not support this call", 2: "there is not enough memory for the kernel's scratch"}


class _Weight(ctypes.Structure):
    """``sh_weight`` of csrc/api.h."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zero_points", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("nested_codes", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("nested_map", ctypes.c_void_p),
        ("nested_offset", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
    )


def library_path(isa: str) -> Path | None:
    """The file of an instruction set's library, or None where it was not built."""
    return next(iter(sorted(Path(__file__).parent.glob(f"_cpu_{isa}.*so"))), None)


def best_isa() -> str | None:
    """The most demanding instruction set that is built and that this processor has, by cpuid; None where nothing is built."""
    generic = library_path("generic")
    if generic is None:
        return None
    ask = ctypes.CDLL(str(generic)).sh_best_isa
    ask.restype = ctypes.c_char_p
    best = ask().decode()
    return next((isa for isa in ISAS[ISAS.index(best) :] if library_path(isa) is not None), None)


@functools.cache
def load(isa: str) -> ctypes.CDLL:
    """Load one instruction set's library, with the types of its functions declared.

    Raises:
        RuntimeError: it was not built, or the processor cannot run it.
    """
    path, best = library_path(isa), best_isa()
    if path is None or best is None:
        raise RuntimeError(f"there is no compiled {isa} library in {Path(__file__).parent}; install again with a C++ compiler")
    if ISAS.index(isa) < ISAS.index(best):
        raise RuntimeError(f"this processor cannot run the {isa} library; it has {best} at most")
    found = ctypes.CDLL(str(path))
    pointer, i32, i64, weight = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.POINTER(_Weight)
    signatures = {
        "sh_isa": (ctypes.c_char_p, ()),
        "sh_forward": (i32, (weight, pointer, i32, pointer, i32, pointer, i64, i32, i32)),
        "sh_backward": (i32, (weight, pointer, i32, pointer, i64, i32, i32)),
        "sh_dequantize": (i32, (weight, pointer, i32, i32)),
        "sh_quantize_int4": (i32, (pointer, i64, i64, i64, i32, i32, pointer, pointer, pointer, i32)),
        "sh_quantize_table16": (i32, (pointer, i64, i64, pointer, pointer, pointer, i32)),
        "sh_block_absmax": (i32, (pointer, i64, i64, pointer, i32)),
        "sh_read_bandwidth": (ctypes.c_uint64, (pointer, i64, i32)),
        "sh_peak": (ctypes.c_double, (i32, i64, i32)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def library() -> ctypes.CDLL | None:
    """The library that serves, or None where plain torch does; decided once, at the first call."""
    return _chosen()[1]


def isa() -> str:
    """What serves: ``avx512``, ``avx2``, ``generic`` or ``torch``."""
    return _chosen()[0]


def describe() -> str:
    """What serves, in words, for reports and benchmarks."""
    chosen = isa()
    if chosen == "torch":
        return "plain torch (no compiled kernels)"
    detail = {"avx512": "AVX-512 VNNI/BF16", "avx2": "AVX2", "generic": "no particular instruction set"}[chosen]
    return f"compiled kernels, {detail}"


@functools.cache
def _chosen() -> tuple[str, ctypes.CDLL | None]:
    wanted = os.environ.get(ISA_VARIABLE, "")
    if wanted not in ("", "torch", *ISAS):
        raise ValueError(f"{ISA_VARIABLE} must be one of {(*ISAS, 'torch')}, not {wanted!r}")
    if wanted == "torch":
        return "torch", None
    found = wanted or best_isa()
    if found is None:
        warnings.warn(
            "the compiled 4-bit kernels are not in this installation; plain torch serves, many times slower. Install again "
            "with a C++ compiler (`stillhouse doctor` says what is missing)",
            RuntimeWarning,
            stacklevel=2,
        )
        return "torch", None
    return found, load(found)


def forget_choice() -> None:
    """Let the next call choose again, after a change of ``STILLHOUSE_CPU_ISA``; for tests."""
    _chosen.cache_clear()


@functools.cache
def _table(name: str) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(reference.CODE_TABLES[name], dtype=torch.float32)


_WEIGHTS: dict[tuple, _Weight] = {}
"""Descriptors by everything that is in them: a decode step asks for the same few hundred again and again."""


def _weight(kind: int, rows: int, columns: int, group: int, tensors: tuple[torch.Tensor | None, ...]) -> _Weight:
    key = (kind, rows, columns, group, *[0 if tensor is None else tensor.data_ptr() for tensor in tensors])
    found = _WEIGHTS.get(key)
    if found is None:
        if len(_WEIGHTS) >= 4096:
            _WEIGHTS.clear()
        found = _WEIGHTS[key] = _Weight(kind, 0, rows, columns, group, *[pointer or None for pointer in key[4:]])
    return found


def int4_weight(
    codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, columns: int, group: int
) -> _Weight:
    """Describe an int4 weight's canonical tensors to the library; they have to live as long as the call."""
    return _weight(_INT4, codes.shape[0], columns, group, (codes, scales, zero_points, None, None, None, None, None, None))


def table_weight(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_quant_map: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    shape: tuple[int, int],
    group: int,
    table: str,
) -> _Weight:
    """Describe an nf4 or fp4 weight's canonical tensors to the library; they have to live as long as the call."""
    if nested_absmax is None:
        tensors = (codes, None, None, absmax, None, None, None, None, _table(table))
    else:
        tensors = (codes, None, None, None, absmax, nested_absmax, nested_quant_map, nested_offset, _table(table))
    return _weight(_TABLE16, shape[0], shape[1], group, tensors)


def packed_weight(packed: PackedWeight) -> _Weight:
    """Describe a packed weight of any format to the library; it has to live as long as the call."""
    if packed.format == "int4":
        return int4_weight(packed.codes, packed.scales, packed.zero_points, packed.shape[1], packed.group_size)
    nested = (packed.nested_absmax, packed.nested_quant_map, packed.nested_offset)
    return table_weight(packed.codes, packed.absmax, *nested, packed.shape, packed.block_size, packed.format)


def serves(*tensors: torch.Tensor | None) -> bool:
    """Whether there is a library, and these tensors lie dense in this machine's memory, where it will read them."""
    return library() is not None and all(tensor is None or (tensor.is_cpu and tensor.is_contiguous()) for tensor in tensors)


def _require(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{_ERRORS[code]}: {what}")


def forward(weight: _Weight, x: torch.Tensor, bias: torch.Tensor | None, activations: str) -> torch.Tensor:
    """``y = x @ w.T + bias`` for x (..., K) on the CPU; y (..., N) in the dtype of x. The modes are those of ``linear4bit``."""
    x = x.contiguous()
    if bias is not None:
        if bias.shape != (weight.rows,) or not bias.is_cpu:
            raise ValueError(
                f"a 4-bit weight of shape ({weight.rows}, {weight.columns}) on the CPU needs a bias of shape ({weight.rows},) "
                f"there, not {tuple(bias.shape)} on {bias.device}"
            )
        bias = bias.contiguous() if bias.dtype in DTYPES else bias.to(torch.float32)
    y = x.new_empty((*x.shape[:-1], weight.rows))
    code = library().sh_forward(
        weight,
        x.data_ptr(),
        DTYPES[x.dtype],
        None if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        y.data_ptr(),
        x.numel() // weight.columns,
        _MODES[activations],
        torch.get_num_threads(),
    )
    if code:  # the words are made only when needed: this is a token's hot path
        _require(code, f"{tuple(x.shape)} times a weight of ({weight.rows}, {weight.columns})")
    return y


def input_gradient(weight: _Weight, dy: torch.Tensor, activations: str) -> torch.Tensor:
    """``dx = dy @ w`` for dy (..., N) on the CPU; dx (..., K) in the dtype of dy; ``bf16`` or ``exact``."""
    dy = dy.contiguous()
    dx = dy.new_empty((*dy.shape[:-1], weight.columns))
    rows = dy.numel() // weight.rows
    code = library().sh_backward(
        weight, dy.data_ptr(), DTYPES[dy.dtype], dx.data_ptr(), rows, _MODES[activations], torch.get_num_threads()
    )
    _require(code, f"{tuple(dy.shape)} times a weight of ({weight.rows}, {weight.columns})")
    return dx


def dequantize(weight: _Weight, dtype: torch.dtype) -> torch.Tensor:
    """Decode a weight on the CPU, (N, K) in ``dtype``: computed in float32, rounded once."""
    out = torch.empty((weight.rows, weight.columns), dtype=dtype)
    code = library().sh_dequantize(weight, out.data_ptr(), DTYPES[dtype], torch.get_num_threads())
    _require(code, f"decoding a weight of ({weight.rows}, {weight.columns})")
    return out


def quantize_int4(
    w: torch.Tensor, group_size: int, symmetric: bool, scale_search: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and zero points of a dense float32 weight (N, K): what ``rounding.round_int4`` chooses, packed."""
    num_rows, num_columns = w.shape
    grouped = (num_rows, -(-num_columns // group_size))
    codes = torch.empty((num_rows, -(-num_columns // 2)), dtype=torch.uint8)
    scales = torch.empty(grouped, dtype=torch.float16)
    zero_points = None if symmetric else torch.empty(grouped, dtype=torch.uint8)
    outputs = (codes.data_ptr(), scales.data_ptr(), None if zero_points is None else zero_points.data_ptr())
    settings = (num_rows, num_columns, group_size, symmetric, scale_search)
    code = library().sh_quantize_int4(w.data_ptr(), *settings, *outputs, torch.get_num_threads())
    _require(code, f"quantizing a weight of {tuple(w.shape)}")
    return codes, scales, zero_points


def block_absmax(w: torch.Tensor, block_size: int) -> torch.Tensor:
    """The largest absolute value of each block of a dense flattened float32 weight, float32 (B,)."""
    absmax = torch.empty(-(-w.numel() // block_size), dtype=torch.float32)
    code = library().sh_block_absmax(w.data_ptr(), w.numel(), block_size, absmax.data_ptr(), torch.get_num_threads())
    _require(code, f"quantizing a weight of {tuple(w.shape)}")
    return absmax


def quantize_nf4(w: torch.Tensor, block_size: int, absmax: torch.Tensor) -> torch.Tensor:
    """Packed nf4 codes of a dense float32 weight for the decoded ``absmax`` of its blocks: ``rounding.round_nf4``'s choice."""
    codes = torch.empty(-(-w.numel() // 2), dtype=torch.uint8)
    pointers = (absmax.data_ptr(), _table("nf4").data_ptr(), codes.data_ptr())
    code = library().sh_quantize_table16(w.data_ptr(), w.numel(), block_size, *pointers, torch.get_num_threads())
    _require(code, f"quantizing a weight of {tuple(w.shape)}")
    return codes
