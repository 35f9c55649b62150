"""Where a command may write: not among the images, and not into what another command wrote."""

from __future__ import annotations

from pathlib import Path

from ..data.named import FOLDER
from ..data.walk import holds_images
from ..written import find_written


def check_apart(out: str | Path, dataset: str, data: str | Path | None) -> None:
    """Raises ValueError if ``out`` would be written among images, as a class or into one.

    A folder of its own beside the classes is fine: where images are read, it is left out.

    dataset, data: of the images, as settings have them. Only a folder of one's own has classes that
    are found by looking.
    """
    if dataset != FOLDER or not data:
        return
    place, root = Path(out).resolve(), Path(data).resolve()
    if place != root and root not in place.parents:
        return
    beside = None if place == root else root / place.relative_to(root).parts[0]
    if beside is None or (beside.is_dir() and holds_images(beside)):
        raise ValueError(
            f"out: {out} lies in the data's folder {data}"
            + (f", among the images of {beside}" if beside else "")
            + "; choose another"
        )


def check_not_taken(out: str | Path, *own: str) -> None:
    """Raises ValueError for a folder that is something else of ``hubpath``: two in one folder would
    be taken for each other. own: what it may be, see ``written``."""
    found = find_written(out)
    if found is not None and found.name not in own:
        raise ValueError(f"out: {out} is {found.what}; choose another folder")
