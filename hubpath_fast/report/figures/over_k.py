"""The measure over K, the number of experts asked about each sample (the paper's Fig. 3c)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...measure import Measure
from .. import style
from ..arrays import to_limits
from ..tables import Table
from .axis import set_value_ticks, value_limits

MEAN = style.OKABE_ITO[0]
MOST_TICKS = 16  # values of K that each get a tick; beyond, matplotlib chooses some


@style.styled
def measure_over_k(
    values_by_k: Mapping[int, Sequence[float]], measure: Measure, k: int | None = None
) -> Figure:
    """Each seed a hollow dot, their mean a line.

    values_by_k: for each K its values, one a seed; seeds may differ in number. k: the run's own K,
    marked by a dashed line.
    """
    runs = checked_runs(values_by_k, measure)
    if k is not None and k < 1:
        raise ValueError(f"k is {k}; give how many experts the run asks, at least 1, or None")
    figure = style.new_figure(7.0, 3.7)
    axes = figure.add_subplot()
    means = [statistics.fmean(values) for values in runs.values()]
    axes.plot(list(runs), means, color=MEAN, marker="o", markersize=6, label="mean", zorder=3)
    if any(len(values) > 1 for values in runs.values()):
        dots = [(x, value) for x, values in runs.items() for value in values]
        look = {"markerfacecolor": "none", "markeredgecolor": style.FAINT, "markersize": 6}
        axes.plot(*zip(*dots, strict=True), "o", label="one seed", zorder=4, **look)
        axes.legend(loc="best")
    if k is not None:
        axes.axvline(k, color=style.FAINT, linewidth=1.0, linestyle="--", zorder=1)
        axes.annotate(
            f"this run: K = {k}", (k, 1), (0, 4), axes.get_xaxis_transform(), "offset points",
            ha="center", size=style.SMALL,
        )  # fmt: skip
    shown = sorted({*runs, *([] if k is None else [k])})
    axes.set(xlabel="K: experts asked about each sample", ylabel=measure.label)
    axes.set_xlim(shown[0] - 0.5, shown[-1] + 0.5)
    if len(shown) <= MOST_TICKS:
        axes.set_xticks(shown)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(MOST_TICKS, integer=True, steps=[1, 2, 5, 10]))
    every = [value for values in runs.values() for value in values]
    axes.set_ylim(*value_limits(min(every), max(every), measure))
    set_value_ticks(axes.yaxis, measure)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    return figure


def k_table(values_by_k: Mapping[int, Sequence[float]], measure: Measure) -> Table:
    """The numbers of ``measure_over_k``: a line for each K with mean, sample standard deviation
    (None for one seed) and every seed's value."""
    runs = checked_runs(values_by_k, measure)
    most = max(map(len, runs.values()))
    rows = []
    for k, values in runs.items():
        std = statistics.stdev(values) if len(values) > 1 else None
        rows.append([k, statistics.fmean(values), std, *values, *[None] * (most - len(values))])
    return Table(["K", "mean", "spread (std)", *(f"run {i + 1}" for i in range(most))], rows)


def checked_runs(
    values_by_k: Mapping[int, Sequence[float]], measure: Measure
) -> dict[int, list[float]]:
    """The same with K ascending, or a ValueError."""
    if not values_by_k:
        raise ValueError("values_by_k is empty; give the values of at least one K")
    runs: dict[int, list[float]] = {}
    for k in sorted(values_by_k):
        values = [float(value) for value in values_by_k[k]]
        if k < 1 or not values:
            raise ValueError(
                f"values_by_k has K = {k} with {len(values)} values; K is at least 1, and each "
                "needs at least one"
            )
        runs[int(k)] = to_limits(f"values_by_k[{k}]", values, measure)
    return runs
