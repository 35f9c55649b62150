"""``hubpath shelf fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ...shelf.settings import ShelfFitSettings
from ..messages import console, messages
from ..options import options
from .arguments import ShelfFolder

SHOWN = ("k", "experts", "heads", "steps", "lr_head", "lr_router", "seed", "device")
HIDDEN = (
    "router", "aggregator", "batch_size", "explore", "router_supervision", "label_smoothing",
    "weight_decay", "schedule", "patience", "eval_every", "save_every", "generator_width",
    "generator_stride",
)  # fmt: skip


@options(ShelfFitSettings, SHOWN, HIDDEN, defaults=ShelfFitSettings())
def fit(
    asked,
    shelf: ShelfFolder,
    router_features: Annotated[
        Optional[str],  # noqa: UP045  (Typer reads it on Python 3.10 too)
        typer.Option(
            help="route by the features of this model, which then runs on every image and is no "
            "expert; default: by the image itself",
            metavar="MODEL",
        ),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder of the hub; default: SHELF/hub", metavar="DIR"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the hub in --out, with its settings")
    ] = False,
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="KEY=VALUE: any other setting, such as explore=0.5"),
    ] = None,
) -> None:
    """Train a router and the experts' heads on a shelf's features.

    Bodies stay frozen, so this takes minutes. Which models are experts is chosen on validation
    images, unless --experts all. Writes to --out: hub.json, the weights in best/, log.jsonl,
    predictions.safetensors, result.json.
    """
    with messages():
        from ...recipes.shelf_fit import asked_settings
        from ...recipes.shelf_fit import shelf_fit as recipe

        settings = asked_settings(shelf, asked, router_features, out, resume, set_ or ())
        if recipe(shelf, settings, out, resume, console)[0].interrupted:
            raise typer.Exit(130)
