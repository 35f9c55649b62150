"""``hubpath prune``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..measure import Measure
from .fit import Device, Folder
from .messages import console, messages, say

if TYPE_CHECKING:
    from rich.table import Table

NAMES = 16  # of experts that a sentence lists, at most


def prune(
    run: Folder,
    points: Annotated[
        float,
        typer.Option(help="points of the run's metric that it may lose; below 0: must gain"),
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

        result = recipe(run, points, out, device, data_root, say)
        metric = Measure(**result["metric"])
        console.print(expert_table(result, metric))
        console.print(step_table(result, metric))
        for line in sentences(result, metric):
            say(line)
        say(f"written: {run / PRUNE}")
        if out is not None:
            saved = result["chosen"] is not None
            say(f"saved in {out}: {description(out)}" if saved else f"nothing is saved in {out}")


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
    best = result["best"]
    if best is not None and (chosen is None or best["left"] != len(chosen["kept"])):
        said.append(_best(result, metric))
    on = f"{result['images']} validation images"
    if chosen is None:
        return [*said, f"no smaller hub is within {points:g} points on {on}"]
    said.append(
        f"the smallest hub within {points:g} points has {len(chosen['kept'])} of {count} experts: "
        f"{listed(chosen['kept'])}; dropped: {listed(chosen['dropped'])}; "
        f"{_change(chosen['validation'], metric, on)}"
    )
    test = chosen["test"]
    if test is None:
        return [*said, "there are no test images of their own to confirm it on"]
    if points >= 0:
        within, beyond = f"lost at most {points:g}", f"more than {points:g} lost"
    else:
        within, beyond = f"gained at least {-points:g}", f"less than {-points:g} gained"
    confirmed = test["confirmed"]
    agree = f"confirmed: {within} there, too" if confirmed else f"not confirmed: {beyond} there"
    change = _change(test, metric, f"{test['images']} test images")
    said.append(
        f"{metric.title} {metric.text(test['value'])} instead of {metric.text(test['hub'])}, "
        f"{change}; {agree}"
    )
    return said


def _best(result: dict[str, Any], metric: Measure) -> str:
    best, on = result["best"], f"{result['images']} validation images"
    points = math.ceil(10**4 * best["lost"]) / 10**4  # not below what is lost
    return (
        f"{best['left']} experts do better than all {len(result['experts'])}: {metric.title} "
        f"{metric.text(best['value'])} instead of {metric.text(result['value'])}, "
        f"{_change(best, metric, on)}; "
        f"--points {points:g} proposes the smallest hub that gains as much"
    )


def _change(loss: dict[str, Any], metric: Measure, images: str) -> str:
    """In words: "0.50 points lost on 60 test images (95 % interval 0.10 to 0.90)"."""
    lost, ends = loss["lost"], loss["interval"]
    word = "gained" if lost < 0 else "lost"
    if lost < 0:
        lost, ends = -lost, None if ends is None else [-end for end in reversed(ends)]
    _, points, interval = _figures({**loss, "lost": lost, "interval": ends}, metric)
    of = f" (95 % interval {interval})" if interval else ""
    return f"{points} points {word} on {images}{of}"


def listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= NAMES else f"{len(names)} experts (see prune.json)"


def _figures(loss: dict[str, Any], metric: Measure) -> tuple[str, str, str]:
    """Of a ``runs.prune.Loss``: the metric, what is lost and its interval."""
    decimals = metric.decimals + 1
    ends = loss["interval"]
    interval = "" if ends is None else " to ".join(f"{end + 0.0:.{decimals}f}" for end in ends)
    return metric.number(loss["value"]), f"{loss['lost'] + 0.0:.{decimals}f}", interval


def _table(heads: list[str], rows: list[tuple[str, ...]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    shown = Table()
    shown.add_column(heads[0], overflow="fold")
    for head in heads[1:]:
        shown.add_column(head, justify="right")
    for row in rows:
        shown.add_row(*map(escape, row))
    return shown
