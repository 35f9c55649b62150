"""Sentences and tables that several commands of a shelf print."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

FEW = 100  # images, of which an accuracy of 80 % has a standard error of 4 points
KEPT_HEADS = "heads that are fitted are kept, so the same command goes on after them"


def few_images(count: int, kind: str, what: str) -> list[str]:
    """A warning of few images, or nothing. kind: "validation" or so. what: is done with them."""
    if count >= FEW:
        return []
    images = f"1 {kind} image" if count == 1 else f"{count} {kind} images"
    points = 100 / count
    return [
        f"few images: {what} {images}, one of which is {points:.1f} points,",
        f"so luck has a large part; {FEW} or more are better",
    ]


def plain_table(title: str, heads: tuple[str, ...], name: int = 0, gap: int = 3) -> Table:
    """Numbers by names, for 80 columns: a number is never cut, a name goes on in the next line.

    name: place of the column of names. gap: spaces between columns, 1 to 3.
    """
    from rich.box import SIMPLE
    from rich.table import Table

    pad = (0, 1 if gap > 1 else 0, 0, 1 if gap > 2 else 0)
    shown = Table(title=title, box=SIMPLE, pad_edge=False, padding=pad, min_width=len(title))
    for place, head in enumerate(heads):
        if place == name:
            shown.add_column(head, overflow="fold", min_width=8, vertical="bottom")
        else:
            shown.add_column(head, justify="right", no_wrap=True)
    return shown
