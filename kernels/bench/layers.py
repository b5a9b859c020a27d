"""One 4-bit linear layer: decode (M = 1 … 8 rows), prefill (16 … 2,048 rows), forward + backward.

Every contender holds at least ``MIN_BYTES`` of copies of the same weight and takes the next one at each call: a model's layers
are not in the cache either. The machine's roofs (read bandwidth, bf16 and int8 peak) take their turns in every round like a
contender, so a share of the roof is a share of what the machine gave in that minute. Forward is without gradients; forward +
backward gives dx alone, which is all that LoRA over a frozen weight asks of a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stillhouse.kernels.bench import machine, peers, timing
from stillhouse.kernels.bench.peers import Contender, Pass

SHAPE = (4096, 4096)
MIN_BYTES = 256 << 20
DECODE_BATCHES = (1, 2, 4, 8)
PREFILL_BATCHES = (16, 32, 64, 128, 256, 512, 1024, 2048)
BACKWARD_BATCHES = (32, 64, 128, 512, 2048)
ROUNDS = 7
SECONDS_PER_SAMPLE = 0.1


def random_weight(shape: tuple[int, int]) -> torch.Tensor:
    """A weight as an initialisation would give it, float32 (N, K)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * shape[1] ** -0.5


def roof_samplers(threads: int, read_bytes: int) -> dict[str, machine.Rate]:
    """Samplers of the roofs that a layer is held against: ``read`` in GB/s, ``bf16`` and ``int8`` in GOP/s."""
    samplers = {"read": machine.read_rate(machine.read_buffer(read_bytes), threads)}
    peaks = {kind: machine.peak_rate(kind, threads) for kind in ("bf16", "int8")}
    return samplers | {kind: rate for kind, rate in peaks.items() if rate is not None}


def measure(
    made: Sequence[Contender],
    batch: int,
    *,
    passed: Pass,
    roofs: Mapping[str, machine.Rate],
    rounds: int,
    seconds_per_sample: float,
) -> dict[str, Any]:
    """Time all contenders with ``batch`` rows of bfloat16 activations.

    Returns:
        a row: ``pass``, ``batch``, ``roofs`` (medians of the same rounds), ``contenders`` (see :func:`figures`) and ``ratios``
        of medians, peer over ours.
    """
    num_rows, num_columns = made[0].shape
    generator = torch.Generator().manual_seed(0)
    x_MK = torch.randn(batch, num_columns, generator=generator).to(torch.bfloat16)
    dy_MN = torch.randn(batch, num_rows, generator=generator).to(torch.bfloat16)

    def call_next(take: Callable[[], torch.nn.Module]) -> None:
        peers.run_once(take(), x_MK, dy_MN, passed)

    samplers = dict(roofs)
    for name, take in peers.next_layer(made).items():
        call = functools.partial(call_next, take)
        samplers[name] = timing.sampler(call, warm_up_calls=1, seconds_per_sample=seconds_per_sample)
    samples = timing.interleave(samplers, rounds)
    heights = {name: timing.median_and_quartiles(samples.pop(name))[0] for name in roofs}
    operations = 2 * batch * num_rows * num_columns * (2 if passed == "forward+backward" else 1)
    rows = {contender.name: figures(samples[contender.name], contender, operations, heights) for contender in made}
    ratios = timing.ratios({name: row["median_us"] for name, row in rows.items()}, peers.OURS)
    return {"pass": passed, "batch": batch, "roofs": heights, "contenders": rows, "ratios": ratios}


def figures(seconds: Sequence[float], contender: Contender, operations: int, roofs: Mapping[str, float]) -> dict[str, float]:
    """What one contender's samples say: times in microseconds, rates, and shares of the roofs.

    ``gb_s`` counts the packed weight once a call (in forward + backward it is read twice), ``gop_s`` two operations a
    multiply-add. ``share_of_read`` and ``share_of_peak`` divide them by the read bandwidth and by the peak of the contender's
    own arithmetic; a share is left out where its roof was not measured.
    """
    median, first, third = timing.median_and_quartiles(seconds)
    gb_s, gop_s = contender.bytes_per_copy / 1e9 / median, operations / 1e9 / median
    found = {"median_us": median * 1e6, "q1_us": first * 1e6, "q3_us": third * 1e6, "gb_s": gb_s, "gop_s": gop_s}
    found["op_per_byte"] = operations / contender.bytes_per_copy
    if "read" in roofs:
        found["share_of_read"] = gb_s / roofs["read"]
    if contender.arithmetic in roofs:
        found["share_of_peak"] = gop_s / roofs[contender.arithmetic]
    return found


def run(
    names: Sequence[str],
    batches: Sequence[int],
    *,
    passed: Pass,
    shape: tuple[int, int] = SHAPE,
    threads: int,
    min_bytes: int = MIN_BYTES,
    read_bytes: int = machine.BUFFER_BYTES,
    rounds: int = ROUNDS,
    seconds_per_sample: float = SECONDS_PER_SAMPLE,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure those contenders at those batches.

    Args:
        shape: (N, K) of the layer, multiples of 64.
        min_bytes, read_bytes: packed weight that each contender rotates through; buffer that the read bandwidth is taken from.

    Returns:
        a row for each batch, and for each peer that is not here, why.
    """
    made, missing = peers.contenders(names, random_weight(shape), min_bytes=min_bytes)
    peers.warm_up(made, passed)
    roofs = roof_samplers(threads, read_bytes)
    return [
        measure(made, batch, passed=passed, roofs=roofs, rounds=rounds, seconds_per_sample=seconds_per_sample)
        for batch in batches
    ], missing
