"""``hubpath shelf prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ...measure import Measure
from ..messages import console, messages, say
from ..prune import expert_table, listed, sentences, step_table
from .arguments import HubFolder, ShelfFolder

SHOWN = 12  # experts, and steps


def prune(
    shelf: ShelfFolder,
    hub: HubFolder = None,
    points: Annotated[
        float,
        typer.Option(help="percentage points that the smaller hub may lose; below 0: must gain"),
    ] = 0.5,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder to save the smaller hub to", metavar="DIR"),
    ] = None,
) -> None:
    """Find the experts that a routed hub can do without.

    What it loses without each of them, and the smallest hub that loses at most --points on
    validation images, scored once on the test images. Nothing is trained.

    Writes SHELF/prune.json. An expert's images go to the experts that stay, by their scores. OUT is
    a hub as `hubpath shelf fit` makes one, for `--hub OUT` of the other commands.
    """
    with messages():
        from ...recipes.prune import PRUNE
        from ...recipes.shelf_prune import prune as recipe

        result = recipe(shelf, hub, points, out, say)
        metric = Measure(**result["metric"])
        show(result, metric)
        for line in [*sentences(result, metric), *unmeasured(result)]:
            say(line)
        say(f"written: {shelf / PRUNE}")
        if out is not None:
            saved = result["chosen"] is not None
            say(f"saved in {out}" if saved else f"nothing is saved in {out}")


def show(result: dict[str, Any], metric: Measure) -> None:
    """The experts that matter most, and the end of the elimination."""
    rows, steps = result["experts"], result["steps"]
    asked = [row for row in rows if row["asked"] > 0]
    most = sorted(asked, key=lambda row: (-row["without"]["lost"], -row["asked"]))[:SHOWN]
    console.print(expert_table({**result, "experts": most}, metric))
    others = [f"{len(asked) - len(most)} more are asked"] if len(asked) > len(most) else []
    if never := [row["name"] for row in rows if row["asked"] == 0]:
        others.append(f"{len(never)} of {len(rows)} are never asked: {listed(never)}")
    if others:
        say("; ".join(others))
    if len(steps) > SHOWN:
        say(f"{len(steps) - SHOWN} experts are dropped first, then:")
    console.print(step_table({**result, "steps": steps[-SHOWN:]}, metric))


def unmeasured(result: dict[str, Any]) -> list[str]:
    """That --points is finer than the validation images can tell; nothing where it is not."""
    images, points = result["images"], result["points"]
    if not 0 < abs(points) < 100 / images:
        return []
    then = "no image may be lost" if points > 0 else "an image must be gained"
    return [
        f"one of {images} validation images is {100 / images:.1f} points, so {abs(points):g} "
        f"cannot be measured: on balance {then}"
    ]
