"""``hubpath shelf add``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..add import table
from ..fit import Device
from ..messages import console, messages, say
from .arguments import HubFolder, ShelfFolder


def add(
    shelf: ShelfFolder,
    name: Annotated[
        str,
        typer.Argument(
            help="the newcomer, as `hubpath shelf extract` takes it, or its label", metavar="NAME"
        ),
    ],
    hub: HubFolder = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder of the larger hub; default: HUB+LABEL", metavar="DIR"),
    ] = None,
    steps: Annotated[int, typer.Option(help="updates of the fit of its score", min=1)] = 500,
    device: Device = "cpu",
) -> None:
    """Add a model to a shelf and to its routed hub. The hub stays as it is, and so do predictions
    of images that the newcomer does not get.

    Its features are computed, its head is fitted on the training images, and its score on two
    thirds of the validation images; the others choose, and test images are reported on. OUT is a
    hub for `--hub OUT` of the other commands.
    """
    with messages():
        from ...recipes.shelf_add import add as recipe

        result = recipe(shelf, name, hub, out, steps, device, console, say)
        console.print(table(result))
        kept = result["unchanged"]
        say(
            f"{kept['images']} of these images do not go to it; by themselves their probabilities "
            f"changed by at most {kept['largest_change']:.1g}"
        )
        say(
            f"{result['expert']}: alone right on {100 * result['head_accuracy']:.1f} % of training "
            f"images, cross-validated; score fitted on {result['fit_images']} images, chosen on "
            f"{result['choose_images']} others, {result['seconds']:.1f} s; saved in {result['hub']}"
        )
