"""Points that a model places in pictures: samples with true and predicted ones, and how far off
each point is as a rule."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .. import style
from ..arrays import to_array, to_fractions, to_matrix, to_names, to_points
from .counts import OFF_DIAGONAL
from .heat import color_scale
from .pictures import (
    draw_points,
    place,
    points_legend,
    predicted_look,
    show,
    to_pictures,
    true_look,
)

ACROSS = 4  # samples in a line
CARD = style.WIDTH / ACROSS  # inches
SIDE = CARD - 0.14
TITLE, HEAD, LINE = 0.32, 0.46, 0.2  # inches: of a line of samples, two texts, one expert
LEGEND = 0.32
MOST_ASKED = 3  # experts named below a sample

FEW = 15  # points that have room for their names
DISC = 0.13  # inches: a point of the mean shape
SHAPE_HEIGHT = {True: 3.0, False: 6.2}  # inches: of few points, of many
SHAPE_WIDTH = 7.2
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))  # of a name
GAPS = (0.01, 0.08)  # inches between a point and its name


@style.styled
def samples_with_points(
    images: Any,
    marks: Any,
    weights: Any,
    expert_names: Sequence[str],
    heads: Sequence[str],
    notes: Sequence[str],
    lines: Mapping[str, int],
) -> Figure:
    """Samples in titled lines, each with its points and below it the experts that were asked.

    images: uint8 [n, 3 or 1, H, W]. marks: [n, 2, P, 2], true and predicted points in pixels of the
    images. weights: [n, M] in 0..1, 0 where inactive. heads, notes: [n], two lines below each
    image. lines: how many of the images, in turn, stand under each title, at most 4.
    """
    pictures, points = to_pictures(images), to_points("marks", marks)
    n, values = len(pictures), to_fractions("weights", to_matrix("weights", weights))
    experts = to_names("expert_names", expert_names, values.shape[1], "columns of weights")
    counts = {"marks": len(points), "weights": len(values), "heads": len(heads)}
    counts |= {"notes": len(notes), "lines": sum(lines.values())}
    wrong = next((name for name, found in counts.items() if found != n), None)
    if wrong:
        raise ValueError(f"{wrong} is of {counts[wrong]} images, but there are {n}; give one each")
    if not all(1 <= count <= ACROSS for count in lines.values()):
        raise ValueError(f"lines: expected 1..{ACROSS} images in each, got {dict(lines)}")

    asked = [[int(i) for i in np.argsort(-w, kind="stable") if w[i] > 0] for w in values]
    starts = np.cumsum([0, *lines.values()])
    below = [
        HEAD + LINE * max(min(len(order), MOST_ASKED + 1) for order in asked[a:b])
        for a, b in itertools.pairwise(starts)
    ]
    tops = np.cumsum([LEGEND, *(TITLE + SIDE + depth + 0.12 for depth in below)])
    figure = style.new_figure(CARD * max(lines.values()), float(tops[-1]))
    figure.set_layout_engine("none")  # every place is known
    for title, first, top, depth in zip(lines, starts, tops, below, strict=False):
        line = place(figure, (0, top), (0.07, 0, figure.get_figwidth() - 0.07, TITLE))
        line.set_axis_off()
        shown = style.fit(title, figure.get_figwidth() - 0.1, style.LARGE, "bold")
        line.text(0, 0.35, shown, size=style.LARGE, weight="bold", va="center_baseline")
        for column in range(lines[title]):
            s, corner = first + column, (column * CARD, top + TITLE)
            axes = place(figure, corner, (0.07, 0, SIDE, SIDE))
            show(axes, pictures[s], False)
            draw_points(axes, *points[s], SIDE)
            text = place(figure, corner, (0.07, SIDE, SIDE, depth))
            _write_below(text, heads[s], notes[s], asked[s], values[s], experts)
    points_legend(figure, true_look(4.5), predicted_look(4.5))
    return figure


def _write_below(
    axes: Axes,
    head: str,
    note: str,
    order: Sequence[int],
    weights: np.ndarray,
    experts: Sequence[str],
) -> None:
    """Head, note and experts below a picture; the axes are in inches, downwards."""
    axes.set_axis_off()
    axes.set(xlim=(0, SIDE), ylim=(axes.get_position().height * axes.figure.get_figheight(), 0))
    look = {"va": "center_baseline", "size": style.SMALL}
    axes.text(0, 0.7 * LINE, style.fit(head, SIDE, weight="bold"), weight="bold", **look)
    if note:
        axes.text(0, 1.7 * LINE, style.fit(note, SIDE), color=style.FAINT, **look)
    for line, i in enumerate(order[:MOST_ASKED]):
        y = HEAD + (line + 0.5) * LINE
        box = Rectangle((0, y - 0.055), 0.11, 0.11, facecolor=style.look(i).color)
        box.set(hatch=style.look(i).hatch, edgecolor="white", linewidth=0)
        axes.add_patch(box)
        axes.text(0.18, y, style.fit(experts[i], SIDE - 0.62), **look)
        axes.text(SIDE, y, f"{weights[i]:.2f}", ha="right", **look)
    rest = order[MOST_ASKED:]
    if rest:
        text = f"and {len(rest)} more: {weights[rest].sum():.2f}"
        axes.text(0.18, HEAD + (MOST_ASKED + 0.5) * LINE, text, color=style.FAINT, **look)


@style.styled
def values_on_shape(
    points: Any, values: Any, names: Sequence[str], label: str, scale: float = 1.0
) -> Figure:
    """The points of a shape, each in the colour of its value, dark where it is large, and named.

    points: [P, 2], x to the right and y down, in any unit. values: [P]. names: [P]; where two would
    cover each other, one is left out. label: of the scale of colours. scale: colours are of scale *
    value.
    """
    shape = to_matrix("points", points)
    numbers = scale * to_array("values", values).astype(np.float64)
    if shape.shape[1] != 2 or numbers.shape != shape.shape[:1] or not np.isfinite(shape).all():
        raise ValueError(
            f"points has shape {list(shape.shape)} and values {list(numbers.shape)}; give finite "
            "numbers [P, 2] and [P]"
        )
    names = [style.fit(n, 1.6) for n in to_names("names", names, len(shape), "points")]
    few = len(shape) <= FEW
    low, high = shape.min(axis=0), shape.max(axis=0)
    span = np.maximum(high - low, 1e-9 + 0.2 * (high - low).max())
    margin = 0.5 if few else 0.35  # inches, for names
    inch = min((SHAPE_WIDTH - 2 * margin) / span[0], (SHAPE_HEIGHT[few] - 2 * margin) / span[1])
    size = span * inch + 2 * margin
    if few:  # a name may be wider than the shape
        size[0] = min(SHAPE_WIDTH, size[0] + 1.2)
    upright = style.text_width(label, style.NORMAL) + 0.1  # the scale's label
    size[1] = max(size[1], upright)
    places = (shape - (low + high) / 2) * inch + size / 2
    figure = style.new_figure(max(size[0] + 0.9, 4.5), size[1] + 0.15)
    axes = figure.add_subplot()
    norm = Normalize(min(0.0, numbers.min()), max(numbers.max(), 1e-9))
    image = axes.scatter(
        *places.T, s=(72 * DISC) ** 2, c=numbers, cmap=OFF_DIAGONAL, norm=norm,
        edgecolors=style.INK, linewidths=0.6, zorder=3,
    )  # fmt: skip
    axes.set_axis_off()
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect="equal")
    font = style.SMALL if few else 7.0
    for (x, y), name in zip(_name_places(places, names, size, font), names, strict=True):
        if x == x:
            axes.text(x, y, name, ha="center", va="center", size=font, color=style.FAINT)
    color_scale(image, *size, label, pad=0.01)
    return figure


def _name_places(
    points: np.ndarray, names: Sequence[str], size: np.ndarray, font: float
) -> np.ndarray:
    """[P, 2]: centres of the names beside their points, in inches; NaN where there is no room.

    Each goes to the first of the places about its point, away from the shape's middle first, where
    it covers no point and no other name.
    """
    halves = np.array([[style.text_width(name, font) / 2, font / 72 / 2] for name in names]) + 0.01
    found, outwards = np.full(points.shape, np.nan), points - points.mean(axis=0)
    apart = np.linalg.norm(points[:, None] - points, axis=2) + np.diag([np.inf] * len(points))
    for i in np.argsort(apart.min(axis=1), kind="stable"):  # those with the least room first
        sides = sorted(SIDES, key=lambda side: -np.dot(side, outwards[i]) / np.hypot(*side))
        taken = np.isfinite(found[:, 0])
        for gap, side in itertools.product(GAPS, sides):
            centre = points[i] + np.array(side) * (halves[i] + DISC / 2 + gap)
            beyond = np.abs(points - centre) >= halves[i] + DISC / 2
            off = np.abs(found[taken] - centre) >= halves[i] + halves[taken]
            inside = (centre >= halves[i]).all() and (centre + halves[i] <= size).all()
            if inside and beyond.any(axis=1).all() and off.any(axis=1).all():
                found[i] = centre
                break
    return found
