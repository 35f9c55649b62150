"""The tables of ``hubpath data``: which data sets there are, and whether one is whole."""

from __future__ import annotations

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


def report_table(report: CheckReport) -> Table:
    """What was found, and what was published."""
    table = Table("", "found", "published", title=report.title)
    for what, found, published in report.counts:
        known = "" if published is None else f"{published:,}"
        right = published is None or found == published
        table.add_row(what, f"{found:,}", known, style=None if right else "bold red")
    return table
