"""``hubpath landmarks``: points of a face, or of anything, in place of classes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..runs.config import LANDMARKS, FitConfig
from .fit import OptionalPath, OptionalStr, fit_command
from .messages import messages
from .options import options

app = typer.Typer(
    help="Learn landmarks, such as the points of a face, with a hub of pre-trained models.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

SHOWN = ("data", "images", "dataset", "hub", "k", "steps", "lr_expert", "device")
HIDDEN = (
    "lr_head", "lr_router", "batch_size", "optimizer", "schedule", "weight_decay", "clip_norm",
    "accumulate", "explore", "aggregator", "head_init", "image_size", "pretrained", "eval_every",
    "patience", "save_every", "seed", "workers", "cache", "cache_dir", "validation", "flip",
    "fallback", "warm_up", "targets", "sigma", "head_width", "unit", "flip_pairs", "box",
)  # fmt: skip


@app.command()
@options(FitConfig, SHOWN, HIDDEN, {"lr_expert": "--lr"})
def fit(
    asked,
    preset: Annotated[
        OptionalStr, typer.Option(help="landmarks-300w, landmarks-wflw or landmarks-cofw")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("hubpath-landmarks"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="KEY=VALUE: any setting that --print-config shows"),
    ] = None,
    data_root: Annotated[OptionalStr, typer.Option(help="folder of a published set")] = None,
    seeds: Annotated[OptionalStr, typer.Option(hidden=True)] = None,
    config: Annotated[OptionalPath, typer.Option(hidden=True)] = None,
    amp: Annotated[bool, typer.Option("--amp", hidden=True)] = False,
    print_config: Annotated[bool, typer.Option("--print-config", hidden=True)] = False,
) -> None:
    """Train a Hub-Pathway on your own faces (a CSV: image,x,y,...), or on 300W, WFLW or COFW.

    --data is the list, --images the folder of its images (default: the list's); or --preset
    landmarks-wflw --data-root DIR. --seeds 0,1,2 trains a run for each; --amp is bf16 autocast.
    """
    with messages():
        fit_command(
            asked, preset, out, resume, set_, data_root, seeds, config, amp, print_config, LANDMARKS
        )
