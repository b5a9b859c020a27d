"""The roofline plot of a measurement, as SVG written by hand.

Both axes are logarithmic: operations per byte of packed weight, and GOP/s. The slope is the read bandwidth, the flat lines are
the bf16 and int8 peaks, all measured in the same run. Each contender has a point for each number of rows. The panel brings
its own light background, so that it reads the same on a dark page.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from stillhouse.kernels.bench import peers

WIDTH, HEIGHT = 980, 620
LEFT, RIGHT, TOP, BOTTOM = 72, 250, 72, 126
INK, MUTED, GRID, PAPER = "#1d2430", "#5b6472", "#dfe3e8", "#fbfbfa"
STYLES = {
    peers.INT4: ("#0b62c4", "circle"),
    peers.INT4_INT8: ("#d3450b", "diamond"),
    peers.NF4: ("#0a7d4f", "square"),
    peers.DENSE: ("#6b7280", "circle"),
    peers.DECODE_INT4: ("#8aa9d6", "diamond"),
    peers.DECODE_NF4: ("#86b99f", "square"),
    peers.BITSANDBYTES: ("#a21caf", "square"),
    peers.BITSANDBYTES_EVAL: ("#c98bd6", "square"),
    peers.ATEN: ("#92650a", "triangle"),
    peers.TORCHAO: ("#c9a24a", "triangle"),
}
"""Colour and marker of each contender; ours are filled, peers hollow."""


class _Scale:
    """A logarithmic axis: data from ``low`` to ``high`` onto pixels from ``start`` to ``end``."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
        return [10.0**power for power in powers]


def roofline(facts: Mapping[str, Any]) -> str:
    """Draw what ``bench kernels`` measured.

    Args:
        facts: the benchmark's JSON, with the sections ``decode`` or ``prefill`` (either, or both).

    Returns:
        an SVG document; every point is a ``<g class="point">`` with ``data-contender`` and ``data-batch``.

    Raises:
        ValueError: no layer was measured.
    """
    rows = [*facts.get("decode", ()), *facts.get("prefill", ())]
    if not rows:
        raise ValueError(
            "a roofline plot needs the section decode or prefill; run with --only decode,prefill (or without --only)"
        )
    known = [name for name in ("read", "bf16", "int8") if name in rows[0]["roofs"]]
    roofs = {name: statistics.median(row["roofs"][name] for row in rows) for name in known}
    points = [
        (name, row["batch"], found["op_per_byte"], found["gop_s"]) for row in rows for name, found in row["contenders"].items()
    ]
    xs, ys = [point[2] for point in points], [point[3] for point in points]
    x = _Scale(min(xs) / 2.2, max(xs) * 1.5, LEFT, WIDTH - RIGHT)
    y = _Scale(
        min(ys) / 1.8, max([*ys, *(roofs[kind] for kind in ("bf16", "int8") if kind in roofs)]) * 1.8, HEIGHT - BOTTOM, TOP
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>{escape(_headline(facts))}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{PAPER}"/>',
        _text(LEFT, 28, _headline(facts), size=16, weight="600"),
        *_axes(x, y),
        *_rows_axis(points, x, y),
    ]
    roof_lines, roof_labels = _roofs(x, y, roofs)
    lines += roof_lines
    names = [name for name in STYLES if any(point[0] == name for point in points)]
    for name in sorted(names, key=lambda name: name in peers.OURS):  # ours on top
        lines += _series(name, sorted((p for p in points if p[0] == name), key=lambda p: p[1]), x, y)
    lines += roof_labels + _legend(names)
    lines += [_text(LEFT, HEIGHT - 52 + 16 * index, line, fill=MUTED, size=11) for index, line in enumerate(_caption(facts))]
    return "\n".join([*lines, "</svg>", ""])


def _headline(facts: Mapping[str, Any]) -> str:
    (num_rows, num_columns), threads = facts["shape"], facts["threads"]
    return f"One {num_rows} × {num_columns} linear layer on the CPU, {threads} thread{'s' if threads > 1 else ''}"


