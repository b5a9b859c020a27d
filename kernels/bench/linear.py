"""Time of one 4-bit linear layer against bitsandbytes' NF4 and torch's dense matmul, on the CPU.

Method. Every contender holds enough copies of the same weight to fill ``MIN_BYTES`` in its own format, and takes the next
one at each call: a model's layers are not in the cache either. All contenders take turns within each round, in another
order each time, so that a slow spell of the machine meets all of them. Reported are medians over the rounds and the ratio
of medians, peer over ours: above 1 ours is faster. Forward is without gradients; forward + backward gives dx alone, which
is all that LoRA over a frozen weight asks of a layer.

The peers are taken at their best: bitsandbytes' layer in eval mode for forward, where on a CPU with AVX-512 BF16 it repacks
the weight and runs a fused kernel (in bfloat16, whatever x is); in training mode for forward + backward, as PEFT has it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from stillhouse.kernels.formats import PackedWeight, quantize
from stillhouse.kernels.linear import Linear4bit

Pass = Literal["forward", "forward+backward"]
PASSES: tuple[Pass, ...] = ("forward", "forward+backward")
NUM_ROWS, NUM_COLUMNS = 2048, 2048
BATCHES = (1, 16, 128)
DTYPES = (torch.bfloat16, torch.float32)
MIN_BYTES = 64 << 20
ROUNDS = 7
SECONDS_PER_SAMPLE = 0.07

INT4, NF4 = "int4 g32", "nf4"
BITSANDBYTES, DENSE = "bitsandbytes nf4", "torch dense"
OURS, PEERS = (INT4, NF4), (BITSANDBYTES, DENSE)


@dataclass(frozen=True)
class Contender:
    """One way to hold the weight, in enough copies that the next one is never in the cache.

    Args:
        shape: (N, K) of the weight.
        layers: take x of shape (M, K), give (M, N); frozen.
        bytes_per_copy: of one copy, all its tensors together.
    """

    name: str
    shape: tuple[int, int]
    layers: Sequence[nn.Module]
    bytes_per_copy: int


def contenders(weight_NK: torch.Tensor, *, dtype: torch.dtype, passed: Pass, min_bytes: int) -> tuple[list[Contender], str]:
    """Make the contenders for activations of ``dtype``.

    Args:
        weight_NK: the weight that all of them stand for, float32 (N, K), N and K multiples of 64.
        passed: what they will be timed on; bitsandbytes' layer differs between inference and training.
        min_bytes: copies are made until each contender holds this much.

    Returns:
        the contenders, and in words why one is missing ("" where none is).
    """
    shape = (weight_NK.shape[0], weight_NK.shape[1])
    packed = {INT4: quantize(weight_NK, "int4", group_size=32), NF4: quantize(weight_NK, "nf4", block_size=64)}
    made = [
        _copies(name, shape, lambda weight=weight: Linear4bit(_copy(weight), dtype=dtype), weight.size_bytes, min_bytes)
        for name, weight in packed.items()
    ]
    missing = ""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        missing = f"bitsandbytes is missing here ({error}): its columns are empty; pip install bitsandbytes"
    else:
        size = weight_NK.numel() // 2 + weight_NK.numel() // 64
        made.append(_copies(BITSANDBYTES, shape, lambda: _bitsandbytes_layer(weight_NK, passed), size, min_bytes))
    dense_size = weight_NK.numel() * dtype.itemsize
    made.append(_copies(DENSE, shape, lambda: _dense_layer(weight_NK, dtype), dense_size, min_bytes))
    return made, missing


def _copies(name: str, shape: tuple[int, int], make: Callable[[], nn.Module], size_bytes: int, min_bytes: int) -> Contender:
    return Contender(name, shape, [make() for _ in range(max(1, -(-min_bytes // size_bytes)))], size_bytes)


def _copy(weight: PackedWeight) -> PackedWeight:
    settings = {"group_size": weight.group_size, "block_size": weight.block_size}
    return PackedWeight(weight.format, weight.shape, **settings, **{k: t.clone() for k, t in weight.tensors().items()})


def _bitsandbytes_layer(weight_NK: torch.Tensor, passed: Pass) -> nn.Module:
    import bitsandbytes as bnb

    num_rows, num_columns = weight_NK.shape
    layer = bnb.nn.Linear4bit(num_columns, num_rows, bias=False, quant_type="nf4", compress_statistics=True)
    layer.weight = bnb.nn.Params4bit(
        weight_NK.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    layer.to("cpu")  # this is where it quantizes
    return layer.train(passed == "forward+backward")


def _dense_layer(weight_NK: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    layer = nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias=False, dtype=dtype)
    layer.weight = nn.Parameter(weight_NK.to(dtype, copy=True), requires_grad=False)
    return layer


def run_once(
    layer: nn.Module, x_MK: torch.Tensor, dy_MN: torch.Tensor, passed: Pass
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is timed: y of shape (M, N), and dx of shape (M, K) for ``forward+backward``, else None."""
    if passed == "forward":
        with torch.no_grad():
            return layer(x_MK), None
    x_MK = x_MK.detach().requires_grad_()
    y_MN = layer(x_MK)
    y_MN.backward(dy_MN)
    return y_MN, x_MK.grad


