"""The tables of ``hubpath data``: which data sets there are, and whether one is whole."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..data import CheckReport
from ..data.named import DIGITS, FOLDER
from ..data.sources import PUBLISHED


def dataset_table() -> Table:
    """All data sets with their published counts."""
    table = Table("name", "data set", "classes", "train", "validation", "test")
    for entry in PUBLISHED.values():
        counts = [f"{entry.counts[split]:,}" if split in entry.counts else "held out"
                  for split in ("train", "validation", "test")]  # fmt: skip
        table.add_row(entry.name, entry.title, f"{entry.classes}", *counts)
    table.add_row(DIGITS, "handwritten digits", "10", "240", "60", "797")
    table.add_row(FOLDER, "your own images", "", "", "", "")
    return table


def origins() -> dict[str, str]:
    """Where each data set comes from, by name."""
    own = "train/CLASS/IMAGE, CLASS/IMAGE, or lists train.txt, val.txt, test.txt of: path class"
    published = {entry.name: entry.origin for entry in PUBLISHED.values()}
    return {**published, DIGITS: "scikit-learn carries them", FOLDER: own}


def print_report(report: CheckReport, console: Console) -> None:
    """The counts, and a line for everything that was found."""
    known = any(published is not None for _, _, published in report.counts)
    own = not known and report.title != DIGITS
    table = Table("", "found", *(["published"] if known else []), title=report.title)
    for what, found, published in report.counts:
        right = published is None or found == published
        row = [what, f"{found:,}", *([f"{published:,}"] if published is not None else [])]
        table.add_row(*row, style=None if right else "bold red")
    console.print(table)
    lines = [
        *(("[bold red]refused[/]", text) for text in report.refused),
        *(("[bold red]look[/]" if own else "[bold red]wrong[/]", text) for text in report.problems),
        *(("[yellow]note[/]", text) for text in report.notes),
    ]
    for word, text in lines:
        console.print(f"{word} {escape(text)}", soft_wrap=True, highlight=False)
    console.print(_verdict(report, own), highlight=False, soft_wrap=True)


def _verdict(report: CheckReport, own: bool) -> str:
    if report.complete:
        return "[bold green]complete[/]"
    if report.sound:
        return "[bold green]nothing is wrong[/]; what was left out is none of your images"
    if report.refused:
        count = len(report.refused)
        reasons = "1 reason" if count == 1 else f"{count} reasons"
        return f"`hubpath fit` refuses these images, for {reasons}"
    if own:
        return "`hubpath fit` trains on these images, and mentions what to look at"
    return "not as it was published"
