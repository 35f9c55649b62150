"""Does routing pay? Learned routes beside what else the same trained experts could be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from ...measure import Measure
from .. import style
from ..tables import Table
from .axis import bar_limits, value_formatter
from .bars import Bar, draw_bars


def _rows(
    found: Mapping[str, Any],
) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any] | None]]:
    """(name, value with its interval, by how much the learned routes are better), a line each."""
    added = found["added"]
    rows = [("learned routes", found["learned"], None)]
    if "fixed" in found:
        asked = " + ".join(found["fixed"]["names"])
        rows.append((f"always {asked}", found["fixed"], added["fixed"]))
        rows.append(("random routes", found["random"], added["random"]))
    pairs = zip(found["alone"], added["alone"], strict=True)
    return rows + [(f"{own['name']} alone", own, better) for own, better in pairs]


@style.styled
def routing_bars(found: Mapping[str, Any], measure: Measure) -> Figure:
    """A bar each for the learned routes, the best fixed set, random routes and every expert alone,
    with the interval of its mean, and by how much the learned routes are better (± standard error).

    found: ``routing`` of a run's result.
    """
    rows = _rows(found)
    lows, highs = ([own[end] for _, own, _ in rows] for end in ("low", "high"))
    colors = {0: style.GOOD, 1: style.OKABE_ITO[1] if "fixed" in found else style.PLAIN}
    bars = [
        Bar(
            own["value"],
            colors.get(i, style.PLAIN),
            spread=(max(0.0, own["value"] - own["low"]), max(0.0, own["high"] - own["value"])),
        )
        for i, (_, own, _) in enumerate(rows)
    ]
    number = measure.number
    return draw_bars(
        [name for name, _, _ in rows],
        {"": bars},
        {
            measure.label: [number(own["value"]) for _, own, _ in rows],
            "95 %\ninterval": [f"{number(own['low'])}–{number(own['high'])}" for _, own, _ in rows],
            "learned routes\nare better by": [
                "" if by is None else f"{number(by['value'])} ± {number(by['error'])}"
                for _, _, by in rows
            ],
        },
        measure.label,
        bar_limits(min(lows), max(highs), measure),
        value_formatter(measure),
    )


def routing_table(found: Mapping[str, Any]) -> Table:
    """All numbers, a line each."""
    columns = ["asked", "value", "low", "high"]
    columns += [f"learned routes better by{end}" for end in ("", ", error", ", low", ", high")]
    rows = [
        [name, *(own[key] for key in ("value", "low", "high"))]
        + [None if by is None else by[key] for key in ("value", "error", "low", "high")]
        for name, own, by in _rows(found)
    ]
    return Table(columns, rows)
