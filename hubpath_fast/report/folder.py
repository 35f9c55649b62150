"""The folder of a report's figures, each with its numbers."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ..files import write_bytes, write_text
from .page import Picture
from .tables import Table


class FigureFolder:
    """Where figures and their numbers are written; ``written`` has the paths.

    scale: pixels of a PNG for one of the page.
    """

    def __init__(self, folder: Path, scale: float = 2.0) -> None:
        self.folder, self.scale = folder, scale
        self.written: list[Path] = []

    def picture(self, name: str, figure: Figure, table: Table, caption: str, alt: str) -> Picture:
        """Writes ``NAME.png`` and ``NAME.csv``; returns the figure for the page."""
        picture = Picture(figure, caption, alt, self.scale)
        self.written.append(write_bytes(self.folder / f"{name}.png", picture.png))
        self.numbers(name, table)
        return picture

    def numbers(self, name: str, table: Table) -> None:
        """Writes ``NAME.csv`` alone."""
        self.written.append(write_text(self.folder / f"{name}.csv", table.csv()))
