"""Cheap scores of models against what they stand for: a panel a score, a dot a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...measure import Measure
from .. import style
from ..arrays import to_limits, to_names
from .axis import set_value_ticks, value_limits

ACROSS = 3  # panels in a line
PANEL_HEIGHT = 2.7  # inches
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@style.styled
def scores_against(
    scores: Mapping[str, Sequence[float | None]],
    yardstick: Sequence[float],
    measure: Measure,
    groups: Sequence[str],
    notes: Mapping[str, str] | None = None,
    label: str = "",
) -> Figure:
    """Each score (to the right) over the yardstick (upwards), for M models.

    scores: by what readers call them, [M] each; None or NaN: a model that has no such score.
    yardstick: [M], of the measure. groups: [M], what a model's colour and marker say, such as its
    architecture; at most 8 different ones. notes: of scores, a text in their panel. label: of the
    yardstick; by default the measure's.
    """
    if not scores:
        raise ValueError("scores is empty; give at least one")
    values = np.asarray(to_limits("yardstick", list(yardstick), measure), np.float64)
    names = to_names("groups", groups, len(values), "models in yardstick")
    kinds = list(dict.fromkeys(names))
    if len(kinds) > len(MARKERS):
        raise ValueError(f"groups: expected at most {len(MARKERS)} different ones, got {kinds}")
    across = min(ACROSS, len(scores))
    down = math.ceil(len(scores) / across)
    figure = style.new_figure(style.WIDTH, PANEL_HEIGHT * down + 0.4)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    panels = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes in panels.flat[len(scores) :]:
        axes.set_axis_off()
    for i, (axes, (title, found)) in enumerate(zip(panels.flat, scores.items(), strict=False)):
        known = np.array([math.nan if score is None else float(score) for score in found])
        if known.shape != values.shape:
            raise ValueError(f"scores[{title!r}] has {len(known)} models, expected {len(values)}")
        for number, kind in enumerate(kinds):
            members = np.array([name == kind for name in names]) & np.isfinite(known)
            axes.plot(known[members], values[members], **_look(number))
        axes.set(xlabel=title)
        axes.grid()
        axes.set_axisbelow(True)
        axes.set_ylim(*value_limits(values.min(), values.max(), measure))
        set_value_ticks(axes.yaxis, measure)
        if i % across == 0:
            axes.set_ylabel(label or measure.label)
        if notes and title in notes:
            place = {"xy": (0.97, 0.05), "xycoords": "axes fraction", "ha": "right"}
            axes.annotate(notes[title], color=style.FAINT, size=style.SMALL, **place)
    handles = [Line2D([], [], label=kind, **_look(i)) for i, kind in enumerate(kinds)]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def _look(number: int) -> dict[str, object]:
    look = {"linestyle": "", "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.4}
    return look | {"marker": MARKERS[number], "color": style.look(number).color}
