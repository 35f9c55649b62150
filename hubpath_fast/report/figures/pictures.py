"""Pictures in a figure: their places in inches, and points upon them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from .. import style
from ..arrays import to_array

TRUE, PREDICTED = style.OKABE_ITO[4], style.OKABE_ITO[5]  # colours of points


def place(
    figure: Figure, corner: tuple[float, float], box: tuple[float, float, float, float]
) -> Axes:
    """Axes in a box (x, y, width, height) from a corner, in inches from the upper left."""
    width, height = figure.get_size_inches()
    x, y, w, h = box
    bottom = height - corner[1] - y - h
    return figure.add_axes(((corner[0] + x) / width, bottom / height, w / width, h / height))


def to_pictures(images: Any) -> np.ndarray:
    """[n, H, W, 3] of uint8."""
    array = to_array("images", images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] not in (1, 3):
        raise ValueError(
            f"images is {array.dtype} {list(array.shape)}; give uint8 of shape [n, 3 or 1, H, W]"
        )
    if 0 in array.shape:
        raise ValueError(f"images has shape {list(array.shape)}; give at least one image")
    return np.repeat(array, 4 - array.shape[1], 1)[:, :3].transpose(0, 2, 3, 1)


def show(axes: Axes, picture: np.ndarray, marked: bool) -> None:
    axes.imshow(picture, aspect="equal", interpolation_stage="rgba")
    axes.set_anchor("NW")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set(linewidth=1.0, edgecolor=style.RULE)
        if marked:
            spine.set(linewidth=2.2, edgecolor=style.OKABE_ITO[5], linestyle=(0, (3, 2)))


def draw_points(axes: Axes, true: np.ndarray, predicted: np.ndarray, side: float) -> None:
    """Points [P, 2] upon a picture, in its pixels, pixel j from j to j + 1: true ones as rings,
    predicted ones as dots, joined. Those outside the picture are not drawn. side: of the picture in
    inches."""
    size = float(np.clip(9 * side / np.sqrt(len(true)), 1.3, 5.0))  # points
    # imshow has pixel j's centre at j, not at j + 0.5.
    true, predicted = np.asarray(true) - 0.5, np.asarray(predicted) - 0.5
    pairs = np.stack([true, predicted], axis=1)
    axes.add_collection(
        LineCollection(pairs, colors="white", linewidths=0.35 * size, zorder=2), autolim=False
    )
    axes.add_collection(
        LineCollection(pairs, colors=PREDICTED, linewidths=0.2 * size, zorder=3), autolim=False
    )
    for points, look in ((true, true_look(size)), (predicted, predicted_look(size))):
        axes.plot(*points.T, zorder=4, scalex=False, scaley=False, **look)


def true_look(size: float) -> dict[str, Any]:
    """A ring with a dark rim, as it lies on pictures of any colour."""
    return {
        "linestyle": "", "marker": "o", "markersize": 1.5 * size, "markerfacecolor": "none",
        "markeredgecolor": TRUE, "markeredgewidth": 0.35 * size,
        "path_effects": [withStroke(linewidth=0.55 * size, foreground=style.INK)],
    }  # fmt: skip


def predicted_look(size: float) -> dict[str, Any]:
    return {
        "linestyle": "", "marker": "o", "markersize": size, "markerfacecolor": PREDICTED,
        "markeredgecolor": "white", "markeredgewidth": 0.15 * size,
    }  # fmt: skip


def points_legend(figure: Figure, true: Mapping[str, Any], predicted: Mapping[str, Any]) -> None:
    """In the upper left corner: how true and predicted points look."""
    looks = {"true": true, "predicted": predicted}
    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    figure.legend(
        handles=handles, ncols=2, loc="upper left", borderaxespad=0.2, borderpad=0.2,
        handlelength=1.0, handletextpad=0.5,
    )  # fmt: skip
