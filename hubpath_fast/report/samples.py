"""Sample images, each beside the weights of the experts that spoke."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from . import style
from .arrays import to_array, to_fractions, to_matrix, to_names

COLUMNS = 3
PICTURE = 1.15  # inches a side
LINE = 0.3  # inches for one expert: its name and, below, its bar
HEAD = 0.3  # for the line with label and prediction
SHOWN = 6  # bars of one sample; what remains is summed up in a line


@style.styled
def samples_with_weights(
    images: Any,
    weights: Any,
    expert_names: Sequence[str],
    labels: Sequence[Any],
    predictions: Sequence[Any],
    notes: Sequence[str] | None = None,
) -> Figure:
    """Sample images with the weights of their active experts as bars, largest first.

    images: uint8 [n, 3 or 1, H, W] of any size. weights: [n, M] in 0..1, 0 where inactive; a bar's
    grey track is 1. labels, predictions: [n] class names (or numbers), compared as text; a wrong
    prediction has a cross and a dashed frame. notes: [n] a word on each image, for example its
    rendering.
    """
    pictures = _pictures(images)
    n = len(pictures)
    values = to_fractions("weights", to_matrix("weights", weights))
    if len(values) != n or np.isnan(values).any():
        raise ValueError(
            f"weights has {len(values)} rows ({int(np.isnan(values).sum())} of its numbers NaN), "
            f"but there are {n} images; give one row of numbers for each image"
        )
    experts = to_names("expert_names", expert_names, values.shape[1], "columns of weights")
    truths = to_names("labels", _items("labels", labels), n, "images")
    guesses = to_names("predictions", _items("predictions", predictions), n, "images")
    remarks = [""] * n if notes is None else to_names("notes", notes, n, "images")

    columns = min(COLUMNS, n)
    grid_rows = -(-n // columns)
    active = int((values > 0).sum(1).max())
    lines = min(active, SHOWN) + (active > SHOWN)
    card = max(PICTURE, LINE * lines) + HEAD + 0.12
    card_width = style.WIDTH / COLUMNS
    figure = style.new_figure(card_width * columns, card * grid_rows + 0.05)
    figure.set_layout_engine("none")  # the places are all known
    width, height = figure.get_size_inches()

    for s in range(n):
        row, column = divmod(s, columns)
        left, top = column * card_width, height - 0.05 - row * card

        def place(x, y, w, h, left=left, top=top):
            return figure.add_axes(
                ((left + x) / width, (top - y - h) / height, w / width, h / height)
            )

        wrong = truths[s] != guesses[s]
        head = f"✗ {guesses[s]}, is {truths[s]}" if wrong else f"✓ {truths[s]}"
        axes = place(0, 0, card_width, HEAD)
        axes.set_axis_off()
        axes.set(xlim=(0, card_width), ylim=(0, HEAD))
        note_width = min(1.3, style.text_width(remarks[s], style.SMALL)) if remarks[s] else 0
        text = style.fit(head, card_width - note_width - 0.3, weight="bold")
        color = style.OKABE_ITO[5] if wrong else style.INK
        axes.text(0.08, HEAD / 2, text, va="center", weight="bold", color=color, size=style.SMALL)
        if remarks[s]:
            x = 0.08 + style.text_width(text, style.SMALL, "bold") + 0.12
            note = style.fit(remarks[s], note_width + 0.01)
            axes.text(x, HEAD / 2, note, va="center", color=style.FAINT, size=style.SMALL)
        _show(place(0.08, HEAD, PICTURE, PICTURE), pictures[s], wrong)
        bars = card_width - PICTURE - 0.38
        _bars(place(PICTURE + 0.2, HEAD, bars, max(PICTURE, LINE * lines)), values[s], experts)
    return figure


def _items(argument: str, values: Any) -> list[Any]:
    """Class names, or numbers as Python's, so that a tensor's 3 and a list's 3 read alike."""
    if isinstance(values, str):
        return [values]
    return to_array(argument, values).tolist() if hasattr(values, "dtype") else list(values)


def _pictures(images: Any) -> np.ndarray:
    """[n, H, W, 3] of uint8."""
    array = to_array("images", images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] not in (1, 3):
        raise ValueError(
            f"images is {array.dtype} {list(array.shape)}; give uint8 of shape [n, 3 or 1, H, W]"
        )
    if 0 in array.shape:
        raise ValueError(f"images has shape {list(array.shape)}; give at least one image")
    return np.repeat(array, 4 - array.shape[1], 1)[:, :3].transpose(0, 2, 3, 1)


def _show(axes: Axes, picture: np.ndarray, wrong: bool) -> None:
    axes.imshow(picture, aspect="equal", interpolation_stage="rgba")
    axes.set_anchor("NW")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set(linewidth=1.0, edgecolor=style.RULE)
        if wrong:
            spine.set(linewidth=2.2, edgecolor=style.OKABE_ITO[5], linestyle=(0, (3, 2)))


def _bars(axes: Axes, weights: np.ndarray, experts: Sequence[str]) -> None:
    """One bar for each active expert; the axes' unit is the inch downwards, the weight across."""
    inches = axes.get_position().width * axes.figure.get_figwidth()
    depth = axes.get_position().height * axes.figure.get_figheight()
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(depth, 0))
    order = [i for i in np.argsort(-weights, kind="stable") if weights[i] > 0]
    for line, i in enumerate(order[:SHOWN]):
        y, shown = line * LINE, f"{weights[i]:.2f}"
        room = inches - style.text_width(shown, style.SMALL) - 0.1
        name = style.fit(experts[i], room)
        axes.text(0, y + 0.09, name, va="center", size=style.SMALL)
        axes.text(1, y + 0.09, shown, va="center", ha="right", size=style.SMALL)
        axes.add_patch(Rectangle((0, y + 0.175), 1, 0.085, color=style.TRACK, linewidth=0))
        bar = style.look(i)
        axes.add_patch(
            Rectangle(
                (0, y + 0.175),
                weights[i],
                0.085,
                facecolor=bar.color,
                edgecolor="white",
                hatch=bar.hatch,
                linewidth=0,
                gid=f"weight of {experts[i]}",
            )
        )
    rest = order[SHOWN:]
    if rest:
        text = f"and {len(rest)} more: {weights[rest].sum():.2f}"
        axes.text(0, SHOWN * LINE + 0.09, text, va="center", color=style.FAINT, size=style.SMALL)
