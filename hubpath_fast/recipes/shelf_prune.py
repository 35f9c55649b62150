"""``hubpath shelf prune``: which experts a routed hub of a shelf can do without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import write_json
from ..runs.places import check_apart
from ..shelf.prune import prune_hub, smaller
from ..shelf.save import check_free, open_hub_of, save_hub
from .prune import POINTS, PRUNE


def prune(
    shelf: str | Path,
    hub: str | Path | None = None,
    points: float = POINTS,
    out: str | Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Finds the smallest hub that loses at most ``points``, and writes ``SHELF/prune.json``.

    Args:
        shelf: the folder of a shelf.
        hub: of a hub of ``hubpath shelf fit``; None: SHELF/hub.
        points: percentage points of accuracy; below 0: that must be gained.
        out: where the smaller hub is saved; nothing is, where no expert can be dropped.
        tell: is told what is being done.

    Returns what ``prune.json`` holds: what ``runs.prune.describe`` says, and "hub", the folder.

    Raises:
        ValueError: no shelf or no hub of it; as of ``shelf.prune.prune_hub``; a folder ``out`` of
            something else.
    """
    opened = open_hub_of(shelf, hub)
    if out is not None:
        check_free(Path(out))
        check_apart(out, opened.shelf.record.dataset, opened.shelf.record.data)
    result, kept = prune_hub(opened, points, tell)
    result = {"hub": str(opened.folder), **result}
    if out is not None and kept is not None:
        save_hub(smaller(opened, kept), Path(out))
    write_json(Path(shelf) / PRUNE, result)  # last: where it is, all else is written
    return result
