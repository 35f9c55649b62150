"""``hubpath shelf add``: one more model joins a routed hub of a shelf.

Its features are computed as those of the others were, unless they are there; then its head and its
score are fitted (``shelf.add``). The hub stays as it is, and a larger one is written beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from ..features.wanted import read_names
from ..files import write_json
from ..model.newcomers import check_extendable
from ..runs.places import check_apart
from ..shelf.add import STEPS, add_model, check_new
from ..shelf.run import ShelfHub, has_hub
from ..shelf.save import check_free, open_hub_of, save_hub, saved_labels
from .add import ADD
from .shelf_extract import extract_shelf


def add(
    shelf: str | Path,
    name: str,
    hub: str | Path | None = None,
    out: str | Path | None = None,
    steps: int = STEPS,
    device: str = "cpu",
    console: Console | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Adds a model to a shelf, if it is not there, and to its routed hub.

    Args:
        shelf: the folder of a shelf.
        name: of a model as ``hubpath shelf extract`` takes it, or the label of one of the shelf.
        hub: of a hub of ``hubpath shelf fit``; None: SHELF/hub.
        out: the folder of the larger hub; None: beside ``hub``, "HUB+LABEL".
        steps: of the fit of the score.
        device: that features are computed on.
        console: where the progress of that is shown; None: nowhere.
        tell: is told what is being done.

    Returns what ``add.json`` in ``out`` holds: "expert"; "head_accuracy", of its head alone,
    cross-validated on training images; "groups", with images, accuracy before and after and share,
    the part of them that the newcomer gets; "fit_images", "choose_images", "loss", "steps",
    "seconds"; "unchanged": of the images that it does not get, how many there are and the largest
    change of a probability; and "hub", the folder of the larger hub.

    Raises:
        ValueError: no shelf or no hub of it, or one that cannot be extended; a name that is
            unknown, in the hub already or of several models; as of ``extract_shelf`` and
            ``shelf.add.add_model``; a folder ``out`` of something else.
    """
    if steps < 1:
        raise ValueError(f"steps: expected an integer of at least 1, got {steps}")
    opened = open_hub_of(shelf, hub)
    check_extendable(opened.model)
    if out is not None:
        check_free(Path(out))
        check_apart(out, opened.shelf.record.dataset, opened.shelf.record.data)
    opened, index = _on_the_shelf(opened, name, device, console)
    label = opened.shelf.models[index].label
    check_new(opened, index)
    beside = f"{opened.folder.name}+{re.sub(r'[^A-Za-z0-9_.-]+', '-', label)}"
    folder = opened.folder.with_name(beside) if out is None else Path(out)
    check_free(folder)
    if out is None and has_hub(folder):
        _check_same(folder, (*opened.labels, label))
    result, larger = add_model(opened, index, steps, opened.settings.trainer.seed, tell)
    save_hub(larger, folder)
    result = {**result, "hub": str(folder)}
    write_json(folder / ADD, result)
    return result


def _check_same(folder: Path, labels: tuple[str, ...]) -> None:
    """Raises ValueError unless the hub in a folder is of these experts: labels that are not alike
    may be so in the name of a folder."""
    if (there := saved_labels(folder)) != labels:
        raise ValueError(
            f"out: {folder} is a hub with {there[-1]} as its last expert, not {labels[-1]}, and "
            "would be replaced; give a folder with --out"
        )


def _on_the_shelf(
    hub: ShelfHub, name: str, device: str, console: Console | None
) -> tuple[ShelfHub, int]:
    """The hub with the model's number on its shelf, whose features are computed if need be."""
    shelf = hub.shelf
    if name in shelf.labels or not shelf.record.dataset:
        return hub, shelf.find(name)
    if len(wanted := read_names([name], shelf.record.pretrained)) != 1:
        raise ValueError(f"name: expected a single model, got {name!r}, which is {len(wanted)}")
    done = extract_shelf(shelf.folder, [name], device=device, console=console)
    if done.failed:
        raise ValueError(f"name: {done.failed[0][0]}: {done.failed[0][1]}")
    [label] = (*done.there, *done.computed)
    hub = open_hub_of(shelf.folder, hub.folder)  # models may have other numbers now
    return hub, hub.shelf.find(label)