def measure(
    made: Sequence[Contender],
    batch: int,
    *,
    dtype: torch.dtype,
    passed: Pass,
    rounds: int,
    seconds_per_sample: float,
) -> dict[str, list[float]]:
    """Seconds a call of each contender, one number a round, with ``batch`` rows of activations."""
    num_rows, num_columns = made[0].shape
    generator = torch.Generator().manual_seed(0)
    x_MK = torch.randn(batch, num_columns, generator=generator).to(dtype)
    dy_MN = torch.randn(batch, num_rows, generator=generator).to(dtype)
    turns: dict[str, Iterator[nn.Module]] = {contender.name: itertools.cycle(contender.layers) for contender in made}

    def seconds_per_call(name: str, num_calls: int) -> float:
        started = time.perf_counter()
        for _ in range(num_calls):
            run_once(next(turns[name]), x_MK, dy_MN, passed)
        return (time.perf_counter() - started) / num_calls

    num_calls = {}
    for contender in made:
        # Once round, so that whatever a layer does at its first call (bitsandbytes repacks) is done.
        seconds_per_call(contender.name, len(contender.layers))
        num_calls[contender.name] = max(1, round(seconds_per_sample / seconds_per_call(contender.name, 2)))
    samples: dict[str, list[float]] = {name: [] for name in num_calls}
    shuffle = random.Random(0)
    for _ in range(rounds):
        order = list(num_calls)
        shuffle.shuffle(order)
        for name in order:
            samples[name].append(seconds_per_call(name, num_calls[name]))
    return samples


def summarize(samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians in microseconds, and peer over ours as ratios of medians; a peer that was not there has no entry."""
    medians = {name: statistics.median(seconds) for name, seconds in samples.items()}
    return {
        "median_us": {name: seconds * 1e6 for name, seconds in medians.items()},
        "ratios": {f"{peer} / {our}": medians[peer] / medians[our] for our in OURS for peer in PEERS if peer in medians},
    }


def main(*, as_json: bool) -> None:
    """Measure on this machine (under a minute on two cores) and print a table, or one JSON object, to stdout."""
    print(f"measuring {NUM_ROWS} × {NUM_COLUMNS} layers on the CPU, about a minute", file=sys.stderr)
    weight_NK = torch.randn(NUM_ROWS, NUM_COLUMNS, generator=torch.Generator().manual_seed(0)) * NUM_COLUMNS**-0.5
    rows, missing = [], ""
    for dtype, passed in itertools.product(DTYPES, PASSES):
        made, missing = contenders(weight_NK, dtype=dtype, passed=passed, min_bytes=MIN_BYTES)
        for batch in BATCHES:
            samples = measure(made, batch, dtype=dtype, passed=passed, rounds=ROUNDS, seconds_per_sample=SECONDS_PER_SAMPLE)
            case = {"dtype": str(dtype).removeprefix("torch."), "pass": passed, "batch": batch}
            rows.append(case | summarize(samples))
    facts = {"machine": machine(), "threads": torch.get_num_threads(), "versions": versions(), "missing": missing}
    facts |= {"shape": [NUM_ROWS, NUM_COLUMNS], "min_bytes": MIN_BYTES, "rounds": ROUNDS, "rows": rows}
    print(json.dumps(facts) if as_json else table(facts))


def table(facts: Mapping[str, Any]) -> str:
    """The measurement as plain text."""
    versions_text = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"{facts['machine']}, {facts['threads']} threads, {versions_text}",
        f"linear layer {facts['shape'][0]} × {facts['shape'][1]}, {facts['min_bytes'] >> 20} MiB of weights in rotation; "
        f"medians of {facts['rounds']} interleaved rounds",
        "",
        f"{'':34}{'microseconds':^45}{'times as fast as':^36}",
        f"{'':34}{'':45}{'bitsandbytes nf4':^18}{'torch dense':^18}",
        f"{'x':<10}{'pass':<17}{'M':>4}{'':3}{INT4:>9}{NF4:>9}{'bnb nf4':>9}{'dense':>9}{'':9}" + f"{INT4:>9}{NF4:>9}" * 2,
    ]
    for row in facts["rows"]:
        times = "".join(_cell(row["median_us"].get(name), ".0f") for name in (*OURS, *PEERS))
        ratios = "".join(_cell(row["ratios"].get(f"{peer} / {our}"), ".2f") for peer in PEERS for our in OURS)
        lines.append(f"{row['dtype']:<10}{row['pass']:<17}{row['batch']:>4}{'':3}{times}{'':9}{ratios}")
    if facts["missing"]:
        lines += ["", facts["missing"]]
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return f"{'–' if value is None else format(value, form):>9}"


def machine() -> str:
    """The processor's name where Linux tells it, and its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    family = f" (family {known['cpu family']}, model {known['model']})" if "cpu family" in known and "model" in known else ""
    return f"{known.get('model name') or platform.processor() or 'unknown processor'}{family}, {platform.machine()}"


def versions() -> dict[str, str]:
    """Of torch and, where it is installed, bitsandbytes."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"torch": torch.__version__}
    with contextlib.suppress(PackageNotFoundError):  # the table says that it is missing
        found["bitsandbytes"] = version("bitsandbytes")
    return found
