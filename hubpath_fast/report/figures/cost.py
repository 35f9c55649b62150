"""The measure against cost: every method a point, those on the Pareto front numbered and named."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ...measure import Measure
from .. import style
from ..rows import Row, best_rows, checked_rows
from ..tables import Table, short_count
from .axis import set_value_ticks, value_limits

COSTS = {
    "forwards": "expert forwards per {} at inference",
    "gflops": "GFLOPs per {} at inference",
}
MIN_RATIO_FOR_LOG = 20  # of the costs
TWO_DIGITS = 7  # points, which a marker has room for
MARKER_SHARE = 0.04  # of the axis' height that a numbered marker covers


def pareto_front(costs: Any, values: Any, measure: Measure, competes: Any = None) -> np.ndarray:
    """bool [n]: no other is at most as costly and at least as good, and better in one of both.

    Equal ones are on the front together. competes: bool [n], those that take part (default: all);
    the others are never on the front.
    """
    cost, value = np.asarray(costs, np.float64), np.asarray(values, np.float64)
    takes_part = np.ones(len(cost), bool) if competes is None else np.asarray(competes, bool)
    if cost.ndim != 1 or not cost.shape == value.shape == takes_part.shape:
        raise ValueError(
            f"costs has shape {list(cost.shape)}, values {list(value.shape)} and competes "
            f"{list(takes_part.shape)}; give one number for each method in all"
        )
    merit = measure.sign * value
    no_worse = (cost[:, None] <= cost) & (merit[:, None] >= merit)
    better = (cost[:, None] < cost) | (merit[:, None] > merit)
    beaten = (no_worse & better & takes_part[:, None]).any(axis=0)
    return takes_part & ~beaten


class Ranked(NamedTuple):
    """Methods that have a value, best first (then cheaper). cost: a key of COSTS."""

    rows: list[Row]
    cost: str
    costs: np.ndarray
    front: np.ndarray  # bool


def ranked(rows: Sequence[Mapping[str, Any]], measure: Measure) -> Ranked:
    """Cost is GFLOPs where all methods with a value have them, expert forwards otherwise."""
    known = [row for row in checked_rows(rows, measure) if row.value is not None]
    if not known:
        raise ValueError(f"rows has no method with a value of {measure.name}; give at least one")
    key = "gflops" if all(row.gflops is not None for row in known) else "forwards"
    for row in known:
        if getattr(row, key) is None:
            raise ValueError(f"{row.name} has a value but no forwards; give its expert forwards")
    known.sort(key=lambda row: getattr(row, key))
    known = [known[i] for i in measure.ranked([row.value for row in known])]
    costs = np.array([getattr(row, key) for row in known])
    competes = [not row.bound for row in known]
    front = pareto_front(costs, [row.value for row in known], measure, competes)
    return Ranked(known, key, costs, front)


def cost_table(rows: Sequence[Mapping[str, Any]], measure: Measure) -> Table:
    """The methods of ``measure_against_cost``, best first, with all costs that any of them has;
    the best value (bounds aside) is bold."""
    methods, _, _, front = ranked(rows, measure)
    columns = {
        "method": [row.name for row in methods],
        measure.label: [row.value for row in methods],
        "spread (std)": [row.spread for row in methods],
        "expert forwards per sample": [row.forwards for row in methods],
        "GFLOPs per sample": [row.gflops for row in methods],
        "ms per sample": [row.milliseconds for row in methods],
        "router / active experts": [row.router_share for row in methods],
        "updates in training": [row.updates for row in methods],
        "expert forwards in training": [row.train_forwards for row in methods],
        "on the Pareto front": [
            "bound" if row.bound else "yes" if on else "no"
            for row, on in zip(methods, front, strict=True)
        ],
    }
    columns = {head: cells for head, cells in columns.items() if set(cells) != {None}}

    forms = {
        measure.label: measure.number,
        "spread (std)": measure.number,
        "expert forwards per sample": "g",
        "GFLOPs per sample": ".3g",
        "ms per sample": ".3g",
        "router / active experts": ".1%",
        "updates in training": ",.0f",
        "expert forwards in training": short_count,
    }
    best = best_rows(methods, measure)
    return Table(
        list(columns),
        list(zip(*columns.values(), strict=True)),
        [(i, j) for i in range(len(best)) if best[i] for j in (0, 1)],
        {head: form for head, form in forms.items() if head in columns},
    )


@style.styled
def measure_against_cost(
    rows: Sequence[Mapping[str, Any]],
    measure: Measure,
    named: Collection[str] = (),
    sample: str = "sample",
) -> Figure:
    """The measure (with its spread as a whisker) over cost, the Pareto front as a staircase.

    rows: see ``rows.Row``; those without a value are left out. Methods on the front are numbered
    and named, the others are plain points (``cost_table`` names them). Bounds are hollow diamonds
    and not on the front. named: of the others, those that are numbered and named, too.
    sample: what readers call one.
    """
    methods, key, costs, front = ranked(rows, measure)
    values = np.array([row.value for row in methods])
    spreads = np.array([row.spread or 0.0 for row in methods])
    figure = style.new_figure(style.WIDTH, 5.4)
    axes = figure.add_subplot()
    for x, y, spread in zip(costs, values, spreads, strict=True):
        if spread:
            axes.errorbar(x, y, spread, color=style.PLAIN, linewidth=0.8, capsize=2.5, zorder=1)
    for x, y, row, on in zip(costs, values, methods, front, strict=True):
        large = on or (row.name in named and not row.bound)
        axes.plot(x, y, zorder=4 if large else 3, **_marker(row.bound, on, large))
    axes.set_ylim(*value_limits((values - spreads).min(), (values + spreads).max(), measure))
    set_value_ticks(axes.yaxis, measure)
    _scale_costs(axes, costs)
    axes.set(xlabel=COSTS[key].format(sample), ylabel=measure.label)
    axes.grid()
    axes.set_axisbelow(True)
    if front.any():
        steps = sorted(zip(costs[front], values[front], strict=True))
        xs, ys = zip(*steps, strict=True)
        axes.step([*xs, costs.max()], [*ys, ys[-1]], where="post", color=style.GOOD, linewidth=1.2)
    _draw_legend(figure, any(row.bound for row in methods))
    numbered = front | np.array([row.name in named and not row.bound for row in methods])
    _number(figure, axes, methods, costs, numbered)
    return figure


def _marker(bound: bool, on_front: bool, large: bool = False) -> dict[str, Any]:
    size = 11 if on_front or large else 7
    look = {"linestyle": "", "marker": "o", "markersize": size, "markeredgecolor": "white"}
    if bound:
        return look | {
            "marker": "D",
            "markerfacecolor": "none",
            "markeredgecolor": style.OKABE_ITO[5],
            "markeredgewidth": 1.6,
        }
    return look | {"markerfacecolor": style.GOOD if on_front else style.PLAIN}


def _scale_costs(axes: Axes, costs: np.ndarray) -> None:
    least, most = costs.min(), costs.max()
    if most / least >= MIN_RATIO_FOR_LOG:
        axes.set_xscale("log")
        room = (most / least) ** 0.07
        axes.set_xlim(least / room, most * room)
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        room = 0.1 * (most - least) or 0.5 * most
        axes.set_xlim(least - room, most + room)
        whole = bool((costs == np.round(costs)).all())
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10], integer=whole))


def _draw_legend(figure: Figure, bounds: bool) -> None:
    line = {"color": style.GOOD, "linestyle": "-", "linewidth": 1.2}
    handles = [
        Line2D([], [], label="Pareto front", **_marker(False, True) | line),
        Line2D([], [], label="another method", **_marker(False, False)),
    ]
    if bounds:
        handles.append(Line2D([], [], label="bound, not a method", **_marker(True, False)))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))


def _number(
    figure: Figure, axes: Axes, methods: Sequence[Row], costs: np.ndarray, chosen: np.ndarray
) -> None:
    """Numbers on the chosen points, the cheapest first, and their names below: beside points that
    are close they would cover each other. Points in one place, or of one cost whose markers would
    cover each other, share a number, which stands on the best."""
    low, high = axes.get_ylim()
    places: list[tuple[float, float, list[str]]] = []  # the best first, as the methods are
    for row, cost, on in zip(methods, costs, chosen, strict=True):
        if not on:
            continue
        near = [
            names
            for x, y, names in places
            if x == cost and abs(y - row.value) < MARKER_SHARE * (high - low)
        ]
        if near:
            near[0].append(row.name)
        else:
            places.append((cost, row.value, [row.name]))
    handles = []
    for number, (cost, value, names) in enumerate(sorted(places), start=1):
        axes.annotate(
            str(number), (cost, value), ha="center", va="center_baseline", color="white",
            size=style.SMALL if number < 10 else TWO_DIGITS, weight="bold", zorder=5,
        )  # fmt: skip
        label = f"{number}  {style.fit(', '.join(names), 3.9, weight='bold')}"
        handles.append(Line2D([], [], linestyle="", label=label))
    if handles:
        look = {"ncols": 2, "handlelength": 0, "handletextpad": 0, "prop": {"weight": "bold"}}
        figure.legend(handles=handles, loc="outside lower left", **look)
