"""Sample images, each beside the experts that were asked about it and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .. import style
from ..arrays import to_array, to_fractions, to_matrix, to_names, to_points
from .pictures import draw_points, place, show, to_pictures

# Inches. Three cards side by side where all experts' names fit, otherwise two.
CARDS = {3: 0.95, 2: 1.4}  # cards in a line: side of the picture
MARGIN = 0.08  # left of a card's picture and above the first card
GAP = 0.14  # between picture and bars, and right of the bars
HEAD = 0.3  # the line above the picture
LINE = 0.42  # one expert: its name and below it the bar
MARK = 0.2  # the sign before a name
NUMBER = 0.4  # right of a bar
BAR = 0.1
MOST_LINES = 6  # experts of one sample; what remains is summed up in a line


@style.styled
def samples_with_weights(
    images: Any,
    weights: Any,
    expert_names: Sequence[str],
    heads: Sequence[str | Sequence[str]],
    marked: Any = None,
    notes: Sequence[str] | None = None,
    better: Any = None,
    marks: Any = None,
) -> Figure:
    """Sample images with the weights of their active experts as bars, largest first.

    images: uint8 [n, 3 or 1, H, W] of any size. weights: [n, M] in 0..1, 0 where inactive; a bar's
    grey track is 1. heads: [n] what stands above each image; of several parts, the longest are
    shortened first. marked: bool [n], images with a dashed frame. notes: [n] a word beside the
    head, for example its rendering. better: bool [n, M], experts that have a ✓ (the others a ✗) and
    are listed though they were not asked. marks: [n, 2, P, 2], true and predicted points that are
    drawn upon each image, in its pixels.
    """
    pictures = to_pictures(images)
    n = len(pictures)
    values = to_fractions("weights", to_matrix("weights", weights))
    if len(values) != n or np.isnan(values).any():
        raise ValueError(
            f"weights has {len(values)} rows ({int(np.isnan(values).sum())} of its numbers NaN), "
            f"but there are {n} images; give one row of numbers for each image"
        )
    experts = to_names("expert_names", expert_names, values.shape[1], "columns of weights")
    remarks = [""] * n if notes is None else to_names("notes", notes, n, "images")
    framed = np.zeros(n, bool) if marked is None else to_array("marked", marked)
    signs = None if better is None else to_array("better", better)
    if len(heads) != n or framed.shape != (n,):
        raise ValueError(
            f"heads has {len(heads)} entries and marked shape {list(framed.shape)}, but there are "
            f"{n} images; give one for each"
        )
    if signs is not None and (signs.shape != values.shape or signs.dtype != bool):
        raise ValueError(
            f"better is {signs.dtype} {list(signs.shape)}; give bool {list(values.shape)}"
        )

    points = None if marks is None else to_points("marks", marks)
    if points is not None and len(points) != n:
        raise ValueError(f"marks has {len(points)} entries, but there are {n} images")
    known = signs if signs is not None else np.zeros(values.shape, bool)
    listed = [_listed(w, b) for w, b in zip(values, known, strict=True)]
    indent = 0.0 if signs is None else MARK
    widest = max(style.text_width(name, style.SMALL) for name in experts)
    across = 3 if widest + indent <= _bars_width(3) else 2
    side, width, card = CARDS[across], _bars_width(across), style.WIDTH / across
    columns = min(across, n)
    lines = [min(len(o), MOST_LINES) + 0.5 * (len(o) > MOST_LINES) for o in listed]
    depths = [
        max(side, LINE * max(lines[first : first + columns])) for first in range(0, n, columns)
    ]
    tops = np.cumsum([MARGIN, *(HEAD + depth + 0.16 for depth in depths)])
    figure = style.new_figure(card * columns, float(tops[-1]))
    figure.set_layout_engine("none")  # every place is known
    for s, order in enumerate(listed):
        corner, depth = (s % columns * card, tops[s // columns]), depths[s // columns]
        head = place(figure, corner, (MARGIN, 0, card - MARGIN, HEAD))
        parts = [heads[s]] if isinstance(heads[s], str) else list(heads[s])
        _draw_head(head, parts, bool(framed[s]), remarks[s], card - MARGIN - GAP)
        box = place(figure, corner, (MARGIN, HEAD, side, side))
        show(box, pictures[s], bool(framed[s]))
        if points is not None:
            draw_points(box, *points[s], side)
        axes = place(figure, corner, (MARGIN + side + GAP, HEAD, width, depth))
        axes.set_axis_off()
        axes.set(xlim=(0, width), ylim=(depth, 0))  # inches, downwards
        for line, i in enumerate(order[:MOST_LINES]):
            sign = None if signs is None else bool(signs[s, i])
            _draw_expert(axes, line * LINE, width, i, experts[i], values[s, i], sign)
        rest = order[MOST_LINES:]
        if rest:
            sum_up = f"{values[s, rest].sum():.2f}"
            if signs is not None:
                sum_up = f"{int(signs[s, rest].sum())} of them ✓"
            _write(axes, 0, MOST_LINES * LINE + 0.09, f"and {len(rest)} more: {sum_up}")
    return figure


def _bars_width(across: int) -> float:
    return style.WIDTH / across - MARGIN - CARDS[across] - 2 * GAP


def _listed(weights: np.ndarray, better: np.ndarray) -> list[int]:
    """Experts to show: the active ones, largest weight first, then the others that are better."""
    order = np.argsort(-weights, kind="stable")
    return [int(i) for i in order if weights[i] > 0 or better[i]]


def _write(axes: Axes, x: float, y: float, text: str, color: str = style.FAINT, **font) -> None:
    axes.text(x, y, text, color=color, va="center_baseline", size=style.SMALL, **font)


def _draw_head(axes: Axes, parts: Sequence[str], marked: bool, note: str, room: float) -> None:
    """The head, and the note if there is room for it."""
    axes.set_axis_off()
    axes.set(xlim=(0, axes.get_position().width * axes.figure.get_figwidth()), ylim=(0, HEAD))
    text = style.fit_parts(parts, room, weight="bold")
    color = style.OKABE_ITO[5] if marked else style.INK
    _write(axes, 0, HEAD / 2, text, color, weight="bold")
    x = style.text_width(text, style.SMALL, "bold") + 0.12
    if note and room - x > 0.5:
        _write(axes, x, HEAD / 2, style.fit(note, room - x))


def _draw_expert(
    axes: Axes, top: float, width: float, i: int, name: str, weight: float, sign: bool | None
) -> None:
    """Sign and name, and below them the weight as a bar of a grey track."""
    left = 0.0 if sign is None else MARK
    weight_of_text = "bold" if sign else "normal"
    if sign is not None:
        color = style.OKABE_ITO[2] if sign else style.OKABE_ITO[5]
        _write(axes, 0, top + 0.09, "✓" if sign else "✗", color, weight="bold")
    shown = style.fit(name, width - left, weight=weight_of_text)
    _write(axes, left, top + 0.09, shown, style.INK, weight=weight_of_text)
    middle = top + 0.21 + BAR / 2
    if weight == 0:
        _write(axes, left, middle, "not asked")
        return
    track, look = width - NUMBER - left, style.look(i)
    axes.add_patch(Rectangle((left, top + 0.21), track, BAR, color=style.TRACK, linewidth=0))
    bar = Rectangle((left, top + 0.21), track * weight, BAR)
    bar.set(facecolor=look.color, hatch=look.hatch, edgecolor="white", linewidth=0, gid=name)
    axes.add_patch(bar)
    _write(axes, width, middle, f"{weight:.2f}", style.INK, ha="right")
