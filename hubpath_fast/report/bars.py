"""Methods by accuracy, and what each costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from . import style

KEYS = ("name", "accuracy", "std", "cost", "bound", "note")
ROW = 0.36  # inches


@style.styled
def accuracy_bars(
    rows: Sequence[Mapping[str, Any]], sort: bool = False, start: float | None = None
) -> Figure:
    """Methods by accuracy, one a line, the value printed and the best marked with a star.

    rows: mappings with ``name``; ``accuracy`` (0..1, or None where a method has none); and
    optionally ``std`` (drawn as a whisker), ``cost`` (expert forwards per sample), ``bound`` (True:
    an upper bound such as the oracle, drawn hollow and never the best), ``note`` (text, in place of
    the numbers of a row without accuracy). sort: best first instead of as given.

    start: where the accuracy axis begins; by default 0, or below the lowest when all exceed 0.5.
    From 0, rows are bars; otherwise dots, since the length of a cut bar says nothing.
    """
    items = [_checked(i, row) for i, row in enumerate(rows)]
    if not items:
        raise ValueError("rows is empty; give at least one method")
    if sort:
        items.sort(key=lambda r: -np.inf if r["accuracy"] is None else r["accuracy"], reverse=True)
    known = [r["accuracy"] - (r["std"] or 0) for r in items if r["accuracy"] is not None]
    if start is None:
        start = np.floor((min(known) - 0.02) * 20) / 20 if known and min(known) > 0.5 else 0.0
    elif not 0 <= start < 1:
        raise ValueError(f"start is {start}; give where the axis of accuracies begins, in [0, 1)")
    rivals = [r["accuracy"] for r in items if r["accuracy"] is not None and not r["bound"]]
    top = round(max(rivals), 3) if rivals else None  # ties as printed
    best = [
        r["accuracy"] is not None and not r["bound"] and round(r["accuracy"], 3) == top
        for r in items
    ]

    names = style.fit_all([r["name"] for r in items], 2.6, style.NORMAL)
    names = [f"★ {name}" if b else name for name, b in zip(names, best, strict=True)]
    figure = style.new_figure(style.WIDTH, ROW * len(items) + 1.1)
    axes = figure.add_subplot()
    for y, row in enumerate(items):
        _draw(axes, y, row, start, best[y])
    _print_columns(axes, items, best)
    axes.set_yticks(range(len(items)), names, size=style.NORMAL)
    for label, marked in zip(axes.get_yticklabels(), best, strict=True):
        label.set_weight("bold" if marked else "normal")
    axes.set(xlim=(start, 1.0), ylim=(len(items) - 0.5, -0.5), xlabel="accuracy (fraction right)")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(start == 0)
    axes.tick_params(axis="y", length=0)
    return figure


def _checked(i: int, row: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(row) - set(KEYS))
    if unknown or "name" not in row:
        wrong = f"the unknown key {unknown[0]!r}" if unknown else "no name"
        raise ValueError(f"rows[{i}] has {wrong}; its keys can be {', '.join(KEYS)}")
    full = dict.fromkeys(KEYS) | dict(row)
    full["name"] = str(full["name"])
    accuracy, std = full["accuracy"], full["std"]
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise ValueError(f"rows[{i}] has accuracy {accuracy}; give a fraction from 0 to 1 or None")
    if std is not None and not std >= 0:
        raise ValueError(f"rows[{i}] has std {std}; give a spread of at least 0 or None")
    return full


def _draw(axes: Axes, y: int, row: Mapping[str, Any], start: float, best: bool) -> None:
    accuracy, std = row["accuracy"], row["std"]
    if accuracy is None:
        return
    color = style.GOOD if best else style.PLAIN
    face = "white" if row["bound"] else color
    if start == 0:
        axes.barh(y, accuracy, 0.62, facecolor=face, edgecolor=color, linewidth=1.2)
    else:
        axes.plot([start, accuracy], [y, y], color=style.RULE, linewidth=1.0, zorder=1)
        axes.plot(
            [accuracy],
            [y],
            marker="o",
            markersize=9,
            markerfacecolor=face,
            markeredgecolor=color,
            markeredgewidth=1.5,
            clip_on=False,
            zorder=3,
        )
    if std:
        axes.errorbar(accuracy, y, xerr=std, color=style.INK, linewidth=1.2, capsize=3, zorder=2.5)


def _print_columns(axes: Axes, items: Sequence[Mapping[str, Any]], best: Sequence[bool]) -> None:
    """The numbers, right-aligned in columns right of the axes, with a head above each."""
    columns = {"accuracy": [_accuracy_text(row) for row in items]}
    if any(row["cost"] is not None for row in items):
        columns["forwards\nper sample"] = [
            "" if r["cost"] is None else f"{r['cost']:g}" for r in items
        ]
    edge = 0.15
    for head, texts in columns.items():
        edge += max(
            style.text_width(text, style.NORMAL, "bold") for text in (*head.split("\n"), *texts)
        )
        place = axes.get_yaxis_transform() + ScaledTranslation(edge, 0, axes.figure.dpi_scale_trans)
        axes.text(
            1,
            -0.55,
            head,
            ha="right",
            va="bottom",
            color=style.FAINT,
            size=style.SMALL,
            transform=place,
        )
        for y, text in enumerate(texts):
            weight = "bold" if best[y] else "normal"
            axes.text(1, y, text, ha="right", va="center_baseline", weight=weight, transform=place)
        edge += 0.25
    for y, row in enumerate(items):
        if row["accuracy"] is None and row["note"]:
            note = style.fit(str(row["note"]), 4.0)
            axes.annotate(
                note,
                (0, y),
                xytext=(4, 0),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                va="center_baseline",
                color=style.FAINT,
                size=style.SMALL,
                style="italic",
            )


def _accuracy_text(row: Mapping[str, Any]) -> str:
    if row["accuracy"] is None:
        return "–"
    return f"{row['accuracy']:.3f}" + ("" if row["std"] is None else f" ± {row['std']:.3f}")
