"""``hubpath save``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape

from .fit import Folder
from .messages import console, messages


def save(
    run: Folder,
    out: Annotated[Path, typer.Argument(help="folder to write the hub to", metavar="DIR")],
    slim: Annotated[
        bool,
        typer.Option(
            "--slim",
            help="leave out frozen bodies that are the weights that their names stand for; who "
            "opens the hub downloads these",
        ),
    ] = False,
    push: Annotated[
        Optional[str],  # noqa: UP045  (Typer reads it on Python 3.10 too)
        typer.Option(help="put it on the Hugging Face hub, too", metavar="OWNER/NAME"),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="with --push: a new repository is private")
    ] = False,
) -> None:
    """Write a run's best model into a folder of its own, a file for each expert, to be opened
    anywhere by hubpath_fast.from_pretrained(DIR), or by `hubpath predict`. Its README.md is a model
    card: results, costs, whom it asks, and the licences of its experts.
    """
    with messages():
        from ..recipes.save import description
        from ..recipes.save import save as recipe

        if private and push is None:
            raise ValueError("private: of a repository, and there is no --push; leave it out")
        address = recipe(run, out, slim, push, private or None)
        said = f"saved in {out}: {description(out)}"
        console.print(escape(said), soft_wrap=True, highlight=False)
        if address is not None:
            console.print(escape(f"pushed: {address}"), soft_wrap=True, highlight=False)
