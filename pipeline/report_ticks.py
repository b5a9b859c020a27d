"""Round positions for the axes of the report's charts."""

from __future__ import annotations

import math


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round tick positions (1, 2 or 5 times a power of ten apart) that enclose low and high."""
    if high <= low:
        high = low + 1.0
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(start, stop + 1)]
