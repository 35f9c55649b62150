"""Heat maps with their numbers in the cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ...measure import Measure
from .. import style
from ..arrays import to_fractions, to_limits, to_matrix, to_names

CELL_HEIGHT = 0.42  # inches
LOW_CELL_HEIGHT = 0.24  # with more than 20 rows: a line of text
CELL_WIDTH = 1.35  # at most
NAME_WIDTH = 2.3  # of the row names, at most
BAR_WIDTH = 0.85  # the colour bar with its numbers
SLANT = 35  # degrees


def mean_weights(
    matrix: Any, row_names: Sequence[str], expert_names: Sequence[str], row_label: str = ""
) -> Figure:
    """Mean pathway weight of each expert (columns) per group of samples (rows).

    matrix: [rows, M] in 0..1. row_label: what a row is, as the axis's title. An expert that a row
    never uses shows a bare 0.
    """
    values = to_fractions("matrix", to_matrix("matrix", matrix))
    rows = to_names("row_names", row_names, values.shape[0], "rows of matrix")
    experts = to_names("expert_names", expert_names, values.shape[1], "columns of matrix")
    return heat_map(
        values, rows, experts, row_label, "expert", "mean pathway weight", cell=_weight_text
    )


def measure_by_group(
    matrix: Any,
    method_names: Sequence[str],
    group_names: Sequence[str],
    measure: Measure,
    group_label: str = "",
    bounds: Sequence[int] = (),
    limits: tuple[float, float] | None = None,
) -> Figure:
    """What each method (rows) reaches on each group of samples (columns); NaN: not measured.

    The best of each column is bold, rows named in ``bounds`` (such as an oracle's) not competing.
    The colour scale spans the values only (or ``limits``), so that methods which differ by little
    look different; light is good.
    """
    values = to_limits("matrix", to_matrix("matrix", matrix), measure)
    methods = to_names("method_names", method_names, values.shape[0], "rows of matrix")
    groups = to_names("group_names", group_names, values.shape[1], "columns of matrix")
    rivals = values.copy()
    rivals[list(bounds) if len(values) > 1 else 0] = np.nan
    known = values[np.isfinite(values)]
    limits = limits or ((known.min(), known.max()) if known.size else None)
    return heat_map(
        measure.scale * values,
        methods,
        groups,
        "",
        group_label,
        measure.label,
        limits=tuple(measure.scale * np.array(limits)) if limits else None,
        bold=np.transpose([measure.best_shown(column) for column in rivals.T]),
        cell=lambda value: measure.number(value / measure.scale),
        colors="cividis" if measure.better == "max" else "cividis_r",
    )


def _weight_text(value: float) -> str:
    return "0" if value == 0 else f"{value:.2f}"


@style.styled
def heat_map(
    matrix: Any,
    row_names: Sequence[str],
    column_names: Sequence[str],
    row_label: str = "",
    column_label: str = "",
    value_label: str = "",
    limits: tuple[float, float] | None = None,
    bold: Any = None,
    cell: Callable[[float], str] = "{:.3f}".format,
    colors: str = "cividis",
) -> Figure:
    """A matrix [rows, columns] as a heat map, row 0 on top; NaN is an empty cell with a dash.

    limits: of the colour scale; by default from 0 (or the smallest value, if negative) to the
    largest. bold: [rows, columns] of bool, the cells to mark. cell: the text of a value. colors: a
    colour map of matplotlib's. Cells too small for their number show colour only.
    """
    values = to_matrix("matrix", matrix)
    rows = to_names("row_names", row_names, values.shape[0], "rows of matrix")
    columns = to_names("column_names", column_names, values.shape[1], "columns of matrix")
    marked = np.zeros(values.shape, bool) if bold is None else np.asarray(bold, bool)
    if marked.shape != values.shape:
        raise ValueError(
            f"bold has shape {list(marked.shape)}, but matrix has {list(values.shape)}; give one "
            "flag for each cell"
        )
    known = values[np.isfinite(values)]
    if limits is None:
        limits = (min(0.0, known.min()), known.max()) if known.size else (0.0, 1.0)
    low, high = limits[0], max(limits[1], limits[0] + 1e-9)

    rows = style.fit_all(rows, NAME_WIDTH)
    names_width = max(style.text_width(name, style.SMALL) for name in rows) + 0.35
    room = style.WIDTH - names_width - BAR_WIDTH
    width = min(CELL_WIDTH, room / len(columns))
    labels, angle, label_height = column_labels(columns, width, names_width)
    height = CELL_HEIGHT if len(rows) <= 20 else LOW_CELL_HEIGHT
    cells_width = max(width * len(columns), 1.2)
    # The colour bar's own label stands upright beside the cells.
    cells_height = max(height * len(rows), style.text_width(value_label, style.NORMAL) + 0.1, 1.0)
    figure = style.new_figure(
        names_width + cells_width + BAR_WIDTH,
        cells_height + label_height + (0.25 if column_label else 0) + 0.15,
    )
    axes = figure.add_subplot()
    shades = colormaps[colors].with_extremes(bad="white")
    image = axes.imshow(values, cmap=shades, vmin=low, vmax=high, aspect="auto")
    frame(axes, rows, labels, angle, row_label, column_label)
    color_scale(image, cells_width, cells_height, value_label, pad=0.01)
    texts = [[cell(v) if np.isfinite(v) else "–" for v in row] for row in values]
    widest = max(style.text_width(t, style.NORMAL, "bold") for row in texts for t in row)
    if widest < width * 0.95:
        backgrounds = image.to_rgba(np.ma.masked_invalid(values))
        for i, j in np.ndindex(values.shape):
            ink = style.ink_on(backgrounds[i, j])
            write_cell(axes, i, j, texts[i][j], ink, style.NORMAL, marked[i, j])
    return figure


def write_cell(axes: Axes, i: int, j: int, text: str, color: str, size: float, bold: bool) -> None:
    weight = "bold" if bold else "normal"
    axes.text(j, i, text, ha="center", va="center", color=color, size=size, weight=weight)


def color_scale(image: AxesImage, width: float, height: float, label: str, pad: float) -> Colorbar:
    """Beside the cells, which are ``width`` x ``height`` inches together."""
    aspect = height / 0.14
    bar = image.figure.colorbar(image, ax=image.axes, fraction=0.2 / width, pad=pad, aspect=aspect)
    bar.outline.set_visible(False)
    bar.set_label(label)
    return bar


def column_labels(names: Sequence[str], width: float, left: float) -> tuple[list[str], int, float]:
    """The labels of columns ``width`` inches wide, their angle in degrees and height in inches.

    Level on up to three lines where they fit, slanted otherwise, upright where slanted ones would
    touch, and then only every n-th where even those would. left: inches that a slanted label may
    reach out under the row names.
    """
    line = style.SMALL * 1.25 / 72
    wrapped = [style.wrap(name, width * 0.95).split("\n") for name in names]
    widest = max(style.text_width(part, style.SMALL) for text in wrapped for part in text)
    count = max(map(len, wrapped))
    if count <= 3 and widest <= width * 0.95:
        # As many lines for each, since a lone line would stand higher than the first of two.
        level = ["\n".join(text + [""] * (count - len(text))) for text in wrapped]
        return level, 0, count * line + 0.1
    slanted = width * np.sin(np.radians(SLANT)) >= line
    if slanted:
        reach = (left + width / 2) / np.cos(np.radians(SLANT))
        short = style.fit_all(names, min(max(1.6, reach), 2.6))
    else:
        short = style.fit_all(names, 1.8)
        every = int(np.ceil(line / width))
        short = [name if i % every == 0 else "" for i, name in enumerate(short)]
    angle = SLANT if slanted else 90
    longest = max(style.text_width(name, style.SMALL) for name in short if name)
    return short, angle, longest * np.sin(np.radians(angle)) + 0.3


def frame(
    axes: Axes,
    rows: Sequence[str],
    columns: Sequence[str],
    angle: int,
    row_label: str,
    column_label: str,
) -> None:
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
    if angle:
        # The end of a slanted label is at its column; an upright one is centred on it.
        anchor = {"rotation_mode": "anchor", "va": "center" if angle == 90 else "top"}
        for label in axes.get_xticklabels():
            label.set(rotation=angle, ha="right", **anchor)
    axes.set_xlabel(column_label)
    axes.set_ylabel(row_label)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    # White rules between the cells.
    axes.set_xticks(np.arange(1, len(columns)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
