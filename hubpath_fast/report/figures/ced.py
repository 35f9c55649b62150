"""Cumulative errors: which share of the samples has at most a given error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ...measure import Measure
from .. import style
from ..arrays import to_array
from ..tables import Table
from .axis import value_formatter
from .pictures import place

STEPS = 500  # errors at which the share is worked out, whatever the number of samples
LIMITS = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)  # of the axis, as multiples of the threshold
REACHED = 0.8  # share of the samples that the best curve is to reach within the axis
# Inches. In the legend: where names begin, their width, a line, the heads of the columns.
NAME, NAME_WIDTH, LINE, HEADS = 0.4, 2.1, 0.205, 0.44
LEFT, TOP = 0.65, 0.12  # of the curves


def shares_within(errors: Any, limits: Any) -> np.ndarray:
    """[n]: the share of all errors [T] that are at most each limit [n]; NaN counts as beyond."""
    ordered = np.sort(to_array("errors", errors).astype(np.float64))
    return np.searchsorted(ordered, np.asarray(limits), side="right") / len(ordered)


def axis_limit(errors: Mapping[str, Any], threshold: float, bold: Sequence[str] = ()) -> float:
    """The threshold, or the least of a few multiples within which the best of the bold curves (of
    all, if none is) reaches 80 %."""
    watched = [errors[name] for name in bold if name in errors] or errors.values()
    for factor in LIMITS:
        limit = factor * threshold
        if max(shares_within(e, limit) for e in watched) >= REACHED:
            return limit
    return limit


def cumulative_table(
    errors: Mapping[str, Any], threshold: float, label: str, bold: Sequence[str] = ()
) -> Table:
    """The curves: errors from 0 to the axis' end and, for each name, the share within them."""
    at = np.linspace(0.0, axis_limit(errors, threshold, bold), STEPS + 1)
    curves = [shares_within(e, at).tolist() for e in errors.values()]
    return Table([label, *errors], [list(row) for row in zip(at.tolist(), *curves, strict=True)])


@style.styled
def cumulative_errors(
    errors: Mapping[str, Any],
    measure: Measure,
    threshold: float,
    label: str,
    columns: Mapping[str, Sequence[str]],
    bold: Sequence[str] = (),
    bounds: Sequence[str] = (),
    colors: Sequence[str] = (),
) -> Figure:
    """The share of samples over the error, a curve for each name.

    errors: float [T] by name, in the order of the legend. threshold: an error beyond which a sample
    counts as failed; the axis ends there, or further where the best of the bold curves (of all, if
    none is) has not reached 80 % by then, and the threshold is marked. label: of the axis. columns:
    texts by their head, one for each name, that stand in the legend. bold: names whose curves stand
    out. bounds: names of what is no method, drawn thin and dotted. colors: the other names, by the
    number of their look (see ``style.look``), such that an expert looks as elsewhere; by default in
    their order.
    """
    if not errors or any(len(texts) != len(errors) for texts in columns.values()):
        raise ValueError(
            f"errors has {len(errors)} entries and columns "
            f"{[len(texts) for texts in columns.values()]}; give at least one, and one text each"
        )
    limit = axis_limit(errors, threshold, bold)
    at = np.linspace(0.0, limit, STEPS + 1)
    ends = _column_ends(columns)
    room = max(3.6, LINE * len(errors) + HEADS)
    figure = style.new_figure(style.WIDTH, TOP + room + 0.6)
    figure.set_layout_engine("none")  # the legend is laid out in inches
    width = style.WIDTH - LEFT - 0.3 - ends[-1] - 0.05
    axes = place(figure, (LEFT, TOP), (0, 0, width, min(room, 6.0)))
    handles, plain = [], [name for name in colors or errors if name not in {*bold, *bounds}]
    for name, values in errors.items():
        look = _line(name, plain, bold, bounds)
        axes.plot(at, shares_within(values, at), **look)
        handles.append(Line2D([], [], **look))
    if limit > threshold:
        axes.axvline(threshold, color=style.FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.set(xlim=(0, limit), ylim=(0, 1.005), xlabel=label, ylabel="share of samples, %")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(value_formatter(measure))
    axes.set_yticks(np.linspace(0, 1, 6), [f"{share}" for share in range(0, 101, 20)])
    axes.grid()
    axes.set_axisbelow(True)
    legend = place(figure, (style.WIDTH - ends[-1] - 0.05, TOP), (0, 0, ends[-1], room))
    _write_legend(legend, list(errors), handles, columns, ends, bold)
    return figure


def _line(
    name: str, plain: Sequence[str], bold: Sequence[str], bounds: Sequence[str]
) -> dict[str, Any]:
    if name in bold:
        return {"color": style.INK, "linewidth": 2.6, "zorder": 4, "gid": name}
    if name in bounds:
        return {"color": style.FAINT, "linewidth": 1.2, "linestyle": ":", "zorder": 2, "gid": name}
    look = style.look(plain.index(name))
    return {
        "color": look.color, "linestyle": look.dash, "linewidth": 1.5, "zorder": 3, "gid": name,
    }  # fmt: skip


def _column_ends(columns: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Where names and columns of the legend end, in inches."""
    widths = [
        max(style.text_width(text, style.SMALL, "bold") for text in (*head.split("\n"), *texts))
        for head, texts in columns.items()
    ]
    return np.cumsum([NAME + NAME_WIDTH, *(width + 0.14 for width in widths)])


def _write_legend(
    axes: Axes,
    names: Sequence[str],
    handles: Sequence[Line2D],
    columns: Mapping[str, Sequence[str]],
    ends: np.ndarray,
    bold: Sequence[str],
) -> None:
    """Lines, names and columns, a line each."""
    width, height = ends[-1], HEADS + LINE * len(names)
    axes.set_axis_off()
    room = axes.get_position().height * axes.figure.get_figheight()
    axes.set(xlim=(0, width), ylim=(room, 0))
    look = {"size": style.SMALL, "va": "center_baseline"}
    for head, end in zip(columns, ends[1:], strict=True):
        font = {"size": style.SMALL, "color": style.FAINT}
        axes.text(end, HEADS - 0.12, head, ha="right", va="bottom", **font)
    rows = np.linspace(HEADS + LINE / 2, height - LINE / 2, len(names))
    short = style.fit_all(names, NAME_WIDTH)
    for i, (name, handle, y) in enumerate(zip(names, handles, rows, strict=True)):
        weight = "bold" if name in bold else "normal"
        handle.set_data([0.02, NAME - 0.1], [y, y])
        axes.add_line(handle)
        shown = style.fit(short[i], NAME_WIDTH, weight=weight)
        axes.text(NAME, y, shown, weight=weight, **look)
        for texts, end in zip(columns.values(), ends[1:], strict=True):
            axes.text(end, y, texts[i], ha="right", weight=weight, **look)
