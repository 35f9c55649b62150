"""``hubpath shelf unfreeze``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ...notes import show_notes
from ..messages import console, messages, say
from .arguments import HubFolder, ShelfFolder


def unfreeze(
    shelf: ShelfFolder,
    top: Annotated[
        Optional[int],  # noqa: UP045  (Typer reads it on Python 3.10 too)
        typer.Option(help="number of experts that go on; default: 5, or all where there are fewer"),
    ] = None,
    hub: HubFolder = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder of what is written; default: SHELF/unfreeze", metavar="DIR"),
    ] = None,
) -> None:
    """Write the command that trains the best experts end to end.

    It is one of `hubpath fit`, which starts with the experts' heads, and with the router and
    aggregator as learned of them.

    Experts are dropped one after another, each time the one without which the hub is best on the
    validation images, until --top are left. OUT/command is the command, OUT/start.safetensors what
    it starts with. Nothing is trained here.
    """
    with messages():
        from ...recipes.shelf_unfreeze import COMMAND, UNFREEZE, sentence
        from ...recipes.shelf_unfreeze import unfreeze as recipe
        from ...tasks.classification import ACCURACY

        result = recipe(shelf, top, hub, out)
        for expert in result["experts"]:
            say(f"{expert['name']}: asked about {expert['asked']:.1%} of the validation images")
        say(sentence(result, ACCURACY))
        show_notes(result["notes"], console)
        say(f"written: {(shelf / UNFREEZE if out is None else out) / COMMAND}; go on with\n")
        say(result["command"])
