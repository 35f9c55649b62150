"""Horizontal bars with their numbers beside them: what every figure of bars is drawn by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import Formatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from .. import style

ROW, LOW_ROW = 0.36, 0.24  # inches a name; the lower with more than 20
NAME_WIDTH = 2.9


class Bar(NamedTuple):
    """value: None draws nothing. spread: a whisker to both sides, or (below, above), their lengths.
    hollow: only its outline. points: single values behind it, such as those of seeds."""

    value: float | None
    color: str
    hatch: str = ""
    spread: float | tuple[float, float] | None = None
    hollow: bool = False
    points: Sequence[float] = ()


def draw_bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[Bar]],
    columns: Mapping[str, Sequence[str]],
    label: str,
    limits: tuple[float, float],
    formatter: Formatter | None = None,
    bold: Sequence[bool] = (),
    notes: Sequence[str] = (),
    base: float | None = None,
    references: Mapping[str, float] | None = None,
) -> Figure:
    """A line for each name, the first on top, with one bar of each series.

    series: bars by what a legend calls them; one series has no legend. columns: texts by their
    head, one for each name, right of the axes. label, limits, formatter: of the axis of values;
    where 0 is not within the limits, rows are dots, since the length of a cut bar says nothing.
    bold: names that stand out with their texts. notes: for each name, a text in place of a bar.
    base: rows are dots in any case, with a line from there. references: values that are marked
    across all rows, with their names above.
    """
    many = len(names) > 20
    row = max(LOW_ROW if many else ROW, 0.23 * len(series))
    bold = bold or [False] * len(names)
    figure = style.new_figure(style.WIDTH, row * len(names) + 1.0 + 0.25 * (len(series) > 1))
    axes = figure.add_subplot()
    thickness = (0.66 if len(series) == 1 else 0.76) / len(series)
    for name, value in (references or {}).items():
        axes.axvline(value, color=style.PLAIN, linewidth=1.1, linestyle="--", zorder=0.9)
        axes.annotate(
            name, (value, 1), (0, 3), axes.get_xaxis_transform(), "offset points", ha="center",
            color=style.FAINT, size=style.SMALL,
        )  # fmt: skip
    if base is None and not limits[0] <= 0 <= limits[1]:
        base = limits[0]
    for i, bars in enumerate(series.values()):
        shift = (i - (len(series) - 1) / 2) * thickness
        for y, bar in enumerate(bars):
            if bar.value is not None:
                _draw(axes, y + shift, 0.95 * thickness, bar, base)
    _write_columns(axes, columns, bold)
    for y, note in enumerate(notes):
        axes.annotate(
            style.fit(note, 4.0) if note else "", (0, y), (4, 0), axes.get_yaxis_transform(),
            "offset points", va="center_baseline", color=style.FAINT, style="italic",
        )  # fmt: skip
    axes.set_yticks(range(len(names)), style.fit_all(names, NAME_WIDTH, style.NORMAL))
    for text, marked in zip(axes.get_yticklabels(), bold, strict=True):
        text.set(size=style.NORMAL, weight="bold" if marked else "normal")
    axes.set(xlim=limits, ylim=(len(names) - 0.5, -0.5), xlabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if formatter is not None:
        axes.xaxis.set_major_formatter(formatter)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    if len(series) > 1:  # above the axes, since bars may reach their end everywhere
        handles = [Patch(color=bars[0].color, label=name) for name, bars in series.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(series))
    return figure


def _draw(axes: Axes, y: float, thickness: float, bar: Bar, base: float | None) -> None:
    """base: where the line of a dot begins; None draws a bar."""
    face = "white" if bar.hollow else bar.color
    if base is None:
        edge = "white" if bar.hatch else bar.color
        axes.barh(y, bar.value, thickness, facecolor=face, edgecolor=edge, hatch=bar.hatch)
    else:
        axes.plot([base, bar.value], [y, y], color=style.RULE, linewidth=1.0, zorder=1)
        axes.plot(
            [bar.value], [y], marker="o", markersize=9, markerfacecolor=face,
            markeredgecolor=bar.color, markeredgewidth=1.5, clip_on=False, zorder=3,
        )  # fmt: skip
    if bar.spread:
        lengths = [[part] for part in bar.spread] if isinstance(bar.spread, tuple) else bar.spread
        axes.errorbar(bar.value, y, xerr=lengths, color=style.INK, linewidth=1.2, capsize=3)
    if bar.points:  # below the whisker, whose ends they would hide
        axes.plot(
            bar.points, [y + 0.28 * thickness] * len(bar.points), linestyle="", marker="o",
            markersize=4.5, markerfacecolor="white", markeredgecolor=style.INK, markeredgewidth=0.9,
            zorder=4,
        )  # fmt: skip


def _write_columns(axes: Axes, columns: Mapping[str, Sequence[str]], bold: Sequence[bool]) -> None:
    """Right-aligned right of the axes, their heads above."""
    edge = 0.15
    for head, texts in columns.items():
        lines = (*head.split("\n"), *texts)
        edge += max(style.text_width(line, style.NORMAL, "bold") for line in lines)
        place = axes.get_yaxis_transform() + ScaledTranslation(edge, 0, axes.figure.dpi_scale_trans)
        axes.text(
            1, -0.55, head, ha="right", va="bottom", color=style.FAINT, size=style.SMALL,
            transform=place,
        )  # fmt: skip
        for y, (text, marked) in enumerate(zip(texts, bold, strict=True)):
            weight = "bold" if marked else "normal"
            axes.text(1, y, text, ha="right", va="center_baseline", weight=weight, transform=place)
        edge += 0.25
