"""What several of the commands of a shelf take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

ShelfFolder = Annotated[
    Path, typer.Argument(help="folder of `hubpath shelf extract`", metavar="SHELF")
]
HubFolder = Annotated[
    Optional[Path],  # noqa: UP045  (Typer reads it on Python 3.10 too)
    typer.Option(help="folder of its routed hub; default: SHELF/hub", metavar="DIR"),
]
