"""How a plan writes numbers: few figures, a unit that fits, "-" for nothing."""

from __future__ import annotations

from collections.abc import Iterable


def plural(count: float, noun: str) -> str:
    """``1 GPU``, ``2 GPUs``."""
    number = f"{count:,.0f}" if count == int(count) else f"{count:g}"
    return f"{number} {noun}" if count == 1 else f"{number} {noun}s"


def _scaled(value: float, units: Iterable[tuple[float, str]]) -> str:
    for size, unit in units:
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return "-"


def in_short(value: float) -> str:
    """``1.5 M``."""
    return _scaled(value, ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"), (1, "")))


def in_bytes(value: float) -> str:
    """``3 GB``."""
    return _scaled(value, ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (1, " B")))


def in_hours(value: float) -> str:
    """Hours, in days, hours, minutes or seconds."""
    return "<1 s" if 0 < value < 1 / 3600 else _scaled(value, ((24, " d"), (1, " h"), (1 / 60, " min"), (1 / 3600, " s")))


def in_number(value: float) -> str:
    """Three figures, and no power of ten."""
    return "<0.01" if 0 < value < 0.01 else f"{value:,.3g}" if 0 < value < 1000 else f"{value:,.0f}" if value else "-"


def in_dollars(value: float) -> str:
    """``$12``."""
    return f"${value:,.0f}" if value >= 1 else "-" if not value else "<$0.01" if value < 0.01 else f"${value:.2f}"
