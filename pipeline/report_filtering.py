"""The part of ``report.html`` that tells how traces were judged: rows of its tables, and the bars of its histograms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stillhouse.pipeline.report import Filtering, Report, VerifierCheck, family_names, percent
from stillhouse.pipeline.report_ticks import nice_ticks
from stillhouse.pipeline.tally import Fate, Histogram

FATES: dict[Fate, tuple[str, str]] = {
    "kept": ("checkpoint", "kept"),
    "not chosen": ("student", "right, not chosen"),
    "not right": ("dropped", "wrong or undecided"),
    "filtered": ("teacher", "dropped by a filter"),
}
"""By fate: the colour's name in the page, and what the legend says."""

_MAX_LABELS = 7
_MAX_SOURCES = 50


def filtering_view(report: Report) -> dict[str, Any] | None:
    """What the template needs, or None for a report from before there was such a part."""
    found = report.results.filtering
    if found is None:
        return None
    return {
        "filters": _filter_rows(found),
        "sources": _source_rows(found),
        "num_more_sources": max(0, len(found.sources) - _MAX_SOURCES),
        "verifiers": _verifier_rows(report.results.verifiers),
        "charts": [
            (
                "Length",
                "tokens of a completion, each bin a constant ratio wider than the last",
                bar_chart(found.num_tokens, _tokens),
            ),
            (
                "Repetition",
                "share of a completion's runs of 8 words that stood in it before",
                bar_chart(found.repetition, _percent),
            ),
        ],
        "legend": list(FATES.values()),
    }


def _filter_rows(found: Filtering) -> list[dict[str, Any]]:
    return [
        {
            "name": rate.name,
            "mode": rate.mode,
            "num_in": rate.num_in,
            "num_against": rate.num_against,
            "keep_rate": percent(1 - rate.num_against / rate.num_in) if rate.num_in else "–",
            "let_through": _share(rate.pass_rate_let_through, rate.num_verified_let_through),
            "against": _share(rate.pass_rate_against, rate.num_verified_against),
        }
        for rate in found.filters
    ]


def _source_rows(found: Filtering) -> list[dict[str, Any]]:
    names = family_names({rate.source: rate for rate in found.sources})
    return [
        {
            "name": names[rate.source],
            "topic": rate.topic.replace("_", " "),
            "num_traces": rate.num_traces,
            "num_filtered": rate.num_filtered,
            "pass_rate": _share(rate.pass_rate, rate.num_verified),
            "bar": 100 * (rate.pass_rate or 0.0),
            "num_kept": rate.num_kept,
        }
        for rate in found.sources[:_MAX_SOURCES]
    ]


def _verifier_rows(checks: dict[str, VerifierCheck]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "golds": f"{check.gold_accepted:,} of {check.num_golds:,}" if check.num_golds else "no golds",
            "mutated": f"{check.mutated_rejected:,} of {check.num_mutated:,}",
            "failures": check.failures,
        }
        for name, check in checks.items()
    ]


def _share(share: float | None, whole: int) -> tuple[str, str]:
    """The share in percent, and the number behind it."""
    return ("–", "") if share is None else (percent(share), f"of {whole:,}")


def bar_chart(histogram: Histogram, edge_text: Callable[[float], str]) -> dict[str, Any] | None:
    """Positions of stacked bars in percent, from the bottom up in the order of ``FATES``; None without a trace."""
    totals = [sum(of_bin) for of_bin in zip(*histogram.counts.values())]
    if not any(totals):
        return None
    ticks = nice_ticks(0, max(totals), 4)
    top, width = ticks[-1], 100 / len(totals)
    bars = []
    edges = [edge_text(edge) for edge in histogram.edges]
    for place, total in enumerate(totals):
        below = 0
        for fate, (colour, label) in FATES.items():
            count = histogram.counts[fate][place]
            if count:
                at = {"x": place * width, "y": 100 * (top - below - count) / top, "height": 100 * count / top}
                what = f"{edges[place]} to {edges[place + 1]}: {count:,} of {total:,} {label}"
                bars.append(at | {"colour": colour, "what": what})
            below += count
    return {
        "bars": bars,
        "width": width,
        "y": [{"at": 100 * (top - tick) / top, "label": f"{tick:,.0f}"} for tick in ticks if tick == int(tick)],
        "x": [{"at": place * width, "label": edges[place]} for place in range(0, len(edges), -(-len(edges) // _MAX_LABELS))],
        "num_traces": sum(totals),
    }


def _tokens(edge: float) -> str:
    return f"{edge:,.0f}"


def _percent(edge: float) -> str:
    return f"{100 * edge:.0f} %"
