"""``hubpath demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .fit import Device
from .messages import console, messages


def demo(
    out: Annotated[Path, typer.Option(help="folder for summary.json and report.html")] = Path(
        "hubpath-demo"
    ),
    seed: Annotated[int, typer.Option(help="of the split, the weights, the noise")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="a few epochs, under a minute")] = False,
    device: Device = "cpu",
) -> None:
    """The whole loop on handwritten digits: no download, no GPU, a few minutes."""
    with messages():
        from ..recipes.demo import demo as run

        run(out, seed, quick, device, console)
