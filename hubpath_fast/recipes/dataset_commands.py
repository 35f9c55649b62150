"""``hubpath data``: which data sets there are, whether one is whole, and how to get it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.table import Table

from ..data import CheckReport, DataError
from ..data.named import DIGITS, FOLDER, find_dataset
from ..data.sources import PUBLISHED, PublishedSet


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
    """What was found beside what was published."""
    table = Table("", "found", "published", title=report.title)
    for what, found, published in report.counts:
        known = "" if published is None else f"{published:,}"
        right = published is None or found == published
        table.add_row(what, f"{found:,}", known, style=None if right else "bold red")
    return table


def download(name: str, root: str | Path) -> Path:
    """Downloads a set that torchvision can download, and returns the folder it lies in.

    Raises DataError, with where to get it and where to put it, for a set that cannot be downloaded
    and where the network fails.
    """
    name, root = find_dataset(name), Path(root)
    if name not in PUBLISHED:
        where = "scikit-learn carries it" if name == DIGITS else "it is your own images"
        raise DataError(f"{name} is nothing to download: {where}")
    entry = PUBLISHED[name]
    if entry.download is None:
        raise DataError(f"{entry.title} cannot be downloaded by this command; {_get(entry, root)}")
    place = root / entry.folder
    if place.exists():
        raise DataError(f"{place} exists already; `hubpath data check {name}` says if it is whole")
    root.mkdir(parents=True, exist_ok=True)
    # Beside and then renamed: a part of a data set must not be taken for the whole.
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as aside:
        try:
            entry.download(Path(aside))
        except Exception as error:  # urllib's, http's, ssl's, and torchvision's for a wrong hash
            raise DataError(
                f"{entry.title} could not be downloaded ({error}). On a machine with a network, "
                f"{_get(entry, root)}"
            ) from error
        (Path(aside) / entry.folder).rename(place)
    return place


def _get(entry: PublishedSet, root: Path) -> str:
    tree = "\n".join(f"  {line}" for line in (str(root), *entry.tree.splitlines()))
    return f"get {entry.origin}. The root is {root}, and is to look like this:\n{tree}"