def _caption(facts: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    rounds = f"medians of {facts['rounds']} interleaved rounds, {facts['min_bytes'] >> 20} MiB of weights in rotation"
    return [f"{facts['machine']}; {facts['path']}; {facts['date']}", f"bfloat16 activations; {rounds}", versions]


def _text(x: float, y: float, text: str, *, fill: str = INK, size: int = 12, weight: str = "400", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" font-size="{size}" font-weight="{weight}"{extra}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"{dashes}/>'


def _axes(x: _Scale, y: _Scale) -> list[str]:
    lines = []
    for tick in x.ticks():
        lines.append(_line(x(tick), y.start, x(tick), y.end, GRID))
        lines.append(_text(x(tick), y.start + 18, f"{tick:,g}", fill=MUTED, extra=' text-anchor="middle"'))
    for tick in y.ticks():
        lines.append(_line(x.start, y(tick), x.end, y(tick), GRID))
        lines.append(_text(x.start - 8, y(tick) + 4, f"{tick:,g}", fill=MUTED, extra=' text-anchor="end"'))
    middle = (x.start + x.end) / 2
    lines.append(_text(middle, y.start + 38, "operations per byte of packed weight", extra=' text-anchor="middle"'))
    turned = f' text-anchor="middle" transform="rotate(-90 22 {(y.start + y.end) / 2:.1f})"'
    return [*lines, _text(22, (y.start + y.end) / 2, "GOP/s", extra=turned)]


def _roofs(x: _Scale, y: _Scale, roofs: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """The lines of the roofs, and their labels, which are drawn last."""
    lines, labels = [], []
    halo = f' paint-order="stroke" stroke="{PAPER}" stroke-width="4" stroke-linejoin="round"'
    highest = max([roofs[kind] for kind in ("bf16", "int8") if kind in roofs], default=y.high)
    low, high = max(x.low, y.low / roofs["read"]), min(x.high, highest / roofs["read"])
    lines.append(_line(x(low), y(low * roofs["read"]), x(high), y(high * roofs["read"]), INK, 1.6))
    angle = math.degrees(math.atan2(y(high * roofs["read"]) - y(low * roofs["read"]), x(high) - x(low)))
    at = low ** (2 / 3) * high ** (1 / 3)
    place = (x(at) - 6, y(at * roofs["read"]) - 8)
    turned = f' text-anchor="middle" transform="rotate({angle:.1f} {place[0]:.1f} {place[1]:.1f})"'
    labels.append(_text(*place, f"read {roofs['read']:.0f} GB/s", extra=halo + turned))
    for kind in ("bf16", "int8"):
        if kind in roofs:
            # The label stands left of where the roofs meet: nothing can be measured there.
            start = max(x.low, roofs[kind] / roofs["read"])
            lines.append(_line(x(start), y(roofs[kind]), x.end, y(roofs[kind]), INK, 1.6, dash="7 4"))
            label = f"{kind} peak {roofs[kind]:,.0f} GOP/s"
            labels.append(_text(x(start) - 8, y(roofs[kind]) + 4, label, extra=halo + ' text-anchor="end"'))
    return lines, labels


def _rows_axis(points: Sequence[tuple[str, int, float, float]], x: _Scale, y: _Scale) -> list[str]:
    """M along the top, where the points of int4 (or of the first contender) stand; another's stand by its bytes a weight."""
    name = peers.INT4 if any(point[0] == peers.INT4 for point in points) else points[0][0]
    lines = [_text(x.start, y.end - 8, f"M for {name}:", fill=MUTED, size=11)]
    for _, batch, op, _ in (point for point in points if point[0] == name):
        lines.append(_line(x(op), y.end, x(op), y.end + 5, MUTED))
        lines.append(_text(x(op), y.end - 8, f"{batch:,}", fill=MUTED, size=11, extra=' text-anchor="middle"'))
    return lines


def _series(name: str, points: Sequence[tuple[str, int, float, float]], x: _Scale, y: _Scale) -> list[str]:
    colour, shape = STYLES[name]
    ours = name in peers.OURS
    path = " ".join(f"{x(op):.1f},{y(rate):.1f}" for _, _, op, rate in points)
    width = 2.2 if ours else 1.2
    lines = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-opacity="0.8"/>']
    for _, batch, op, rate in points:
        label = f"{name}, M = {batch}: {rate:,.1f} GOP/s"
        lines.append(
            f'<g class="point" data-contender={quoteattr(name)} data-batch="{batch}"><title>{escape(label)}</title>'
            f"{_marker(x(op), y(rate), shape, colour, filled=ours)}</g>"
        )
    return lines


def _marker(x: float, y: float, shape: str, colour: str, *, filled: bool) -> str:
    style = f'fill="{colour if filled else PAPER}" stroke="{colour}" stroke-width="1.6"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2" {style}/>'
    corners = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "diamond": ((0, -5.4), (5.4, 0), (0, 5.4), (-5.4, 0)),
        "triangle": ((0, -5), (4.8, 4), (-4.8, 4)),
    }[shape]
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}" {style}/>'


def _legend(names: Sequence[str]) -> list[str]:
    left, top = WIDTH - RIGHT + 28, TOP + 12
    lines = []
    for index, name in enumerate(names):
        colour, shape = STYLES[name]
        y = top + 22 * index
        lines.append(_line(left, y, left + 26, y, colour, 2.2 if name in peers.OURS else 1.2))
        lines.append(_marker(left + 13, y, shape, colour, filled=name in peers.OURS))
        weight = "600" if name in peers.OURS else "400"
        lines.append(_text(left + 36, y + 4, f"{name} (ours)" if name in peers.OURS else name, weight=weight))
    return lines
