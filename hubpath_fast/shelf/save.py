"""A routed hub that no training made, a smaller or a larger one, written for ``open_hub``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ..checkpoints import find_checkpoint, load_config, replacing_folder, write_model
from ..features import Shelf
from ..model import NewcomerAggregator
from ..model.aggregator import LinearAggregator, MLPAggregator, SumAggregator
from ..model.saving import model_config
from .run import CHECKPOINTS, FOLDER, HUB, ShelfHub, has_hub, open_hub, write_hub

BEST, LAST = CHECKPOINTS
KINDS = {LinearAggregator: "linear", SumAggregator: "sum", MLPAggregator: "mlp"}


def open_hub_of(shelf: Shelf | str | Path, folder: str | Path | None = None) -> ShelfHub:
    """The hub in a folder, which is one of this shelf; None: SHELF/hub. Raises ValueError."""
    shelf = shelf if isinstance(shelf, Shelf) else Shelf.open(shelf)
    return open_hub(shelf.folder / FOLDER if folder is None else folder, shelf)


def is_saved(folder: Path) -> bool:
    """Whether a folder holds a hub of ``save_hub``, from which no training goes on."""
    if not has_hub(folder) or (folder / LAST).exists() or not find_checkpoint(folder / BEST):
        return False
    return "trainer" not in load_config(folder / BEST)


def saved_labels(folder: Path) -> tuple[str, ...]:
    """Of the experts of the hub in a folder, as it was written. Raises ValueError."""
    try:
        held = json.loads((folder / HUB).read_text(encoding="utf-8"))
        return tuple(str(model["label"]) for model in held["models"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / HUB} is damaged ({error}); delete the folder") from error


def check_free(folder: Path) -> None:
    """Raises ValueError for a folder that holds something else than a hub of ``save_hub``."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: expected a folder, got the file {folder}")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not has_hub(folder):
        raise ValueError(
            f"out: {folder} is not empty and holds no hub of a shelf, which would be replaced; "
            "give another folder"
        )
    if not is_saved(folder):
        raise ValueError(
            f"out: {folder} is a hub that hubpath shelf fit goes on from, and would be replaced; "
            "give another folder"
        )


def save_hub(hub: ShelfHub, folder: Path) -> None:
    """Writes a hub as it is now into a folder, in whose place a hub may be that was written so.
    Raises OSError."""
    inner = hub.model.aggregator
    newcomers = 0
    if isinstance(inner, NewcomerAggregator):
        inner, newcomers = inner.aggregator, inner.count
    # By name, since another number of experts may be another "auto".
    settings = dataclasses.replace(
        hub.settings, aggregator=KINDS[type(inner)], experts=str(len(hub.models) - newcomers)
    )
    with replacing_folder(folder) as new:
        write_hub(new, hub.shelf, hub.models, settings, newcomers)
        best = new / BEST
        best.mkdir()
        write_model(best, hub.model, model_config(hub.model), hub.model.origin.labels)
