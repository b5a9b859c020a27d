"""``stillhouse bench kernels``: the machine's roofs first, then one layer, whole models and training steps against named peers.

Each section is measured by a module of this package and can be asked for alone. What is printed as tables is the JSON that
:func:`measure` returns, so a figure in one is a figure in the other.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from stillhouse.kernels.bench import generation, layer_memory, layers, machine, peers, plot, qlora, tables

SECTIONS = ("machine", "decode", "prefill", "backward", "model", "qlora")


def main(
    *,
    as_json: bool = False,
    sections: Sequence[str] = SECTIONS,
    threads: int | None = None,
    quick: bool = False,
    svg: Path | None = None,
    batches: Sequence[int] | None = None,
    shape: tuple[int, int] | None = None,
    num_layers: int | None = None,
) -> None:
    """Measure on this machine and print tables, or one JSON object, to stdout; progress goes to stderr.

    Args:
        sections: names out of ``SECTIONS``.
        threads: torch's own number by default.
        quick: small sizes and two rounds: shows that everything runs, not how fast.
        svg: write the roofline plot there; needs the section decode or prefill.
        batches: rows of x, instead of each section's own: decode takes those below 16, prefill the others, backward all.
        shape: of the layer, (N, K), multiples of 64.
        num_layers: of the QLoRA model.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    sizes = {"batches": batches, "shape": shape, "num_layers": num_layers}
    try:
        facts = measure(sections, threads=torch.get_num_threads(), quick=quick, **sizes)
    finally:
        torch.set_num_threads(before)
    if svg is not None:
        svg.write_text(plot.roofline(facts), encoding="utf-8")
    print(json.dumps(facts) if as_json else tables.text(facts))


def read_options(only: str | None, batches: str | None, shape: str | None, svg: Path | None) -> dict[str, Any]:
    """The command line's texts as the arguments of :func:`main`: ``decode,model``, ``1,16,128``, ``4096x4096``.

    Raises:
        ValueError: one of them says something else, or ``svg`` has nothing to draw.
    """
    sections = _sections(only)
    if svg is not None and not {"decode", "prefill"} & set(sections):
        raise ValueError(f"--svg draws decode and prefill, and --only {only} measures neither")
    rows = None if batches is None else _numbers(batches, ",", "--batches")
    if rows is not None:
        first = layers.PREFILL_BATCHES[0]
        sections = tuple(
            name for name in sections if (name != "decode" or min(rows) < first) and (name != "prefill" or max(rows) >= first)
        )
        if not sections:
            raise ValueError(
                f"--batches {batches} leaves nothing of --only {only}: decode is below {first} rows, prefill from {first}"
            )
    return {
        "sections": sections,
        "batches": rows,
        "shape": None if shape is None else _shape(shape),
        "svg": svg,
    }


def measure(
    sections: Sequence[str],
    *,
    threads: int,
    quick: bool = False,
    batches: Sequence[int] | None = None,
    shape: tuple[int, int] | None = None,
    num_layers: int | None = None,
) -> dict[str, Any]:
    """Measure those sections, one after the other; arguments as in :func:`main`.

    Returns:
        machine, date, threads, path and versions (:func:`machine.facts`); ``quick``; ``shape``, ``min_bytes``, ``rounds`` of
        the layers; ``missing`` (peer: why); and one entry for each section, that of ``machine`` under ``roofs``.
    """
    shape = shape or ((256, 512) if quick else layers.SHAPE)
    sizes: dict[str, Any] = (
        {"min_bytes": 2 << 20, "rounds": 2} if quick else {"min_bytes": layers.MIN_BYTES, "rounds": layers.ROUNDS}
    )
    seconds_per_sample, read_bytes = (1e-3, 16 << 20) if quick else (layers.SECONDS_PER_SAMPLE, machine.BUFFER_BYTES)
    decode_batches, prefill_batches = layers.DECODE_BATCHES, layers.PREFILL_BATCHES
    if quick:
        decode_batches, prefill_batches = (1, 8), (16, 64)
    if batches is not None:
        decode_batches = [batch for batch in batches if batch < layers.PREFILL_BATCHES[0]]
        prefill_batches = [batch for batch in batches if batch >= layers.PREFILL_BATCHES[0]]
    facts = machine.facts(threads) | {"quick": quick, "shape": list(shape)} | sizes | {"missing": {}}

    def layer_rows(names: Sequence[str], found: Sequence[int], passed: peers.Pass) -> list[dict[str, Any]]:
        settings = sizes | {
            "shape": shape,
            "threads": threads,
            "seconds_per_sample": seconds_per_sample,
            "read_bytes": read_bytes,
        }
        rows, missing = layers.run(names, found, passed=passed, **settings)
        facts["missing"] |= missing
        return rows

    def roofs() -> dict[str, Any]:
        return machine.roofs(threads, rounds=sizes["rounds"], size_bytes=read_bytes, gemm_size=256 if quick else 2048)

    def backward() -> dict[str, Any]:
        own = (32, 64) if quick else layers.BACKWARD_BATCHES
        rows = layer_rows(peers.BACKWARD, batches or own, "forward+backward")
        names = tuple(rows[0]["contenders"])
        return {"rows": rows, "memory": layer_memory.run(names, shape=shape, threads=threads, repeats=1 if quick else 3)}

    def model() -> list[dict[str, Any]]:
        small = {"shapes": (generation.TINY,), "rounds": 2, "new_tokens": 4, "prefill_tokens": 32} if quick else {}
        found, missing = generation.run(threads=threads, **small)
        facts["missing"] |= missing
        return found

    def training() -> dict[str, Any]:
        small = {"tokens": ((1, 16),), "rounds": 2, "vocab": 512} if quick else {}
        found, missing = qlora.run(threads=threads, num_layers=num_layers or (1 if quick else qlora.NUM_LAYERS), **small)
        facts["missing"] |= missing
        return found

    run: dict[str, Callable[[], Any]] = {
        "machine": roofs,
        "decode": lambda: layer_rows(peers.FORWARD, decode_batches, "forward"),
        "prefill": lambda: layer_rows(peers.FORWARD, prefill_batches, "forward"),
        "backward": backward,
        "model": model,
        "qlora": training,
    }
    for name in sections:
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        started = time.perf_counter()
        facts["roofs" if name == "machine" else name] = run[name]()
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return facts


def _sections(only: str | None) -> tuple[str, ...]:
    """Those asked for, in the order in which they are measured: the roofs come first."""
    wanted = SECTIONS if only is None else tuple(name.strip() for name in only.split(","))
    unknown = [name for name in wanted if name not in SECTIONS]
    if unknown:
        raise ValueError(f"--only takes {', '.join(SECTIONS)}, separated by commas; not {', '.join(map(repr, unknown))}")
    return tuple(name for name in SECTIONS if name in wanted)


def _numbers(text: str, separator: str, option: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(separator))
    except ValueError as error:
        raise ValueError(f"{option} takes whole numbers separated by {separator!r}, not {text!r}") from error
    if any(number < 1 for number in found):
        raise ValueError(f"{option} takes numbers of at least 1, not {text!r}")
    return found


def _shape(text: str) -> tuple[int, int]:
    found = _numbers(text, "x", "--shape")
    if len(found) != 2 or any(number % 64 for number in found):
        raise ValueError(f"--shape takes NxK, multiples of 64 (the peers' groups), such as 4096x4096; not {text!r}")
    return found[0], found[1]
