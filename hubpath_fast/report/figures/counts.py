"""A square matrix of counts, the diagonal of which is as it should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from .. import style
from ..arrays import to_array, to_names
from .heat import color_scale, column_labels, frame, write_cell

CELL = 0.6  # inches a side, at most
NAME_WIDTH = 1.5
DARKEST = 5  # at least so many samples in the darkest cell: a single one is never dark
OTHERS = "any other"
# From the pale to the dark end of one hue: read by lightness alone.
OFF_DIAGONAL = LinearSegmentedColormap.from_list(
    "errors", colormaps["YlOrBr"](np.linspace(0.12, 0.85, 256))
)


@style.styled
def count_matrix(
    counts: Any,
    names: Sequence[str],
    others: Any = None,
    row_label: str = "",
    column_label: str = "",
    count_label: str = "samples off the diagonal",
) -> Figure:
    """Counts [n, n]; those off the diagonal are coloured by their number, those on it grey, and
    cells without a sample empty. Cells too small for their number show colour only.

    names: [n], of rows and columns. others: [n], for each row how many are in columns that are not
    shown; they get a column of their own. count_label: of the scale of colours.
    """
    values = to_array("counts", counts)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not values.size:
        raise ValueError(f"counts has shape {list(values.shape)}; give a square matrix")
    names = to_names("names", names, len(values), "rows of counts")
    columns = names
    if others is not None:
        extra = to_array("others", others)
        if extra.shape != (len(values),):
            raise ValueError(
                f"others has shape {list(extra.shape)}; give one number for each of {len(values)} "
                "rows of counts"
            )
        values, columns = np.column_stack([values, extra]), [*names, OTHERS]

    rows = style.fit_all(names, NAME_WIDTH)
    left = max(style.text_width(name, style.SMALL) for name in rows) + 0.45
    texts = [[_count(value) for value in line] for line in values]
    widest = max(style.text_width(t, style.SMALL, "bold") for line in texts for t in line)
    cell = min(CELL, (style.WIDTH - left - 0.1) / len(columns))
    numbered = widest < cell * 0.96
    bar = 0.1 if numbered else 0.9  # a scale of colours stands in for the numbers
    cell = min(CELL, (style.WIDTH - left - bar) / len(columns))
    labels, angle, below = column_labels([*rows, *columns[len(rows) :]], cell, left)
    width, height = max(cell * len(columns), 1.5), max(cell * len(rows), 1.1)
    figure = style.new_figure(left + width + bar, height + below + 0.4)
    axes = figure.add_subplot()
    right = np.eye(*values.shape, dtype=bool)
    wrong = np.ma.masked_where(right | (values == 0), values)
    high = max(int(wrong.max()), DARKEST) if wrong.count() else DARKEST
    image = axes.imshow(wrong, cmap=OFF_DIAGONAL, vmin=1, vmax=high, aspect="auto")
    shades = image.to_rgba(wrong)
    for i, j in np.argwhere(values):
        color = style.INK
        if right[i, j]:
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, color=style.TRACK, zorder=0))
        else:
            color = style.ink_on(shades[i, j])
        if numbered:
            write_cell(axes, i, j, texts[i][j], color, style.SMALL, right[i, j])
    frame(axes, rows, labels, angle, row_label, column_label)
    axes.grid(which="minor", color=style.RULE, linewidth=0.8)
    axes.spines[:].set(visible=True, linewidth=0.8)
    if wrong.count() and not numbered:
        scale = color_scale(image, width, height, count_label, pad=0.02)
        scale.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def _count(value: int) -> str:
    """At most four characters: 1234 is 1.2k."""
    if value < 1000:
        return str(value)
    return f"{value / 1000:.1f}k" if value < 9950 else f"{value / 1000:.0f}k"
