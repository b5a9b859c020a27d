"""A measurement as plain text. A column ``×name`` says how many times as fast our ``name`` is as the contender of the line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stillhouse.kernels.bench import generation, peers, qlora


def text(facts: Mapping[str, Any]) -> str:
    """All sections that were measured, and which peers were not here."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        facts["machine"],
        f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}; {facts['path']}; {facts['date']}",
        f"OMP_WAIT_POLICY: {facts['omp_wait_policy']}",
        versions,
    ]
    if facts["quick"]:
        lines.append("A quick run: small sizes, two rounds. It shows that everything runs; its figures are not for quoting.")
    lines += [f"missing: {name}: {why}" for name, why in facts["missing"].items()]
    if "roofs" in facts:
        lines += ["", *_roofs(facts["roofs"])]
    layer = f"{facts['shape'][0]} × {facts['shape'][1]}, {facts['min_bytes'] >> 20} MiB of weights in rotation"
    method = f"medians of {facts['rounds']} interleaved rounds (quartiles)"
    for name, title in (("decode", "DECODE"), ("prefill", "PREFILL")):
        if name in facts:
            lines += ["", f"{title}: one layer {layer}; {method}", *_layers(facts[name])]
    if "backward" in facts:
        lines += ["", f"FORWARD + BACKWARD (dx): one layer {layer}; {method}", *_layers(facts["backward"]["rows"])]
        lines += _memory(facts["backward"]["memory"])
    for found in facts.get("model", ()):
        lines += ["", *_model(found)]
    if "qlora" in facts:
        lines += ["", *_qlora(facts["qlora"])]
    return "\n".join(line.rstrip() for line in lines)


def _roofs(found: Mapping[str, Any]) -> list[str]:
    lines = [f"ROOFS: measured by {found['measured_by']}; reads of {found['buffer_bytes'] >> 20} MiB"]
    for name, rate in found["rates"].items():
        lines.append(f"  {name:<22}{rate['median']:>9,.1f} {rate['unit']:<6}({rate['q1']:,.1f}–{rate['q3']:,.1f})")
    return lines


def _layers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        ours = [name for name in peers.OURS if name in row["contenders"]]
        units = {"read": "GB/s read", "bf16": "GOP/s bf16", "int8": "GOP/s int8"}
        roofs = ", ".join(f"{value:,.0f} {units[name]}" for name, value in row["roofs"].items())
        lines += ["", f"M = {row['batch']}   roofs in these rounds: {roofs}"]
        widths = (20, 9, 22, 8, 9, 9, 9, *[15] * len(ours))
        lines.append(
            _line(widths, "", "µs", "(quartiles)", "GB/s", "of read", "GOP/s", "of peak", *(f"×{name}" for name in ours))
        )
        for name, found in row["contenders"].items():
            cells = [name, f"{found['median_us']:,.0f}", _quartiles(found["q1_us"], found["q3_us"], ",.0f")]
            cells += [f"{found['gb_s']:.1f}", _percent(found.get("share_of_read"))]
            cells += [f"{found['gop_s']:,.0f}", _percent(found.get("share_of_peak"))]
            lines.append(_line(widths, *cells, *(_ratio(row["ratios"].get(f"{name} / {our}")) for our in ours)))
    return lines


def _memory(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["", "extra memory of a layer: not measured, it needs Linux"]
    lines = ["", f"extra memory of one layer's forward + backward at M = {rows[0]['batch']}, beside weight, x, y, dx and dy:"]
    return lines + [f"  {row['name']:<20}{row['extra_bytes'] / 1e6:>9.1f} MB" for row in rows]


def _model(found: Mapping[str, Any]) -> list[str]:
    packed = f"{found['packed_bytes'] / 1e6:,.0f} MB of int4 g32 linear layers and head"
    lines = [f"WHOLE MODEL: random Llama, {found['shape']}, {packed}"]
    if "agreement" in found:
        said = ", ".join(f"{name} {value:.4f}" for name, value in found["agreement"].items())
        lines.append(f"  our logits against {generation.LLAMA_CPP}'s on the same tokens: {said}")
    widths = (24, 11, 22, 16)
    for name in ("decode", "prefill"):
        title = f"{name}, {found[name]['tokens']} tokens"
        lines.append(_line(widths, title, "tokens/s", "(quartiles)", f"×{generation.LLAMA_CPP}"))
        for contender, row in found[name]["contenders"].items():
            ratio = _ratio(found[name]["ratios"].get(f"{generation.LLAMA_CPP} / {contender}"))
            cells = (f"  {contender}", f"{row['tokens_per_s']:,.1f}", _quartiles(row["q1"], row["q3"], ",.1f"), ratio)
            lines.append(_line(widths, *cells))
    return lines


def _qlora(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"QLORA STEP: random Qwen2 of Qwen2.5-0.5B's widths, {found['num_layers']} layers, vocabulary {found['vocab']:,},",
        f"LoRA of rank {found['rank']} on all linear layers, bfloat16, AdamW, no checkpointing. Memory: the peak of the steps;",
        "'own' is less what the process held before the model; the × after it: how many times ours the line's contender takes",
    ]
    widths = (20, 11, 22, *[9] * len(qlora.OURS), 10, 10, *[9] * len(qlora.OURS))
    times = [f"×{name}" for name in qlora.OURS]
    for row in found["rows"]:
        title = f"{row['num_sequences']} × {row['length']} tokens"
        lines += ["", _line(widths, title, "tokens/s", "(quartiles)", *times, "peak MB", "own MB", *times)]
        for name, case in row["contenders"].items():
            cells = [name, f"{case['tokens_per_s']:,.1f}", _quartiles(case["q1"], case["q3"], ",.1f")]
            cells += [_ratio(row["ratios"].get(f"{name} / {our}")) for our in qlora.OURS]
            cells += [_megabytes(case.get("peak_bytes")), _megabytes(case.get("above_imports_bytes"))]
            cells += [_ratio(row["memory_ratios"].get(f"{name} / {our}")) for our in qlora.OURS]
            lines.append(_line(widths, *cells))
    return lines


def _line(widths: Sequence[int], first: str, *cells: str) -> str:
    """The first cell to the left, the others to the right of their columns."""
    return f"  {first:<{widths[0]}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))


def _quartiles(first: float, third: float, form: str) -> str:
    return f"({first:{form}}–{third:{form}})"


def _megabytes(size_bytes: float | None) -> str:
    return "–" if size_bytes is None else f"{size_bytes / 1e6:,.0f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
