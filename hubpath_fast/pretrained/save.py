"""A model written for others to open."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints import (
    CONFIG_FILE,
    INDEX_FILE,
    ROUTER_FILE,
    STATE_FILE,
    load_config,
    replacing_folder,
    write_model,
)
from ..model import HubPathway, Origin
from ..model.inference import SAVING
from ..model.saving import model_config
from ..resting import bring_home, leave_folder
from .saved import is_saved_hub
from .slim import find_references

CLASSIFICATION = "classification"
OWN = {CONFIG_FILE, INDEX_FILE, ROUTER_FILE, "experts"}  # what the format has in a folder


def save_model(
    model: HubPathway,
    folder: Path,
    classes: Sequence[str] | None = None,
    slim: bool = False,
    more: Mapping[str, Any] | None = None,
    card: str | None = None,
    result: Mapping[str, Any] | None = None,
    licenses: Mapping[int | str, str] | None = None,
) -> None:
    """See ``HubPathway.save_pretrained``. more: further entries of ``config.json``. card: what the
    model card calls the model, and opens it as; None: it gets no card. result, licenses: of the
    card, see ``card.write_card``."""
    if model.frozen is not None:
        raise ValueError(SAVING)
    check_free(folder)
    model.origin = with_classes(model, classes)
    config = {**model_config(model), **(more or {})}
    references = {}
    if slim:
        from ..runs.saved import head_task  # imports what reads images, which others need not

        references = find_references(model, head_task(config["model"]))
    bring_home(model.parameters())
    leave_folder(model.parameters(), folder)
    with replacing_folder(folder) as new:
        write_model(new, model, config, model.origin.labels, references=references)
        if card is not None:
            from .card import write_card  # imports what reads images, and templates

            write_card(new, load_config(new), result, licenses, name=card)
        keep_others(folder, new)


def keep_others(folder: Path, new: Path) -> None:
    """Puts what a saved hub's folder holds besides the hub, such as notes of one's own or a
    repository's .git, into the one that takes its place."""
    if not folder.is_dir():
        return
    for item in folder.iterdir():
        if item.name in OWN or (new / item.name).exists():
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, new / item.name, symlinks=True)
        else:
            shutil.copy2(item, new / item.name, follow_symlinks=False)


def check_free(folder: Path) -> None:
    """Raises ValueError for a folder that holds something else than a saved hub."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: expected a folder, got the file {folder}")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if (folder / STATE_FILE).is_file():
        raise ValueError(
            f"folder: {folder} is a checkpoint that its run goes on from, and would be replaced; "
            "give another"
        )
    if not is_saved_hub(folder):
        raise ValueError(
            f"folder: {folder} is not empty and holds no saved hub, which would be replaced; give "
            "another"
        )


def with_classes(model: HubPathway, classes: Sequence[str] | None) -> Origin:
    """The model's origin with the names of its outputs; ValueError for as many as it does not have,
    or one twice."""
    origin = model.origin
    if classes is None:
        return origin
    names = list(classes)
    if isinstance(classes, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"classes: expected a list of names, got {classes!r}")
    if model.num_outputs is not None and len(names) != model.num_outputs:
        raise ValueError(
            f"classes: expected {model.num_outputs} names, one for each output, got {len(names)}"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"classes: {twice!r} occurs twice; give each output a name of its own")
    task = origin.task or {"name": CLASSIFICATION}
    if task.get("name") != CLASSIFICATION:
        raise ValueError(f"classes: the model learned {task['name']}, which have none; leave them")
    return dataclasses.replace(origin, task={**task, "classes": names})
