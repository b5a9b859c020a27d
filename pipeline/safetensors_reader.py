"""Reads safetensors files strictly: the header byte by byte, the tensors as numpy arrays a piece at a time.

The specification is huggingface/safetensors, README, "Format": 8 bytes of header length (little endian), a JSON header,
then the tensors without a hole between them. Stricter than the library where the library is lenient. No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.pipeline.manifest import strict_json

MAX_HEADER_BYTES = 100_000_000  # the limit of the specification
ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8},
    **{"F16": 2, "BF16": 2, "F32": 4, "F64": 8},
}
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")
_CHUNK = 1 << 24  # elements looked at at once, so that a large tensor costs megabytes of memory


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: ``start`` and ``stop`` are byte positions in the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def chunks(self, dtype: str) -> Iterator[np.ndarray]:
        """The tensor's elements as flat numpy arrays of the given type, a piece at a time."""
        data = np.memmap(self.file, mode="r", dtype=np.uint8)[self.start : self.stop]
        step = _CHUNK * np.dtype(dtype).itemsize
        for begin in range(0, len(data), step):
            yield np.frombuffer(data[begin : begin + step], dtype=dtype)


def read_safetensors_header(path: Path) -> tuple[list[TensorEntry], list[str]]:
    """Parse a safetensors header strictly; returns the tensors that are well described, and every fault in words.

    Refused: a header longer than the file or 100 MB; JSON with a key twice; names that could be a path; unknown dtypes;
    empty tensors; byte ranges that do not equal shape × dtype, overlap, leave a gap, or do not end with the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            return [], [f"not safetensors: the header should be {length} bytes and the file has {size}"]
        raw = file.read(length)
    if not raw.startswith(b"{"):
        return [], ["not safetensors: the header does not begin with '{'"]
    try:
        header = strict_json(raw)
    except ValueError as error:
        return [], [f"the header is not JSON: {error}"]

    faults: list[str] = []
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        faults.append("__metadata__ has to map text to text")
    entries = []
    for name, info in header.items():
        fault = _tensor_fault(name, info)
        if fault:
            faults.append(f"tensor {name!r} {fault}")
            continue
        begin, end = (8 + length + offset for offset in info["data_offsets"])
        entries.append(TensorEntry(path, name, info["dtype"], tuple(info["shape"]), begin, end))
    entries.sort(key=lambda entry: entry.start)
    position, before = 8 + length, "the header"
    for entry in entries:
        if entry.start != position:
            what = "overlaps" if entry.start < position else f"leaves a gap of {entry.start - position} bytes after"
            faults.append(f"tensor {entry.name!r} {what} {before!r}")
        position, before = max(position, entry.stop), entry.name
    if position != size and not (faults and position < size):
        faults.append(f"the tensors end at byte {position} and the file at byte {size}")
    return [entry for entry in entries if entry.stop <= size], faults


def _tensor_fault(name: str, info: Any) -> str:
    if len(name) > 256 or not _TENSOR_NAME.fullmatch(name):
        return "has a name that no module could have (letters, digits, '_', '-', single dots)"
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        return "needs exactly dtype, shape and data_offsets"
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"has the dtype {dtype!r}; known are {', '.join(ITEM_BYTES)}"
    if not isinstance(shape, list) or any(type(length) is not int or length < 1 for length in shape):
        return f"has the shape {shape!r}; a shape is a list of whole numbers above 0"
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(offset) is not int or offset < 0 for offset in offsets):
        return f"has the data_offsets {offsets!r}; expected [begin, end]"
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        return f"takes {offsets[1] - offsets[0]} bytes where {dtype} {shape} needs {expected}"
    return ""
