"""The data of a run, opened by the list that it keeps of its images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.kept import FileList, data_base, relative, sizes
from ..model import FixedRoutes
from .config import FitConfig
from .folder import Run, RunFolder
from .kinds import kind_of


@dataclass(frozen=True)
class RunData:
    """splits: of a run. kept: whether the run's own list made them."""

    splits: Any
    kept: bool

    def files(self, config: FitConfig, shared: bool = False) -> FileList | None:
        """Their list. shared: before anything is held out by a seed."""
        distinct = {s: part for s, part in self.splits.distinct.items() if len(part)}
        parts = self.splits.parts if shared else distinct
        return kind_of(config).files(parts, self.splits, config)


def open_to_train(
    config: FitConfig,
    folder: RunFolder,
    resume: bool = False,
    shared: Path | None = None,
    start: FileList | None = None,
) -> RunData:
    """What a run trains on: if it goes on, what it began with.

    shared: the list of the images that a new run draws from, if it is there. start: that of what a
    new run starts with, which goes before: none of its held-out images are trained on.

    Raises DataError if images that the run began with are gone or others now.
    """
    kept = folder.kept_files(config) if resume else None
    listed, kind = start if kept is None else kept, kind_of(config)
    if listed is None and shared is not None and shared.is_file():
        listed = FileList.read(shared)
    if listed is None:
        return RunData(kind.open(config, config.data), False)
    return RunData(kind.reopen(listed, config, config.data), kept is not None)


def open_to_score(folder: RunFolder, config: FitConfig, root: str | Path | None = None) -> Any:
    """The data of a run, to score its test split, of which alone broken images are looked for.

    root: where the data lies now. Raises DataError if images of that split are gone or others.
    """
    root = config.data if root is None else root
    kept, kind = folder.kept_files(config), kind_of(config)
    if kept is not None:
        return kind.reopen(kept, config, root, scored=True)
    return kind.open(config, root, scored=True)


def open_held_out(
    opened: Run, run: str | Path, root: str | Path | None, chosen: str
) -> tuple[Any, Any | None]:
    """The validation and the test split of a run, to choose something of its hub on the first; no
    test split where there are no test images of their own.

    run: as it was opened by. root: where the data lies now. chosen: what is done on validation
    images, for a message, such as "a policy is chosen".

    Raises ValueError: a saved hub, fixed routes, no validation images, or data that is not what it
    was.
    """
    if opened.folder is None:
        raise ValueError(
            f"{run} is a saved hub, which has no data of its own; give the run that it comes from"
        )
    if isinstance(opened.model.generator, FixedRoutes):
        raise ValueError(
            f"{run} keeps the same experts for every image in place of its router, so there is "
            "nothing to choose; fit it again without --fallback fixed"
        )
    splits = open_to_score(opened.folder, opened.config, root)
    task = kind_of(opened.config).make_task(opened.config, splits)
    opened.task.check_same(task, root or opened.config.data)
    if not len(splits.validation):
        raise ValueError(
            f"{run} holds out no validation images, on which {chosen}; fit it again with "
            "--validation 0.1"
        )
    own_test = len(splits.test) and not splits.test_is_validation
    return splits.validation, splits.test if own_test else None


def note_if_trained_on(
    folder: RunFolder, config: FitConfig, paths: Sequence[Path], place: Path
) -> str | None:
    """What to say of images, given as others, that the run was trained on.

    They are known by their place; or, if the run's data lies elsewhere now, by name and size, where
    most of what the run was trained on is there: single files may be as large by chance.
    """
    kept = folder.kept_files(config)
    if kept is None:
        return None
    here = place if place.is_dir() else place.parent
    names, real = relative(paths, here), os.path.realpath(here)
    own = os.path.realpath(data_base(config.dataset, config.data))
    trained = {os.path.normpath(os.path.join(own, row.path)) for row in kept.rows["train"]}
    count = sum(os.path.normpath(os.path.join(real, name)) in trained for name in names)
    if not count:
        alike = {(row.path, row.size) for row in kept.rows["train"]}
        alike &= set(zip(names, sizes(paths), strict=True))
        count = len(alike) if 2 * len(alike) > len(trained) else 0
    if not count:
        return None
    return (
        f"{count} of them are images that the run was trained on, and so count for little; "
        f"`hubpath evaluate {folder.path}`, with --data-root if its data was moved, scores what it "
        "held out"
    )
