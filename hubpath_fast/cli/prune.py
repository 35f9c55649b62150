"""``hubpath prune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..measure import Measure
from .fit import Device, Folder
from .messages import console, messages

if TYPE_CHECKING:
    from rich.table import Table


def prune(
    run: Folder,
    points: Annotated[
        float,
        typer.Option(help="what the smaller hub may lose, in points of the run's metric"),
    ] = 0.5,
    out: Annotated[
        Optional[Path],  # noqa: UP045  (Typer reads it on Python 3.10 too)
        typer.Option(help="folder to save the smaller hub to, as by `hubpath save`", metavar="DIR"),
    ] = None,
    device: Device = "cpu",
    data_root: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="where the run's own data set lies now"),
    ] = None,
) -> None:
    """What a run loses without each of its experts, and its smallest hub that loses at most
    --points on validation images, scored once on the test images. Nothing is trained.

    Writes RUN/prune.json. An expert's images go to the experts that stay, by their scores.
    """
    with messages():
        from ..recipes.prune import PRUNE
        from ..recipes.prune import prune as recipe
        from ..recipes.save import description

        result = recipe(run, points, out, device, data_root, _say)
        metric = Measure(**result["metric"])
        console.print(expert_table(result, metric))
        console.print(step_table(result, metric))
        for line in sentences(result, metric):
            _say(line)
        _say(f"written: {run / PRUNE}")
        if out is not None:
            saved = result["chosen"] is not None
            _say(f"saved in {out}: {description(out)}" if saved else f"nothing is saved in {out}")


def expert_table(result: dict[str, Any], metric: Measure) -> Table:
    """What is lost without each expert, for a terminal."""
    rows = [
        (row["name"], f"{100 * row['asked']:.1f}", *_figures(row["without"], metric))
        for row in result["experts"]
    ]
    return _table(["without", "asked, %", metric.label, "lost, points", "95 % interval"], rows)


def step_table(result: dict[str, Any], metric: Measure) -> Table:
    """The elimination."""
    whole = ("", str(len(result["experts"])), metric.number(result["value"]), "", "")
    rows = [(row["dropped"], str(row["left"]), *_figures(row, metric)) for row in result["steps"]]
    heads = ["dropped in turn", "left", metric.label, "lost, points", "95 % interval"]
    return _table(heads, [whole, *rows])


def sentences(result: dict[str, Any], metric: Measure) -> list[str]:
    """What can be dropped, and whether the test images agree."""
    chosen, count, points = result["chosen"], len(result["experts"]), result["points"]
    said = [
        f"{row['name']} stays: the router looks at its features for every image"
        for row in result["experts"]
        if not row["removable"]
    ]
    if chosen is None:
        on = f"{result['images']} validation images"
        return [*said, f"no smaller hub is within {points:g} points on {on}"]
    _, lost, interval = _figures(chosen["validation"], metric)
    said.append(
        f"the smallest hub within {points:g} points has {len(chosen['kept'])} of {count} experts: "
        f"{', '.join(chosen['kept'])}; dropped: {', '.join(chosen['dropped'])}; "
        f"{lost} points lost on {result['images']} validation images (95 % interval {interval})"
    )
    test = chosen["test"]
    if test is None:
        return [*said, "there are no test images of their own to confirm it on"]
    _, lost, interval = _figures(test, metric)
    agree = "confirmed" if test["confirmed"] else f"not confirmed: more than {points:g}"
    said.append(
        f"on {test['images']} test images: {metric.title} {metric.text(test['value'])} instead of "
        f"{metric.text(test['hub'])}, {lost} points lost (95 % interval {interval}); {agree}"
    )
    return said


def _figures(loss: dict[str, Any], metric: Measure) -> tuple[str, str, str]:
    """Of a ``runs.prune.Loss``: the metric, what is lost and its interval."""
    decimals = metric.decimals + 1
    ends = loss["interval"]
    interval = "" if ends is None else " to ".join(f"{end + 0.0:.{decimals}f}" for end in ends)
    return metric.number(loss["value"]), f"{loss['lost'] + 0.0:.{decimals}f}", interval


def _table(heads: list[str], rows: list[tuple[str, ...]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    shown = Table(heads[0])
    for head in heads[1:]:
        shown.add_column(head, justify="right")
    for row in rows:
        shown.add_row(*map(escape, row))
    return shown


def _say(text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
