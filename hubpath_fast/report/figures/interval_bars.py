"""Figures with their intervals, a line for each, and the single values that they are of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .. import style
from .bars import Bar, draw_bars

ROOM = 0.06  # of the axis, beyond the values
WHITE = 0.25  # in the colour of a bar, on which a dark whisker lies


class IntervalBar(NamedTuple):
    """name: of the line. value, low, high: a figure and its interval; value None: there is none,
    and note says why; low and high NaN: it has no interval. points: single values behind it. look:
    its number among the looks of ``style.look``."""

    name: str
    value: float | None
    low: float = math.nan
    high: float = math.nan
    points: Sequence[float] = ()
    look: int = 0
    note: str = ""


@style.styled
def interval_bars(
    rows: Sequence[IntervalBar],
    label: str,
    columns: Mapping[str, Sequence[str]],
    references: Mapping[str, float] | None = None,
    base: float | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Bars from 0 with a whisker for the interval and a circle for each single value.

    rows: the first on top. label: of the axis. columns: texts beside the lines, by their head.
    references: values marked across all lines, by name, unless they lie far beyond all others.
    base: dots in place of bars, with a line from there. limits: of the axis; None: as the values
    need it.
    """
    if not rows:
        raise ValueError("rows is empty; give at least one")
    shown = [row for row in rows if row.value is not None]
    values = [v for r in shown for v in (r.value, r.low, r.high, *r.points) if math.isfinite(v)]
    low, high = limits or _limits([*values, base or 0.0])
    near = {name: v for name, v in (references or {}).items() if low <= v <= high}
    bars = [
        Bar(
            row.value, *_colour(row.look, base is None), points=row.points,
            spread=None if math.isnan(row.low) else (row.value - row.low, row.high - row.value),
        )
        for row in rows
    ]  # fmt: skip
    return draw_bars(
        [row.name for row in rows], {"": bars}, columns, label, (low, high),
        FuncFormatter(lambda value, _: f"{round(value, 6):,.10g}"),
        notes=[row.note if row.value is None else "" for row in rows],
        base=base, references=near,
    )  # fmt: skip


def _colour(number: int, pale: bool) -> tuple[str | tuple[float, ...], str]:
    """Colour and hatch."""
    look = style.look(number)
    if not pale:
        return look.color, look.hatch
    return tuple(WHITE + (1 - WHITE) * part for part in to_rgb(look.color)), look.hatch


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """From the least to the largest, with room where they are not 0, and where all are alike."""
    low, high = min(values), max(values)
    room = ROOM * (high - low) or 1.0
    return low - room if low < 0 else low, high + room if high > 0 or low == high else high
