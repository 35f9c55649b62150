"""Learning curves of several methods over seeds, a panel for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .. import style
from ..arrays import to_matrix
from ..tables import Table, short_count

COLUMNS = 4  # panels in a row
FAR = 1.5  # a reference further up than that many times the largest value is written, not drawn


class LearningCurve(NamedTuple):
    """Of one method. steps: [T]. seeds: [S, T], a line each. mean, low, high: [T], the line and its
    band; low and high are NaN where there is none. look: its number among those of ``style.look``.
    """

    steps: Any
    seeds: Any
    mean: Any
    low: Any
    high: Any
    look: int = 0


@style.styled
def learning_curves(
    curves: Mapping[str, LearningCurve],
    label: str,
    references: Mapping[str, float] | None = None,
    beside: str | None = None,
) -> Figure:
    """Panels with common axes: a method's mean with its band, and its seeds as thin lines.

    curves: by the method's title. label: of the axis of values. references: values that are drawn
    as grey lines in every panel, or written where they are far above all curves. beside: the title
    of the method whose mean is dotted in all other panels.
    """
    if not curves:
        raise ValueError("curves is empty; give at least one method")
    checked = {title: _checked(title, curve) for title, curve in curves.items()}
    references = dict(references or {})
    columns = min(COLUMNS, len(checked))
    rows = -(-len(checked) // columns)
    figure = style.new_figure(style.WIDTH, 2.1 * rows + 0.55)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    near, far = _split(references, list(checked.values()))
    for i, (axes, (name, curve)) in enumerate(zip(grid.flat, checked.items(), strict=False)):
        for j, value in enumerate(near.values()):
            axes.axhline(value, color=style.PLAIN, linewidth=1.1, linestyle=("--", "-.")[j % 2])
        if beside in checked and name != beside:
            other = checked[beside]
            axes.plot(other.steps, other.mean, color=style.INK, linewidth=1.0, linestyle=":")
        _draw(axes, curve)
        axes.set_title(
            style.fit(name, style.WIDTH / columns - 0.3, weight="bold"), size=style.SMALL
        )
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True, steps=[1, 2, 4, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        if i + columns >= len(checked):
            axes.set_xlabel("step")
            axes.tick_params(axis="x", labelbottom=True)
    for axes in list(grid.flat)[len(checked) :]:
        axes.set_axis_off()
    for line in grid:
        line[0].set_ylabel(label)
    _legend(figure, near, far, beside if beside in checked and len(checked) > 1 else None)
    return figure


def learning_table(
    curves: Mapping[str, LearningCurve], seeds: Mapping[str, Any], head: str
) -> Table:
    """All numbers, a line for each method and step. seeds: names of each method's lines; what a
    method has no line of is empty. head: heads the methods."""
    names = list(dict.fromkeys(name for own in seeds.values() for name in own))
    rows = []
    for title, curve in curves.items():
        own = list(seeds[title])
        for t, step in enumerate(curve.steps):
            values = {name: float(curve.seeds[own.index(name)][t]) for name in own}
            middle = (float(curve.mean[t]), float(curve.low[t]), float(curve.high[t]))
            rows.append([title, step, *middle, *(values.get(name) for name in names)])
    return Table([head, "step", "mean", "low", "high", *(f"seed {n}" for n in names)], rows)


def _checked(title: str, curve: LearningCurve) -> LearningCurve:
    seeds = to_matrix(f"curves[{title!r}].seeds", curve.seeds)
    steps, mean, low, high = (
        np.asarray(part, float) for part in (curve.steps, curve.mean, curve.low, curve.high)
    )
    shapes = {part.shape for part in (steps, mean, low, high)}
    if shapes != {seeds.shape[1:]}:
        raise ValueError(
            f"curves[{title!r}] has seeds of shape {list(seeds.shape)} and others of "
            f"{sorted(map(list, shapes))}; give [S, T] and [T]"
        )
    return LearningCurve(steps, seeds, mean, low, high, curve.look)


def _split(
    references: Mapping[str, float], curves: list[LearningCurve]
) -> tuple[dict[str, float], dict[str, float]]:
    """The references that can be drawn, and those too far up."""
    top = max(float(np.nanmax(curve.seeds)) for curve in curves)
    largest = FAR * max(top, min(references.values(), default=top))
    near = {name: value for name, value in references.items() if value <= largest}
    return near, {name: value for name, value in references.items() if value > largest}


def _draw(axes: Axes, curve: LearningCurve) -> None:
    color = style.look(curve.look).color
    marker = "o" if len(curve.steps) < 30 else ""
    if np.isfinite(curve.low).any():
        axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.22, linewidth=0)
    for line in curve.seeds:
        axes.plot(curve.steps, line, color=color, linewidth=0.7, alpha=0.6)
    axes.plot(curve.steps, curve.mean, color=color, linewidth=2.0, marker=marker, markersize=3.5)


def _legend(
    figure: Figure, near: Mapping[str, float], far: Mapping[str, float], beside: str | None
) -> None:
    handles = []
    if beside is not None:
        text = f"{beside}, mean"
        handles.append(Line2D([], [], color=style.INK, linewidth=1.0, linestyle=":", label=text))
    for j, (name, value) in enumerate(near.items()):
        dash = ("--", "-.")[j % 2]
        text = f"{name} ({value:,.10g})"
        handles.append(Line2D([], [], color=style.PLAIN, linewidth=1.1, linestyle=dash, label=text))
    for name, value in far.items():
        text = f"{name} ({value:,.10g}, far above)"
        look = {"color": style.PLAIN, "linestyle": "", "marker": "^", "markersize": 5}
        handles.append(Line2D([], [], **look, label=text))
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
