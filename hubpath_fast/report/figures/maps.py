"""Maps [h, w] that experts give for one point of a picture, and what the hub makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import style
from .pictures import PREDICTED, TRUE, place, points_legend, show, to_pictures

MOST_EXPERTS = 5  # maps beside one picture; of more experts, those of the largest weights
SIDES = (1.15, 2.0)  # inches: of a picture, at least and at most
GAP, HEAD, FOOT, LEGEND = 0.09, 0.46, 0.26, 0.3


# Thin, since a peak is a few cells wide.
RING = {
    "linestyle": "", "marker": "o", "markersize": 12, "markerfacecolor": "none",
    "markeredgecolor": TRUE, "markeredgewidth": 1.3,
}  # fmt: skip
CROSS = {
    "linestyle": "", "marker": "x", "markersize": 5, "markeredgecolor": PREDICTED,
    "markeredgewidth": 1.3,
}  # fmt: skip


class Maps(NamedTuple):
    """Of one sample. experts: their numbers. weights: [n]. maps: [n, h, w]. hub: [h, w].

    true, predicted: the point (x, y), in cells, cell j from j to j + 1. head: what stands above.
    """

    experts: Sequence[int]
    weights: Sequence[float]
    maps: np.ndarray
    hub: np.ndarray
    true: Sequence[float]
    predicted: Sequence[float]
    head: str


@style.styled
def maps_of_experts(images: Any, samples: Sequence[Maps], expert_names: Sequence[str]) -> Figure:
    """A line a sample: the picture, the map of each expert asked and the hub's, the true point as a
    ring, the predicted one as a cross. The colours of each map go from its own minimum to its own
    maximum, which stand below it.

    images: uint8 [n, 3 or 1, H, W].
    """
    pictures = to_pictures(images)
    if len(samples) != len(pictures):
        raise ValueError(
            f"samples has {len(samples)} entries, but there are {len(pictures)} images"
        )
    most = max(min(len(s.experts), MOST_EXPERTS) for s in samples) + 2
    side = float(np.clip((style.WIDTH - 0.1) / most - GAP, *SIDES))
    line = 0.3 + HEAD + side + FOOT
    width = max(most * (side + GAP) + 0.1, 4.0)
    figure = style.new_figure(width, LEGEND + line * len(samples))
    figure.set_layout_engine("none")  # every place is known
    for number, (sample, picture) in enumerate(zip(samples, pictures, strict=True)):
        top = LEGEND + number * line
        title = place(figure, (0, top), (0.08, 0, width - 0.08, 0.3))
        title.set_axis_off()
        shown = style.fit(sample.head, width - 0.2, style.NORMAL, "bold")
        title.text(0, 0.4, shown, weight="bold", size=style.NORMAL, va="center_baseline")
        cells = np.array(sample.hub.shape[::-1])
        panels = [
            ("picture", "", None),
            *_panels(sample, expert_names),
            ("the hub", "", sample.hub),
        ]
        for column, (name, below, values) in enumerate(panels):
            corner = (0.08 + column * (side + GAP), top + 0.3)
            _name(place(figure, corner, (0, 0, side, HEAD)), name, below, side)
            axes = place(figure, corner, (0, HEAD, side, side))
            if values is None:
                show(axes, picture, False)
                _mark(axes, sample, np.array(picture.shape[1::-1]) / cells)
            else:
                axes.imshow(values, cmap="cividis", interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                _mark(axes, sample, np.ones(2))
                low, high = (round(float(v), 2) + 0.0 for v in (values.min(), values.max()))
                foot = f"{low:.2f} to {high:.2f}"  # no -0.00
                axes.set_xlabel(foot, size=style.SMALL, color=style.FAINT, labelpad=4)
    points_legend(figure, RING, CROSS)
    return figure


def _panels(sample: Maps, names: Sequence[str]) -> list[tuple[str, str, np.ndarray]]:
    order = np.argsort(-np.asarray(sample.weights), kind="stable")[:MOST_EXPERTS]
    return [
        (names[sample.experts[i]], f"weight {sample.weights[i]:.2f}", sample.maps[i]) for i in order
    ]


def _name(axes: Axes, name: str, below: str, width: float) -> None:
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(HEAD, 0))
    look = {"size": style.SMALL, "va": "center_baseline"}
    axes.text(0, HEAD - 0.32 if below else HEAD - 0.12, style.fit(name, width), **look)
    axes.text(0, HEAD - 0.12, below, color=style.FAINT, **look)


def _mark(axes: Axes, sample: Maps, scale: np.ndarray) -> None:
    """The two points; scale: pixels of the picture for a cell."""
    # imshow has pixel j's centre at j, not at j + 0.5.
    true, predicted = (np.asarray(p) * scale - 0.5 for p in (sample.true, sample.predicted))
    for point, look in ((predicted, CROSS), (true, RING)):
        axes.plot(*point, scalex=False, scaley=False, **look)
