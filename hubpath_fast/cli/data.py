"""The commands ``hubpath data list``, ``hubpath data check`` and ``hubpath data download``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape

from .messages import console, messages

app = typer.Typer(
    help="The data sets that have a name.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("list")
def list_datasets() -> None:
    """Names, published counts, and where to get each."""
    with messages():
        from ..recipes.dataset_commands import dataset_table, origins

        console.print(dataset_table())
        for name, origin in origins().items():
            console.print(f"[bold]{name}[/] {escape(origin)}", soft_wrap=True, highlight=False)


@app.command("check")
def check_data(
    name: Annotated[
        Optional[str],  # noqa: UP045  (Typer reads it on Python 3.10 too)
        typer.Argument(
            help="your own folder of images, your own list of faces (a CSV), or a name of `hubpath "
            "data list`"
        ),
    ] = None,
    root: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder that holds the data set, or the photographs of a list"),
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="read all pixels: finds images that were cut short")
    ] = False,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="of faces: the PNG that one of them is drawn into"),
    ] = None,
) -> None:
    """Counts files, classes and splits, and names all that is wrong; status 1 if something is.

    Of your own images: all that `hubpath fit` refuses, what it leaves out, copies, and more. Of a
    set with a name: whether its counts are the published ones. Of faces also how their boxes
    compare with the published rule, and a picture of one beside its mirror image.
    """
    with messages():
        from ..recipes.dataset_commands import check, print_report

        report = check(name, root, decode, out)
        print_report(report, console)
        if not report.sound:
            raise typer.Exit(1)


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="of `hubpath data list`")],
    root: Annotated[Path, typer.Option(help="folder to put the data set into")],
) -> None:
    """Downloads a data set where its source still serves it; else says where to get it."""
    with messages():
        from ..data.download import download as fetch

        console.print(f"kept in {escape(str(fetch(name, root)))}", soft_wrap=True)
