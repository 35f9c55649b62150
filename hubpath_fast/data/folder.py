"""A user's own images: finds the splits below a folder, checks them, and holds out validation.

Everything that would spoil a long run, or its figures, is an error before training: broken images,
a single class, and a test set with other classes than training has.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .decode import verify_images
from .kinds import is_image
from .layouts import (
    DataError,
    LabelledFiles,
    check_gaps,
    examples,
    read_folder,
    read_list,
)
from .splits import ImageSplit, ImageSplits, assemble, check_share
from .walk import Entries, Leftovers, list_folder, said

SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("val", "valid", "validation"),
    "test": ("test",),
}


def open_images(
    root: str | Path, validation: float = 0.15, seed: int = 0, verify: bool = True
) -> ImageSplits:
    """Finds the images below ``root``, in the first layout of these that is there:

    1. list files ``train.txt`` and optionally ``val.txt``, ``test.txt``: lines of ``path class``;
    2. folders ``train/CLASS/IMAGE`` and optionally ``val/`` and ``test/`` alike;
    3. ``CLASS/IMAGE``: one set, without splits.

    validation: the share of train, class by class, that is held out where there is no val; drawn by
    ``seed``; 0: hold out nothing. Without test, validation stands in for it. verify: open every
    image once, to find broken ones.

    Raises DataError if the folder or images are missing, an image is broken, there is a single
    class, numbered classes have gaps, val has a class that train has not, or test and train differ
    in their classes.
    """
    root = Path(root)
    check_share(validation)
    found = find_splits(root)
    train = found["train"]
    if train.source.is_file():
        check_gaps(train)
    _check_classes(found)
    if verify:
        verify_images([path for files in found.values() for path in files.paths])

    number = {name: i for i, name in enumerate(train.classes)}
    splits = {
        split: ImageSplit(files.paths, tuple(number[label] for label in files.labels))
        for split, files in found.items()
    }
    hint = f"give {root}/val"
    made = assemble(train.classes, splits, root, validation, seed, hint)
    return replace(made, notes=(*made.notes, *left_out(found, root)))


def left_out(found: dict[str, LabelledFiles], root: str | Path) -> tuple[str, ...]:
    """A note on what all splits left out, if there is something to say."""
    leftovers = Leftovers()
    for files in found.values():
        leftovers.merge(files.skipped)
    note = said(leftovers.all(), Path(root))
    return () if note is None else (note,)


def find_splits(root: str | Path, require_train: bool = True) -> dict[str, LabelledFiles]:
    """The splits below ``root`` that exist, by name: "train", "validation", "test"; in the first
    of ``open_images``' layouts that is there. Folders of classes without splits are "train".

    require_train: a set without train is an error; False: of val/ and test/, one is enough.

    Raises DataError if there are no images, or images that a list names are missing.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is a file" if root.is_file() else "does not exist"
        raise DataError(f"the data folder {root} {what}; expected {_layouts(root)}")
    leftovers = Leftovers()
    entries = list_folder(root, leftovers, root=True)
    for ending, there, read in (
        (".txt", entries.files, read_list),
        ("", entries.folders, read_folder),
    ):
        places = _places(root, ending, there)
        if "train" in places or (places and not require_train):
            found = {split: read(place) for split, place in places.items()}
            if not ending:
                _note_neighbours(found, entries, leftovers)
            return found
        if places:
            [place, *_] = places.values()
            raise DataError(
                f"{root} has {place.name} but no train{ending}; expected {_layouts(root)}"
            )
    if not entries.folders:
        raise DataError(f"{root} holds no images; expected {_layouts(root)}")
    return {"train": read_folder(root)}


def _places(root: Path, ending: str, there: list[Path]) -> dict[str, Path]:
    """The files or folders of splits, by split."""
    places = {}
    for split, names in SPLIT_NAMES.items():
        known = [place for name in names if (place := root / f"{name}{ending}") in there]
        if known:
            places[split] = known[0]
    return places


def _note_neighbours(
    found: dict[str, LabelledFiles], entries: Entries, leftovers: Leftovers
) -> None:
    """Counts what lies beside train/, val/ and test/ with what the first of them left out."""
    [first, *_] = found
    for path in set(entries.folders) - {files.source for files in found.values()}:
        leftovers.add(f"folders beside {found[first].source.name}/", path)
    for path in filter(is_image, entries.files):
        leftovers.add(f"images beside {found[first].source.name}/", path)
    leftovers.merge(found[first].skipped)
    found[first] = replace(found[first], skipped=leftovers.all())


def _layouts(root: Path) -> str:
    return (
        f"{root}/train/CLASS/IMAGE (and optionally val/ and test/ alike), {root}/CLASS/IMAGE, or "
        f"{root}/train.txt with lines of: path class (and optionally val.txt and test.txt)"
    )


def _check_classes(found: dict[str, LabelledFiles]) -> None:
    train = found["train"]
    empty = sorted(set(train.classes) - set(train.labels))
    if empty:
        raise DataError(
            f"{train.source} has no images of class {examples(empty)}; "
            "add some, or remove the class"
        )
    if len(train.classes) < 2:
        raise DataError(
            f"{train.source} has the one class {train.classes[0]!r}; there is nothing to tell "
            "apart. Expected a folder (or, in a list file, a last word) for each class"
        )
    for split in ("validation", "test"):
        if split not in found:
            continue
        files = found[split]
        unknown = sorted(set(files.labels) - set(train.classes))
        if unknown:
            raise DataError(
                f"{files.source} has images of class {examples(unknown)}, which {train.source} "
                "has not: no model trained on it could name them. Its classes: "
                + examples(train.classes)
            )
        absent = sorted(set(train.classes) - set(files.labels))
        if split == "test" and absent:
            raise DataError(
                f"{files.source} has no images of {len(absent)} of the {len(train.classes)} "
                f"classes of {train.source}: {examples(absent)}. Accuracy over fewer classes is "
                "not that of the task; add images of these classes, or remove them from train"
            )
