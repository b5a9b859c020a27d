"""Run routes over the same data in turn on one core, take medians, and say how many times as fast the first one is.

The peers that the harnesses compare with (datatrove, datasketch) are no dependencies of ours: ``pip install -e '.[peers]'``, or
put a folder that has them on PYTHONPATH. One that is not there is named in the output.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

BUSY = 1.3
"""Wall seconds a CPU second from which the wall time says more about the machine's other work than about the route."""


@dataclass(frozen=True)
class Cost:
    """What a route took: medians over the rounds. CPU seconds include the process's children (the judge process)."""

    wall_s: float
    cpu_s: float


def missing(*modules: str) -> str:
    """Say which of the modules cannot be imported and what to do; "" where all can."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"{error}; pip install -e '.[peers]', or put a folder that has it on PYTHONPATH"
    return ""


def keep_to_one_core() -> None:
    """Bind this process, and those it starts from now on, to the core that has the least to do."""
    busy = psutil.cpu_percent(interval=0.5, percpu=True)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0), key=lambda core: busy[core])})


def interleaved(routes: Mapping[str, Callable[[], object]], num_rounds: int) -> dict[str, Cost]:
    """Run every route once a round, the first one changing from round to round, so that none has the quiet minutes alone."""
    names = list(routes)
    taken: dict[str, list[Cost]] = {name: [] for name in names}
    for number in range(num_rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            wall, cpu = time.perf_counter(), cpu_seconds()
            routes[name]()
            taken[name].append(Cost(time.perf_counter() - wall, cpu_seconds() - cpu))
    return {name: median_cost(costs) for name, costs in taken.items()}


def median_cost(costs: Sequence[Cost]) -> Cost:
    return Cost(statistics.median(c.wall_s for c in costs), statistics.median(c.cpu_s for c in costs))


def cpu_seconds() -> float:
    """CPU seconds so far of this process and of its children that live, or have been waited for."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    seconds = time.process_time() + sum(os.times()[2:4])
    for process in processes[1:]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system
    return seconds


def table(costs: Mapping[str, Cost], amount: float, unit: str) -> list[str]:
    """Lines of ``amount`` divided by seconds for each route, and the ratio of the first one to each other."""
    first = next(iter(costs.values()))
    width = max(map(len, costs))
    lines = [f"  {'':{width}} {unit + '/CPU s':>14} {unit + '/s':>14}   ours is so many times as fast (CPU, wall)"]
    for number, (name, cost) in enumerate(costs.items()):
        rate = f"{amount / cost.cpu_s:14,.1f} {amount / cost.wall_s:14,.1f}"
        ratio = f"{cost.cpu_s / first.cpu_s:.1f} ×, {cost.wall_s / first.wall_s:.1f} ×" if number else ""
        lines.append(f"  {name:{width}} {rate}   {ratio}".rstrip())
    if any(cost.wall_s > BUSY * cost.cpu_s for cost in costs.values()):
        lines.append("  The core had other work to do meanwhile: go by the CPU seconds.")
    return lines


def parser_of(module_doc: str) -> argparse.ArgumentParser:
    """A parser whose help is a harness's own docstring, with its lines as they stand, and each option's default."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    return argparse.ArgumentParser(description=module_doc, formatter_class=Help)
