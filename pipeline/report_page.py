"""Draws ``report.html``: one self-contained page, no script, no request, charts as inline SVG.

Charts use percent coordinates without a viewBox, so that text keeps its size on a telephone and only the geometry
stretches. This file turns numbers into positions; ``report.html.jinja`` beside it holds all markup.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse.pipeline.report import (
    MODELS,
    LossPoint,
    PassAt1,
    Report,
    agreement_line,
    family_names,
    interval_text,
    measured_text,
    percent,
    served_rows,
    size_line,
)
from stillhouse.pipeline.report_filtering import filtering_view
from stillhouse.pipeline.report_ticks import nice_ticks

_TEMPLATE = "report.html.jinja"
_MAX_POINTS = 600  # more would only make the file larger: a chart is some 800 pixels wide


def render_page(report: Report) -> str:
    """The page as HTML text. Everything that comes from the run is escaped: a trace with markup is shown as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "duration": duration, "measured": measured_text}
    return environment.get_template(_TEMPLATE).render(
        report=report,
        models=MODELS,
        headline=headline(report),
        panels=accuracy_panels(report),
        measured_on=measured_on(report.results.pass_at_1),
        funnel=funnel_bars(report),
        filtering=filtering_view(report),
        loss=line_chart(report.results.loss, "loss"),
        learning_rate=line_chart(report.results.loss, "learning_rate"),
        stages=stage_rows(report),
        size=size_line(report.size_bytes),
        served=served_rows(report.results.served),
        agreement=agreement_line(found) if (found := report.results.served.agreement) else None,
    )


def headline(report: Report) -> list[tuple[str, str, str]]:
    """The figures at the top of the page: what, how much, beside what."""
    results = report.results.pass_at_1
    figures = []
    if results.checkpoint:
        low, high = 100 * results.checkpoint.low, 100 * results.checkpoint.high
        figures.append(
            ("4-bit checkpoint, pass@1", percent(results.checkpoint.value), f"95 % interval {low:.1f} to {high:.1f}")
        )
    if results.checkpoint and results.base:
        gain = 100 * (results.checkpoint.value - results.base.value)
        figures.append(("gain over the base, points", f"{gain:+.1f}", f"base {percent(results.base.value)}"))
    if results.checkpoint and results.student and results.student.value > 0:
        kept = results.checkpoint.value / results.student.value
        figures.append(("kept in 4 bits", f"{100 * kept:.1f} %", f"16-bit student {percent(results.student.value)}"))
    if report.size_bytes.checkpoint:
        ratio = report.size_bytes.float16 / report.size_bytes.checkpoint
        figures.append(
            ("weights on disk", f"{report.size_bytes.checkpoint / 1e6:,.2f} MB", f"{ratio:.2f}× smaller than 16-bit")
        )
    return [tuple(text.replace(" %", "\u00a0%") for text in figure) for figure in figures]


def accuracy_panels(report: Report) -> list[dict[str, Any]]:
    """One panel for all problems and one a family; each row has the positions of dot and whiskers in percent."""
    families = family_names(report.results.pass_at_1_by_family)
    return [_panel("All problems", report.results.pass_at_1)] + [
        _panel(name, report.results.pass_at_1_by_family[family]) for family, name in families.items()
    ]


def measured_on(results: PassAt1) -> str:
    """One sentence: on how many problems each model was measured."""
    counts = {label: interval.n for model, label in MODELS.items() if (interval := getattr(results, model)) is not None}
    if len(set(counts.values())) == 1:
        return f"{next(iter(counts.values())):,} problems for each model."
    return "Problems: " + ", ".join(f"{label} {count:,}" for label, count in counts.items()) + "."


def _panel(name: str, results: PassAt1) -> dict[str, Any]:
    rows = []
    for model, label in MODELS.items():
        interval = getattr(results, model)
        row = {"model": model, "label": label, "text": interval_text(interval), "measured": interval is not None}
        if interval is not None:
            row |= {"at": 100 * interval.value, "low": 100 * interval.low, "high": 100 * interval.high, "n": interval.n}
        rows.append(row)
    return {"name": name, "rows": rows}


def funnel_bars(report: Report) -> list[dict[str, Any]]:
    """One bar a step: kept and dropped as percent of the longest bar of the same unit."""
    steps = report.results.funnel
    longest = {unit: max(step.num_in for step in steps if step.unit == unit) or 1 for unit in {step.unit for step in steps}}
    return [
        {
            "step": step,
            "first_of_unit": i == 0 or steps[i - 1].unit != step.unit,
            "kept": 100 * step.num_kept / longest[step.unit],
            "dropped": 100 * step.num_dropped / longest[step.unit],
            "share": step.num_dropped / step.num_in if step.num_in else 0.0,
        }
        for i, step in enumerate(steps)
    ]


def stage_rows(report: Report) -> list[dict[str, Any]]:
    """Seconds and tokens of every stage that has either, in the order of the run."""
    seconds, tokens = report.results.seconds, report.results.tokens
    longest = max(seconds.values(), default=0.0) or 1.0
    names = [*seconds, *(stage for stage in tokens if stage not in seconds)]
    rows = []
    for name in names:
        spent, count = seconds.get(name), tokens.get(name)
        rate = count / spent if count and spent else None
        rows.append({"name": name, "seconds": spent, "bar": 100 * (spent or 0) / longest, "tokens": count, "rate": rate})
    return rows


def line_chart(points: Sequence[LossPoint], field: str) -> dict[str, Any] | None:
    """Positions of a curve over training steps: polyline pieces in percent, ticks with labels. None without a value.

    Steps without a finite value break the line and are counted in ``num_missing``.
    """
    if len(points) > _MAX_POINTS:
        stride = math.ceil(len(points) / _MAX_POINTS)
        points = [*points[:-1:stride], points[-1]]  # the last step is always shown
    values = [value for point in points if (value := getattr(point, field)) is not None]
    if not values:
        return None
    ticks = nice_ticks(min(0.0, *values), max(values), 5)
    bottom, top = ticks[0], ticks[-1]
    first, last = points[0].step, points[-1].step
    span = (last - first) or 1
    pieces: list[list[str]] = [[]]
    for point in points:
        value = getattr(point, field)
        if value is None:
            pieces.append([])
            continue
        x, y = 100 * (point.step - first) / span, 100 * (top - value) / (top - bottom)
        pieces[-1].append(f"{x:.3f},{y:.3f}")
    x_ticks = [step for step in nice_ticks(first, last, 6) if first <= step <= last]
    return {
        "pieces": [piece * 2 if len(piece) == 1 else piece for piece in pieces if piece],  # one point is drawn as a dot
        "y": [{"at": 100 * (top - tick) / (top - bottom), "label": f"{tick:.6g}"} for tick in ticks],
        "x": [{"at": 100 * (step - first) / span, "label": f"{step:,.0f}"} for step in x_ticks if step == int(step)],
        "first": values[0],
        "last": values[-1],
        "num_missing": len(points) - len(values),
    }


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: ``8.4 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
