"""Other images of the classes that a run knows, to be scored: all that is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .decode import verify_images
from .folder import SPLIT_FOLDERS, find_splits, left_out
from .kinds import is_image
from .layouts import DataError, LabelledFiles, examples, read_folder
from .lists import read_list
from .names import one_form
from .splits import ImageSplit
from .walk import Leftovers, list_folder


@dataclass(frozen=True)
class OtherImages:
    """images: with targets among the run's classes. name: "test", "validation", "train" or "all".
    notes: what was scored, and what was not."""

    images: ImageSplit
    name: str
    notes: tuple[str, ...]


def read_other(place: Path, classes: Sequence[str]) -> OtherImages:
    """What of ``place`` is scored: its test split; else its validation split; else all of it.

    place: a folder as ``open_images`` takes it, of which train may be missing, or a list file.
    classes: that may be there; names count as equal in any Unicode form. Not all need be there.

    Raises DataError if there are no images in folders of classes, or of a class that is not among
    ``classes``, or broken ones among those that are scored.
    """
    found = _find(place, classes)
    name = next(split for split in ("test", "validation", "train") if split in found)
    files = found[name]
    number = {one_form(label): i for i, label in enumerate(classes)}
    _check_known(files, number, classes)
    verify_images(files.paths)
    images = ImageSplit(files.paths, tuple(number[one_form(label)] for label in files.labels))
    whole = files.source == place
    notes = [f"scored the {len(images)} images of {files.source}"]
    if name == "train":
        notes[0] += " (no splits there: all of them)" if whole else " (no test or validation there)"
    present = sorted(set(images.targets))
    if len(present) < len(classes):
        names = examples([classes[i] for i in present])
        notes.append(f"{len(present)} of the run's {len(classes)} classes are there: {names}")
    notes += left_out({name: files}, place)
    return OtherImages(images, "all" if name == "train" and whole else name, tuple(notes))


def _find(place: Path, classes: Sequence[str]) -> dict[str, LabelledFiles]:
    if place.is_file() and place.suffix.lower() == ".txt":
        return {"train": read_list(place)}
    if place.is_dir():
        # A run may know trains: then train/ with images in it is a class like the others.
        named = [place / name for name in SPLIT_FOLDERS if name in classes]
        if any(folder.is_dir() and _loose(folder) for folder in named):
            return {"train": read_folder(place)}
    try:
        return find_splits(place, require_train=False)
    except DataError:
        if place.is_dir() and (loose := _loose(place)):
            raise DataError(
                f"{place} holds {loose} images outside of folders of classes: without their "
                f"classes nothing can be scored; expected {place}/CLASS/IMAGE. What the run takes "
                "them for is said by `hubpath predict`"
            ) from None
        raise


def _check_known(files: LabelledFiles, number: dict[str, int], classes: Sequence[str]) -> None:
    unknown = sorted({label for label in files.labels if one_form(label) not in number})
    if not unknown:
        return
    hint = "rename or remove them"
    inside = [files.source / label for label in unknown]
    inside = [
        folder
        for folder in inside
        if any(one_form(below.name) in number for below in _folders(folder))
    ]
    if inside:
        hint = f"or did you mean {examples(inside)}, where folders of known classes are?"
    raise DataError(
        f"{files.source} has images of class {examples(unknown)}, which the run does not know. Its "
        f"classes: {examples(classes)}; {hint}"
    )


def _loose(folder: Path) -> int:
    return sum(is_image(path) and path.is_file() for path in folder.iterdir())


def _folders(folder: Path) -> list[Path]:
    entries = list_folder(folder, Leftovers()) if folder.is_dir() else None
    return [] if entries is None else entries.folders
