"""Downloading a published data set, whole or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .layouts import DataError
from .named import DIGITS, FACES, find_dataset
from .sources import PUBLISHED, PublishedSet


def download(name: str, root: str | Path) -> Path:
    """Downloads a set that torchvision can download, and returns the folder it lies in.

    Raises DataError, with where to get it and where to put it, for a set that cannot be downloaded
    and where the network fails.
    """
    name, root = find_dataset(name), Path(root)
    if name not in PUBLISHED:
        where = "scikit-learn carries it" if name == DIGITS else "it is your own images"
        if name in FACES:
            where = "its source has to be asked for it; `hubpath data list` says which"
        raise DataError(f"{name} is nothing to download: {where}")
    entry = PUBLISHED[name]
    if entry.download is None:
        raise DataError(f"{entry.title} cannot be downloaded by this command; {_get(entry, root)}")
    place = root / entry.folder
    if place.exists():
        raise DataError(f"{place} exists already; `hubpath data check {name}` says if it is whole")
    root.mkdir(parents=True, exist_ok=True)
    # Renamed once it is complete: a part of a data set must not be taken for the whole.
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
