"""A hub's accuracy under a budget, beside what else could be had for as many milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...measure import Measure
from .. import style
from ..tables import Table
from .axis import set_value_ticks, value_limits

SPLITS = {"validation": "validation images (chosen on)", "test": "test images"}
LINES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ensembles": ("ensembles of 1 to M experts", {"color": style.OKABE_ITO[2], "marker": "s"}),
    "cascades": ("cascade of the experts", {"color": style.OKABE_ITO[1], "marker": "^"}),
    "curve": ("hub under a budget", {"color": style.GOOD, "marker": "o", "linewidth": 1.8}),
}
KINDS = {"curve": "hub", "cascades": "cascade"}


def budget_table(result: Mapping[str, Any], measure: Measure) -> Table:
    """Every row of the figure: what it is, its measure, milliseconds and forwards an image.

    result: as ``recipes.budget`` makes it. Figures are of the test images where there are some.
    """
    split = "validation" if result["images"]["test"] is None else "test"
    named: list[tuple[str, Mapping[str, Any]]] = [("hub as it is", result["hub"])]
    for key, kind in KINDS.items():
        named += [(f"{kind}, {row['budget']:.3g} ms", row) for row in result[key]]
    named += [(f"hub, top-mass {r['policy']['top_mass']:g}", r) for r in result["top_mass"]]
    named += [(f"{row['name']} alone", row) for row in result["singles"]]
    named += [(f"ensemble of {len(row['experts'])}", row) for row in result["ensembles"][1:]]
    rows = [
        [name, row["validation"]["value"], row[split]["value"], row[split]["milliseconds"],
         row[split]["forwards"]]
        for name, row in named
    ]  # fmt: skip
    heads = ["", f"validation {measure.label}", f"{split} {measure.label}", "ms", "forwards"]
    if split == "validation":
        heads, rows = [heads[0], *heads[2:]], [[row[0], *row[2:]] for row in rows]
    forms = {head: measure.number for head in heads if measure.label in head}
    return Table(heads, rows, formats={**forms, "ms": ".3g", "forwards": ".2f"})


@style.styled
def accuracy_under_a_budget(result: Mapping[str, Any], measure: Measure) -> Figure:
    """The measure over milliseconds an image, a panel for each split that there is.

    result: as ``recipes.budget`` makes it. A line joins the policies of growing budgets; the hub as
    it is, without one, is a ring.
    """
    splits = [name for name in SPLITS if result["images"][name] is not None]
    figure = style.new_figure(style.WIDTH, 4.4)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    panels = figure.subplots(1, len(splits), squeeze=False, sharey=True)[0]
    values = []
    for axes, split in zip(panels, splits, strict=True):
        values += _draw(axes, result, split)
        axes.set(title=SPLITS[split], xlabel=f"ms per image ({result['batch']} at a time)")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.grid()
        axes.set_axisbelow(True)
    panels[0].set_ylim(*value_limits(min(values), max(values), measure))
    set_value_ticks(panels[0].yaxis, measure)
    panels[0].set_ylabel(measure.label)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure


def _draw(axes: Axes, result: Mapping[str, Any], split: str) -> list[float]:
    """All points of a split; their values."""
    singles = _points(result["singles"], split)
    look = {"linestyle": "", "marker": "D", "markersize": 6, "color": style.PLAIN}
    axes.plot(*singles, label="one expert alone", **look)
    found = list(singles[1])
    for key, (label, line) in LINES.items():
        points = _points(result[key], split)
        axes.plot(*points, label=label, **({"markersize": 5, "linewidth": 1.2} | line))
        found += points[1]
    ring = {"markerfacecolor": "none", "markeredgecolor": style.GOOD, "markeredgewidth": 1.6}
    full = _points([result["hub"]], split)
    axes.plot(*full, label="hub as it is", linestyle="", marker="o", markersize=12, **ring)
    return [*found, *full[1]]


def _points(rows: Sequence[Mapping[str, Any]], split: str) -> tuple[list[float], list[float]]:
    """(milliseconds, values), in the order of the costs."""
    points = sorted((row[split]["milliseconds"], row[split]["value"]) for row in rows)
    return [cost for cost, _ in points], [value for _, value in points]
