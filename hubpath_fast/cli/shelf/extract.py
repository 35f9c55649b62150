"""``hubpath shelf extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..fit import Device
from ..messages import console, messages

OptionalInt, OptionalStr = Optional[int], Optional[str]  # noqa: UP045


def extract(
    hub: Annotated[
        str,
        typer.Option(help='models, wildcards too: "timm/*resnet*,file/DIR/*.pth?arch=..."'),
    ],
    out: Annotated[Path, typer.Option(help="folder of the shelf", metavar="SHELF")],
    data: Annotated[
        OptionalStr,
        typer.Option(help="folder with train/ (val/, test/) or train.txt, as fit takes it"),
    ] = None,
    dataset: Annotated[
        OptionalStr,
        typer.Option(help="one of `hubpath data list`, in the folder --data"),
    ] = None,
    views: Annotated[
        OptionalInt,
        typer.Option(
            help="crops per image: the evaluation crop, then random crops; default: 1", min=1
        ),
    ] = None,
    dtype: Annotated[OptionalStr, typer.Option(help="fp16 or fp32; default: fp16")] = None,
    image_size: Annotated[
        OptionalInt, typer.Option(help="pixels a side; default: what each model was trained at")
    ] = None,
    pretrained: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--pretrained/--no-pretrained",
            help="the weights that the names stand for, which is the default, or random ones",
        ),
    ] = None,
    validation: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="share of train held out where there is no val/; default: 0.15"),
    ] = None,
    flip: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--flip/--no-flip", help="mirror half of the random crops; default: yes"),
    ] = None,
    seed: Annotated[
        OptionalInt,
        typer.Option(help="random seed, of the held-out images and the crops; default: 0"),
    ] = None,
    batch_size: Annotated[
        str, typer.Option(help="images a batch, or auto: as many as memory allows")
    ] = "auto",
    device: Device = "cpu",
) -> None:
    """Compute the features of all images by all models, once.

    A model's features are a file; what is there is not computed again, and a run that was stopped
    goes on with the model that it was at. Models that fail are left out and listed. To add models
    to a shelf, --hub and --out are enough.
    """
    with messages():
        from ...recipes.shelf_extract import ExtractSettings, extract_shelf, summary

        settings = ExtractSettings(
            data=data, dataset=dataset, views=views, dtype=dtype, image_size=image_size,
            validation=validation, seed=seed, flip=flip, pretrained=pretrained,
        )  # fmt: skip
        if batch_size != "auto" and not batch_size.isdecimal():
            raise ValueError(f"batch_size: expected an integer or auto, got {batch_size!r}")
        size = None if batch_size == "auto" else int(batch_size)
        done = extract_shelf(out, hub, settings, size, device, console)
        for line in summary(done):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        if done.failed:
            raise typer.Exit(1)
