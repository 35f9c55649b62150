"""Axes of a measure: where they begin and end, and how their ticks read."""

from __future__ import annotations

from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ...measure import Measure


def value_limits(lowest: float, highest: float, measure: Measure) -> tuple[float, float]:
    """Some room on both sides of the values, so much that equal ones do not look different (two
    hundredths of a bounded measure's range), and not far beyond what the measure can be."""
    low, high = measure.limits
    bounded = low is not None and high is not None
    least = 0.01 * (high - low) if bounded else 0.01 * max(abs(lowest), abs(highest)) or 0.01
    room = max(0.08 * (highest - lowest), least)
    return lowest - room, highest + room


def bar_limits(lowest: float, highest: float, measure: Measure) -> tuple[float, float]:
    """From 0 to what the measure can be; where all values are close together, around them."""
    limits = value_limits(lowest, highest, measure)
    if lowest > highest / 2:
        return limits
    top = measure.limits[1]
    low = min(limits[0], 0.0) if lowest < 0 else 0.0
    return low, limits[1] if top is None else top


def value_formatter(measure: Measure) -> FuncFormatter:
    """Ticks in the measure's unit; without a text where the measure cannot be."""
    low, high = measure.limits

    def text(value: float, _: int) -> str:
        if (low is not None and value < low) or (high is not None and value > high):
            return ""
        return f"{round(measure.scale * value, 6):g}"

    return FuncFormatter(text)


def set_value_ticks(axis: Axis, measure: Measure) -> None:
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(value_formatter(measure))
