"""Methods by what they reach, and what each costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from ...measure import Measure
from .. import style
from ..rows import best_rows, checked_rows, text_of
from .axis import bar_limits, value_formatter
from .bars import Bar, draw_bars


@style.styled
def measure_bars(rows: Sequence[Mapping[str, Any]], measure: Measure) -> Figure:
    """Methods, one a line as given, the value printed and the best marked with a star.

    rows: see ``rows.Row``; bounds are hollow and never the best. The axis begins at 0, and rows are
    bars; where all values are close together, it is cut and rows are dots.
    """
    items = checked_rows(rows, measure)
    if not items:
        raise ValueError("rows is empty; give at least one method")
    best = best_rows(items, measure)
    known = [r for r in items if r.value is not None]
    lows = [r.value - (r.spread or 0) for r in known] or [0.0]
    highs = [r.value + (r.spread or 0) for r in known] or [1.0]
    limits = bar_limits(min(lows), max(highs), measure)
    columns = {measure.label: [text_of(row, measure) for row in items]}
    if any(r.forwards is not None for r in items):
        forwards = ["" if r.forwards is None else f"{r.forwards:g}" for r in items]
        columns["forwards\nper sample"] = forwards
    bars = [
        Bar(r.value, style.GOOD if b else style.PLAIN, "", r.spread, r.bound)
        for r, b in zip(items, best, strict=True)
    ]
    return draw_bars(
        [f"★ {r.name}" if b else r.name for r, b in zip(items, best, strict=True)],
        {"": bars}, columns, measure.label, limits, value_formatter(measure), best,
        [r.note if r.value is None else "" for r in items],
    )  # fmt: skip
