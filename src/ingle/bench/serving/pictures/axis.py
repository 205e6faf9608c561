"""Round numbers along an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 of a power of ten, from at most `low` to at least `high`."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / most))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if span / (step * factor) <= most)
    first = math.floor(low / step + 1e-9)
    return [round(step * n, 12) for n in range(first, math.ceil(high / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of powers of ten, or these alone where they are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors: Sequence[int] = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    return [tick for decade in decades for factor in factors if low <= (tick := factor * 10.0**decade) <= high]


def label(number: float) -> str:
    """1,500 and 0.25."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:g}"
