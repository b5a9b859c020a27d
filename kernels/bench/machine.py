"""The machine's roofs, measured in the process that measures the kernels: how fast it reads memory, how fast it multiplies.

The loops are those of the C++ library (``sh_read_bandwidth``, ``sh_peak`` in kernels/csrc/api.h), compiled for the instruction
set that serves; where there is no library, torch's own sum and matmuls stand in, which is said, and which lie below the roofs.
Rates are in GB/s (1e9 bytes) and GOP/s (1e9 operations, a multiply-add is two).
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from stillhouse.kernels import cpu
from stillhouse.kernels.bench import timing

KINDS = ("fp32", "bf16", "int8")
"""Kinds of arithmetic, in the order of ``sh_peak``."""
BUFFER_BYTES = 1 << 30
SECONDS_PER_SAMPLE = 0.02
PROBE_ROUNDS = 100_000
"""Rounds of ``sh_peak`` that are timed to learn how many fill a sample: a tenth of a millisecond with AVX-512."""
PACKAGES = ("torch", "stillhouse", "transformers", "peft", "bitsandbytes", "torchao", "llama_cpp_python", "gguf")

Rate = Callable[[], float]


def read_rate(buffer: torch.Tensor, threads: int) -> Rate:
    """A sampler of read bandwidth in GB/s: one pass over ``buffer`` (int64, larger than any cache) with so many threads."""
    library, size_bytes = cpu.library(), buffer.numel() * buffer.element_size()

    def read() -> None:
        if library is not None:
            library.sh_read_bandwidth(buffer.data_ptr(), size_bytes, threads)
        else:
            buffer.sum()

    return lambda: size_bytes / 1e9 / _with_threads(threads, read)


def peak_rate(kind: str, threads: int) -> Rate | None:
    """A sampler of the arithmetic peak of ``kind`` in GOP/s, or None where the library has no such instruction."""
    library = cpu.library()
    if library is None:
        return _torch_peak_rate(kind, threads)

    def run(count: int) -> tuple[float, float]:
        started = time.perf_counter()
        operations = library.sh_peak(KINDS.index(kind), count, threads)
        return operations, time.perf_counter() - started

    if run(1)[0] == 0:
        return None
    # The best of a few, because the first call starts the threads and any call may meet a busy machine.
    seconds = min(run(PROBE_ROUNDS)[1] for _ in range(5))
    count = max(PROBE_ROUNDS, round(PROBE_ROUNDS * SECONDS_PER_SAMPLE / seconds))

    def rate() -> float:
        operations, seconds = run(count)
        return operations / 1e9 / seconds

    return rate


def _torch_peak_rate(kind: str, threads: int, size: int = 1024) -> Rate:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[kind]
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype).t()
    multiply = torch._int_mm if kind == "int8" else torch.matmul
    _with_threads(threads, lambda: multiply(a, b))
    return lambda: 2 * size**3 / 1e9 / _with_threads(threads, lambda: multiply(a, b))


def _with_threads(threads: int, call: Callable[[], object]) -> float:
    """Seconds of one call with torch set to so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return timing.seconds_per_call(call, 1)
    finally:
        torch.set_num_threads(before)


def measured_by() -> str:
    """Whose loops the roofs are measured with."""
    if cpu.library() is not None:
        return "the library's own loops"
    return "torch's sum and matmuls (no compiled library here): lower than the machine's roofs"


def read_buffer(size_bytes: int = BUFFER_BYTES) -> torch.Tensor:
    """A buffer to read, of ``size_bytes`` or a quarter of the memory that is free, every page of it written once."""
    return torch.ones(min(size_bytes, psutil.virtual_memory().available // 4) // 8, dtype=torch.int64)


def roofs(threads: int, *, rounds: int, size_bytes: int = BUFFER_BYTES, gemm_size: int = 2048) -> dict[str, Any]:
    """Bandwidth with one thread and with all, peaks with all, and torch's bf16 GEMM: medians and quartiles of the rounds.

    Returns:
        ``measured_by``, ``buffer_bytes``, and ``rates``: by name, ``median``, ``q1``, ``q3`` and ``unit``.
    """
    buffer = read_buffer(size_bytes)
    samplers: dict[str, Rate] = {
        f"read, {count} thread{'s' if count > 1 else ''}": read_rate(buffer, count) for count in sorted({1, threads})
    }
    units = dict.fromkeys(samplers, "GB/s")
    for kind in KINDS:
        rate = peak_rate(kind, threads)
        if rate is not None:
            samplers[f"{kind} peak"] = rate
    a = torch.randn(gemm_size, gemm_size).to(torch.bfloat16)
    samplers[f"torch bf16 {gemm_size}³"] = lambda: 2 * gemm_size**3 / 1e9 / timing.seconds_per_call(lambda: a @ a.T, 1)
    samples = timing.interleave(samplers, rounds + 1)
    rates = {}
    for name, values in samples.items():
        median, first, third = timing.median_and_quartiles(values[1:])  # the first round warms up
        rates[name] = {"median": median, "q1": first, "q3": third, "unit": units.get(name, "GOP/s")}
    return {"measured_by": measured_by(), "buffer_bytes": buffer.numel() * 8, "rates": rates}


def facts(threads: int) -> dict[str, Any]:
    """What a figure is worth nothing without: machine, date, versions, threads, and which of our paths served."""
    return {
        "machine": processor(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "threads": threads,
        "path": cpu.describe(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "OpenMP's default"),
        "versions": versions(),
    }


def processor() -> str:
    """The processor's name where Linux tells it, its family, its cores and its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    family = f" (family {known['cpu family']}, model {known['model']})" if "cpu family" in known and "model" in known else ""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    return (
        f"{known.get('model name') or platform.processor() or 'unknown processor'}{family}, {platform.machine()}, {cores} cores"
    )


def versions() -> dict[str, str]:
    """Of those packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # the measurement says which peer is missing
            found[name] = version(name)
    return found
