"""``hubpath shelf demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..messages import console, messages


def demo(
    out: Annotated[
        Path, typer.Option(help="folder for summary.json, report.html and the shelf")
    ] = Path("hubpath-shelf-demo"),
    seed: Annotated[int, typer.Option(help="random seed of split, weights and noise")] = 0,
) -> None:
    """All commands of a shelf once, on digits and 200 models.

    No download, no GPU. The first time the models are made, which takes minutes; they are kept in
    the user's cache.
    """
    with messages():
        from ...recipes.shelf_demo import shelf_demo

        shelf_demo(out, seed, console)
