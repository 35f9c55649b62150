"""What a hub loses as its experts go one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from .. import style
from ..tables import Table


class Left(NamedTuple):
    """A hub of the elimination. experts: how many are left. lost: in points, with its interval;
    low and high NaN: it has none. dropped: who went last."""

    experts: int
    lost: float
    low: float = math.nan
    high: float = math.nan
    dropped: str = ""


@style.styled
def elimination_curve(
    hubs: Sequence[Left], points: float, chosen: int | None = None, level: float = 0.95
) -> Figure:
    """Points lost over the number of experts left, which falls to the right.

    hubs: in the order in which experts go. points: what may be lost, a dashed line. chosen: number
    of experts of the hub that is proposed, a ring; None: none is. level: of the intervals.
    """
    if not hubs:
        raise ValueError("hubs is empty; give at least one")
    figure = style.new_figure(style.WIDTH, 3.6)
    axes = figure.add_subplot()
    left, lost = [hub.experts for hub in hubs], [hub.lost for hub in hubs]
    axes.fill_between(
        left, [hub.low for hub in hubs], [hub.high for hub in hubs], color=style.TRACK,
        label=f"{100 * level:.0f} % interval",
    )  # fmt: skip
    axes.plot(left, lost, color=style.GOOD, linewidth=1.6, label="lost on validation")
    axes.axhline(
        points, color=style.FAINT, linestyle="--", linewidth=1.0, label=f"{points:g} points"
    )
    if chosen is not None:
        ring = {"markerfacecolor": "none", "markersize": 11, "markeredgewidth": 1.8}
        ring |= {"markeredgecolor": style.OKABE_ITO[5], "label": f"proposed: {chosen} experts"}
        axes.plot(chosen, lost[left.index(chosen)], "o", **ring)
    logarithmic = max(left) > 20 * min(left)
    axes.set_xscale("log" if logarithmic else "linear")
    axes.set_xlim(max(left) * 1.04, min(left) * 0.9)
    ticks = _ticks(left, logarithmic)
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="experts left", ylabel="points lost")
    axes.grid()
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def _ticks(left: Sequence[int], logarithmic: bool) -> list[int]:
    """Both ends, and round numbers between them that are not too near to one."""
    most, least = max(left), min(left)

    def place(number: int) -> float:
        return math.log(number) if logarithmic else number

    room = 0.05 * (place(most) - place(least))
    between = (
        number
        for number in (1, 2, 5, 10, 20, 50, 100, 200, 500)
        if place(least) + room < place(number) < place(most) - room
    )
    return sorted({least, *between, most})


def elimination_table(hubs: Sequence[Left]) -> Table:
    """The numbers of ``elimination_curve``."""
    head = ["dropped", "experts left", "points lost", "from", "to"]
    rows = [[hub.dropped, hub.experts, hub.lost, hub.low, hub.high] for hub in hubs]
    return Table(head, rows)
