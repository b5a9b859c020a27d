"""How the benchmarks take time: contenders in turn within a round, rounds in another order each time, medians and quartiles.

A slow spell of the machine then meets all contenders, and the ratio of two medians means something although each of them
wanders. Ratios are peer over ours: above 1, ours is faster.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def interleave(samplers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every sampler once a round, in a shuffled order, and keep what each gave: seconds, or a rate."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    shuffle = random.Random(0)
    order = list(samplers)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            samples[name].append(samplers[name]())
    return samples


def seconds_per_call(call: Callable[[], object], num_calls: int) -> float:
    """Run ``call`` so many times, and return the mean."""
    started = time.perf_counter()
    for _ in range(num_calls):
        call()
    return (time.perf_counter() - started) / num_calls


def sampler(call: Callable[[], object], *, warm_up_calls: int, seconds_per_sample: float) -> Callable[[], float]:
    """Warm ``call`` up, and make a sampler that repeats it for about ``seconds_per_sample`` (at least once)."""
    seconds_per_call(call, warm_up_calls)
    num_calls = max(1, round(seconds_per_sample / seconds_per_call(call, 2)))
    return lambda: seconds_per_call(call, num_calls)


def median_and_quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(median, first quartile, third quartile); all three are the sample where there is one."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return statistics.median(samples), first, third


def ratios(medians: Mapping[str, float], ours: Sequence[str], *, larger_is_faster: bool = False) -> dict[str, float]:
    """``peer / ours`` for every pair that there is, as how many times as fast ours is."""
    pairs = [(peer, our) for our in ours if our in medians for peer in medians if peer not in ours]
    if larger_is_faster:
        return {f"{peer} / {our}": medians[our] / medians[peer] for peer, our in pairs}
    return {f"{peer} / {our}": medians[peer] / medians[our] for peer, our in pairs}
