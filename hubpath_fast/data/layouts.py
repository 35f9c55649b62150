"""The images of a split and what class each has, and how folders of classes are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..written import find_written
from .kinds import is_image
from .names import one_form
from .walk import LITTER, Leftovers, Skipped, list_folder, walk
from .walk import DataError as DataError  # where others look for it

IN_MESSAGE = 5  # that many examples, then a count
COMMON_ENDINGS = ".jpg, .png, .webp, .tif, .bmp or another that Pillow reads"


@dataclass(frozen=True)
class Problem:
    """What a run refuses. short: what it is. rest: what it means and what to do, which follows in
    an error. example: what a list of all problems adds to ``short``."""

    short: str
    rest: str = ""
    example: str | Path = ""

    def __str__(self) -> str:
        return self.short + self.rest

    def listed(self) -> str:
        return f"{self.short}: {self.example}" if self.example else self.short


@dataclass(frozen=True)
class LabelledFiles:
    """The images of one split by class name, in a fixed order.

    source: the folder or list file, for messages. paths and labels: equally long. classes: all that
    the split names, in order, as NFC; a class may have no image. skipped: what lies there and was
    left out, by reason. problems: for which a run refuses it.
    """

    source: Path
    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    classes: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()
    problems: tuple[Problem, ...] = ()


def read_folder(folder: Path) -> LabelledFiles:
    """ImageFolder's layout: a folder a class, named like it, images at any depth below.

    Folders whose names differ in their Unicode form only are one class.
    """
    leftovers = Leftovers()
    entries = list_folder(folder, leftovers, root=True)
    images: dict[str, list[Path]] = {}
    for class_folder in entries.folders:
        inside = Leftovers()
        found = walk(class_folder, inside)
        leftovers.merge(inside.all())
        if found or not inside.no_class():
            images.setdefault(one_form(class_folder.name), []).extend(found)
    for path in entries.files:
        if is_image(path):
            leftovers.add("images beside the folders of classes", path)
        else:
            leftovers.add("other files beside the folders of classes", path, LITTER)
    classes = tuple(sorted(images))
    problems = []
    if not any(images.values()):
        problems.append(_no_images(folder, entries.files, leftovers))
    return LabelledFiles(
        folder,
        tuple(path for name in classes for path in images[name]),
        tuple(name for name in classes for _ in images[name]),
        classes,
        leftovers.all(),
        tuple(problems),
    )


def _no_images(folder: Path, files: list[Path], leftovers: Leftovers) -> Problem:
    loose = any(is_image(path) for path in files)
    found = [skipped.shown() for skipped in leftovers.all()]
    return Problem(
        f"{named(folder)} holds no images in folders of classes"
        + (" (only images outside of them, whose class is unknown)" if loose else ""),
        (f"; found {', '.join(found[:IN_MESSAGE])}" if found else "")
        + f"; expected {folder}/CLASS/IMAGE with images ending in {COMMON_ENDINGS}",
    )


def named(folder: Path) -> str:
    """With what it is, where ``hubpath`` wrote it and it was taken for data."""
    written = find_written(folder)
    return str(folder) if written is None else f"{folder} ({written.what})"


def examples(things: Sequence, count: int | None = None) -> str:
    """The first few, and how many more there are. count: of all, where not all are given."""
    shown = ", ".join(map(str, things[:IN_MESSAGE]))
    rest = (len(things) if count is None else count) - IN_MESSAGE
    return shown if rest <= 0 else f"{shown} and {rest} more"
