"""``hubpath compare`` and ``hubpath report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..compare.settings import CompareSettings
from ..notes import show_notes
from .messages import console, messages
from .options import options

OptionalInt, OptionalStr = Optional[int], Optional[str]  # noqa: UP045

SHOWN = (
    "data", "hub", "k", "steps", "batch_size", "explore", "image_size", "validation", "pretrained",
    "device", "budget", "temperature", "distill_weight", "warm_up", "task",
)  # fmt: skip


@options(CompareSettings, SHOWN)
def compare(
    asked,
    methods: Annotated[
        str,
        typer.Option(
            help="all, or names, comma-separated: single, best-single, ensemble, distill, "
            "soup-greedy, zoo-tuning, hub-pathway, k-sweep, ... (a wrong one lists them)"
        ),
    ] = "all",
    seeds: Annotated[str, typer.Option(help="0,1,2: everything is done once a seed")] = "0",
    out: Annotated[Path, typer.Option(help="folder of the comparison; finished runs are kept")] = (
        Path("hubpath-compare")
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="a few steps, to see it work; the figures say little")
    ] = False,
    preset: Annotated[
        OptionalStr, typer.Option(help="budget of paper-homogeneous, paper-heterogeneous, ...")
    ] = None,
    data_root: Annotated[OptionalStr, typer.Option(help="folder that holds a named set")] = None,
    rates: Annotated[
        OptionalStr,
        typer.Option(help="3e-4,1e-3: each method is tried with each, validation chooses"),
    ] = None,
    workers: Annotated[
        OptionalInt, typer.Option(help="concurrent runs; default one a core, at most 4")
    ] = None,
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="KEY=VALUE: any setting of `hubpath fit` or of a comparison"),
    ] = None,
) -> None:
    """Every method of the paper on the same data and hub, under one budget: one table.

    --budget steps gives every method the same updates; --budget passes as many expert forwards in
    training as it takes to train each expert alone for --steps, so that a Hub-Pathway takes M / K
    times as many updates (M / (K + 1) where its router looks at an expert).

    --data is a folder of images, or a data set of `hubpath data list`. With --task landmarks it is
    a list of faces (--set images=DIR says where their images lie), 300w, wflw or cofw (--data-root
    DIR), or digits.
    """
    with messages():
        from ..compare import compare as run
        from ..compare.settings import make_settings, parse_rates
        from ..runs.resolve import parse_seeds, parse_set

        more = parse_set(set_ or (), CompareSettings)
        fit, more_fit = asked.pop("fit", {}), more.pop("fit", {})
        more_trainer = more_fit.pop("trainer", {})
        nulls = [name for name, value in more_fit.items() if value is None]
        nulls += [f"trainer.{name}" for name, value in more_trainer.items() if value is None]
        trainer = fit.pop("trainer", {}) | more_trainer
        fit, asked = fit | more_fit, asked | more
        task = fit.pop("task", None)
        settings = make_settings(
            fit.pop("data", None),
            fit.pop("hub", None),
            data_root,
            None if rates is None else parse_rates(rates),
            quick,
            preset,
            trainer=trainer,
            top=fit,
            distill=asked,
            nulls=nulls,
            task=task,
        )
        rows = run(settings, methods, parse_seeds(seeds), out, workers, console)
        if any(row["status"] == "failed" for row in rows):
            raise typer.Exit(1)


def report(
    run: Annotated[
        Path, typer.Argument(help="folder of a run of `hubpath fit` or of `hubpath compare`")
    ],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder for report.html and figures/; default RUN/report"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """The paper's analysis of a run: which experts were asked, was it right, what did it cost."""
    with messages():
        from ..recipes.analysis import report as recipe

        notes: list[str] = []
        page = recipe(run, out, device, notes.append)
        show_notes(notes, console)
        console.print(f"The report is in {page}.", soft_wrap=True, markup=False)
