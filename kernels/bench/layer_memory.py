"""The memory that one layer's forward + backward takes beside its weight, its input and its results.

Each contender in a process of its own. The layer is made, x and dy are there, a small layer of the same kind has been through
both passes (so that code, threads and a library's own fixed buffers are loaded), and what was freed has gone back to the
system; then the high-water mark of the process is reset, one forward + backward is run, and the mark is read. From the
difference y and dx are taken off, which every layer has to hand out. A layer that decodes the whole weight shows its
2·N·K bytes here. malloc is told to give large blocks back as soon as they are freed, so that what is seen is what was alive
at once, and not how its heap happened to grow. Linux only.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import torch

from stillhouse.kernels.bench import layers, peers, timing, workers

BATCH = 32
_M_MMAP_THRESHOLD = -3  # of malloc.h
SMALL = (256, 256)


def extra_bytes(name: str, shape: tuple[int, int], batch: int) -> int:
    """Measure in this process; a page or two of noise can make it a little less than nothing."""
    small, layer = (peers.make_layer(name, layers.random_weight(size)) for size in (SMALL, shape))
    _forward_backward(small, SMALL, batch)
    x_MK, dy_MN = _operands(shape, batch)
    before = workers.resident_bytes()
    workers.reset_peak()
    y_MN, dx_MK = peers.run_once(layer, x_MK, dy_MN, "forward+backward")
    results = sum(tensor.numel() * tensor.element_size() for tensor in (y_MN, dx_MK))
    return workers.peak_bytes() - before - results


def _operands(shape: tuple[int, int], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, num_columns = shape
    return torch.ones(batch, num_columns, dtype=torch.bfloat16), torch.ones(batch, num_rows, dtype=torch.bfloat16)


def _forward_backward(layer: torch.nn.Module, shape: tuple[int, int], batch: int) -> None:
    peers.run_once(layer, *_operands(shape, batch), "forward+backward")


def run(
    names: Sequence[str], *, shape: tuple[int, int], threads: int, batch: int = BATCH, repeats: int = 3
) -> list[dict[str, Any]]:
    """Medians of ``repeats`` processes each: rows of ``name``, ``shape``, ``batch``, ``extra_bytes``; none but on Linux."""
    if not workers.can_measure_memory():
        return []
    rows = []
    for name in names:
        found = []
        for _ in range(repeats):
            with workers.Worker("stillhouse.kernels.bench.layer_memory", str(threads)) as worker:
                found.append(worker.ask(name=name, shape=list(shape), batch=batch)["extra_bytes"])
        median, _, _ = timing.median_and_quartiles(found)
        rows.append({"name": name, "shape": list(shape), "batch": batch, "extra_bytes": int(median)})
    return rows


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    return {"extra_bytes": extra_bytes(request["name"], tuple(request["shape"]), request["batch"])}


if __name__ == "__main__":
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 256 << 10)  # a fixed threshold; otherwise it grows with what is freed
    torch.set_num_threads(int(sys.argv[1]))
    workers.serve(_answer)
