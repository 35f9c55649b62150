"""The data sets of the paper by name: opened from a folder, with their published splits.

Nothing is downloaded here. A set that is not there, or lies otherwise than its source lays it out,
is a DataError that shows both as trees and says where to get it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ..fields import there_are
from .decode import verify_images
from .digits import CLASSES, DigitsTask
from .folder import open_images
from .layouts import DataError, examples
from .lists import check_missing
from .sources import PUBLISHED, PublishedSet
from .splits import ArraySplit, ImageSplit, ImageSplits, Split, assemble, check_share

FOLDER, DIGITS = "folder", "digits"
FACES = ("300w", "wflw", "cofw")  # of landmarks; see tasks/landmarks
DATASETS = (*PUBLISHED, FOLDER, DIGITS, *FACES)
DIGITS_SHARE = 0.2  # of the 300 target digits: the 60 that the demo holds out too

# As users may write a name, without hyphens.
SPELLINGS = {name.replace("-", ""): name for name in DATASETS} | {
    "cifar": "cifar-100",
    "coco": "coco-70",
    "fgvcaircraft": "aircraft",
    "stanfordcars": "cars",
    "mitindoors": "indoors",
    "mit67": "indoors",
    "imagefolder": FOLDER,
    "list": FOLDER,
}


def plain_name(name: str) -> str:
    """As ``SPELLINGS`` has it."""
    return name.strip().lower().replace("_", "").replace("-", "")


def find_dataset(name: str) -> str:
    """The name in ``DATASETS`` that is meant; ValueError with the closest ones if there is none."""
    plain = plain_name(name)
    if plain in SPELLINGS:
        return SPELLINGS[plain]
    raise ValueError(f"dataset {name!r} is unknown; {there_are(DATASETS, plain, SPELLINGS)}")


def open_dataset(
    name: str,
    root: str | Path | None = None,
    validation: float = 0.15,
    seed: int = 0,
    verify: bool = True,
) -> ImageSplits:
    """Opens a data set by name (``DATASETS``, and other spellings of them).

    root: the folder that holds it; for "folder", which is ``open_images``, a user's own.
    validation: the share of train, class by class, that is held out where the set has no validation
    split of its own, drawn by ``seed``; 0: nothing. verify: open every file once, to find broken
    ones.

    "digits" needs no root: it is ``DigitsTask(seed)``, with a fifth of its target digits held out
    unless validation is 0.

    Raises ValueError for an unknown name; DataError for a set that is missing, laid out otherwise
    or broken.
    """
    name = find_dataset(name)
    check_share(validation)
    if name in FACES:
        raise ValueError(
            f"dataset {name!r} has landmarks and no classes; use `hubpath landmarks fit --dataset "
            f"{name}`"
        )
    if name == DIGITS:
        return _digits(seed, validation)
    if root is None:
        raise ValueError(f"dataset {name!r} lies in a folder, and none is given; say which")
    if name == FOLDER:
        return open_images(root, validation, seed, verify)
    published = PUBLISHED[name]
    classes, splits = published.open(Path(root))
    _check(published, Path(root), classes, splits, verify)
    hint = "hold out nothing (--validation 0)"
    where = f"{published.title} ({root})"
    opened = assemble(classes, splits, where, validation, seed, hint)
    notes = [published.note] if published.note else []
    different = {
        split: len(part)
        for split, part in splits.items()
        if len(part) != published.counts.get(split)
    }
    if different:
        found = ", ".join(f"{count} {split}" for split, count in different.items())
        wanted = ", ".join(f"{published.counts.get(split, 0):,} {split}" for split in different)
        notes.append(
            f"{where} has {found} images, where {wanted} are published: figures do not compare"
        )
    return dataclasses.replace(opened, notes=(*opened.notes, *notes))


def _check(
    published: PublishedSet,
    root: Path,
    classes: tuple[str, ...],
    splits: dict[str, Split],
    verify: bool,
) -> None:
    """Raises DataError for what would spoil a run; ``hubpath data check`` says more."""
    files = [split for split in splits.values() if isinstance(split, ImageSplit)]
    paths = [path for split in files for path in split.paths]
    check_missing(root, paths)
    for name, split in splits.items():
        absent = sorted(set(range(len(classes))) - set(split.targets))
        if absent and name != "validation":
            names = [classes[target] for target in absent]
            raise DataError(
                f"{published.title} in {root} has no {name} images of {len(absent)} of its "
                f"{len(classes)} classes: {examples(names)}; `hubpath data check "
                f"{published.name} --root {root}` says what is missing"
            )
    if verify:
        verify_images(paths)


def _digits(seed: int, validation: float) -> ImageSplits:
    task = DigitsTask(seed, round(300 * DIGITS_SHARE) if validation else 0)
    parts = {"train": task.target, "test": task.test}
    if validation:
        parts["validation"] = task.validation
    splits = {
        name: ArraySplit(
            np.ascontiguousarray(part.images.permute(0, 2, 3, 1).numpy()),
            tuple(part.targets.tolist()),
        )
        for name, part in parts.items()
    }
    return assemble(CLASSES, splits, "the digits", validation, seed, "hold out nothing")
