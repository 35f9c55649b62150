"""Where the images of a split are and what class each has: folders of classes, and list files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .kinds import is_image
from .names import one_form
from .walk import LITTER, DataError, Leftovers, Skipped, list_folder, walk

IN_MESSAGE = 5  # that many examples, then a count
COMMON_ENDINGS = ".jpg, .png, .webp, .tif, .bmp or another that Pillow reads"

# path, quoted or not, then the class, quoted or not, as the last word
LIST_LINE = re.compile(
    r"""\s*(?:"(?P<double>[^"]+)"|'(?P<single>[^']+)'|(?P<bare>\S.*?))"""
    r"""\s+(?:"(?P<quoted>[^"]+)"|(?P<label>[^\s"]+))\s*"""
)


@dataclass(frozen=True)
class LabelledFiles:
    """The images of one split by class name, in a fixed order.

    source: the folder or list file, for messages. paths and labels: equally long. classes: all that
    the split names, in order, as NFC; a class may have no image. skipped: what lies there and was
    left out, by reason.
    """

    source: Path
    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    classes: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()


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
    if not any(images.values()):
        raise DataError(_no_images(folder, entries.files, leftovers))
    return LabelledFiles(
        folder,
        tuple(path for name in classes for path in images[name]),
        tuple(name for name in classes for _ in images[name]),
        classes,
        leftovers.all(),
    )


def _no_images(folder: Path, files: list[Path], leftovers: Leftovers) -> str:
    loose = any(is_image(path) for path in files)
    found = [f"{skipped} ({skipped.example})" for skipped in leftovers.all()]
    return (
        f"{folder} holds no images in folders of classes"
        + (" (only images outside of them, whose class is unknown)" if loose else "")
        + (f"; found {', '.join(found[:IN_MESSAGE])}" if found else "")
        + f"; expected {folder}/CLASS/IMAGE with images ending in {COMMON_ENDINGS}"
    )


def read_list(file: Path, check: bool = True) -> LabelledFiles:
    """A list file: a line an image, ``path class``, with paths relative to the file's folder.

    The class is the last word. A path may hold spaces; it, and the class, may stand in quotes. If
    all classes are whole numbers they are counted from 0 without gaps; else they are names, sorted.
    check: raise DataError if an image does not exist.
    """
    paths, labels = [], []
    if not file.is_file():
        raise DataError(f"there is no list file {file}; expected one with lines of: path class")
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = LIST_LINE.fullmatch(line)
        if match is None:
            raise DataError(
                f"{file}, line {number}: expected a path and a class, separated by a space, "
                f"but found {line.strip()!r}"
            )
        path = match["double"] or match["single"] or match["bare"]
        paths.append(file.parent / path)
        labels.append(match["quoted"] or match["label"])
    if not paths:
        raise DataError(f"{file} names no images; expected lines of: path class")
    if check:
        check_missing(file, paths)
    labels = [one_form(label) for label in labels]
    return LabelledFiles(file, tuple(paths), *_list_classes(file, labels))


def check_missing(source: Path, paths: Sequence[Path]) -> None:
    """Raises DataError if images that ``source`` names do not exist."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{source} names {len(missing)} of {len(paths)} images that do not exist (paths are "
            f"taken relative to the list file): {examples(missing)}"
        )


def _list_classes(file: Path, labels: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(labels, classes), with numbers written alike: "07" is class "7"."""
    if not all(re.fullmatch("[0-9]+", label) for label in labels):
        return tuple(labels), tuple(sorted(set(labels)))
    numbers = [int(label) for label in labels]
    return tuple(map(str, numbers)), tuple(map(str, sorted(set(numbers))))


def check_gaps(files: LabelledFiles) -> None:
    """Raises DataError if the classes are numbers but not 0, 1, ... without gaps."""
    if not all(name.isdecimal() for name in files.classes):
        return
    numbers = {int(name) for name in files.classes}
    gaps = sorted(set(range(max(numbers) + 1)) - numbers)
    if gaps:
        hint = "subtract 1 from every class" if gaps == [0] else "renumber, or use names"
        raise DataError(
            f"{files.source} has numbered classes up to {max(numbers)} but no image of class "
            f"{examples(gaps)}; classes are counted from 0 without gaps: {hint}"
        )


def examples(things) -> str:
    """The first few, and how many more."""
    shown = ", ".join(map(str, things[:IN_MESSAGE]))
    rest = len(things) - IN_MESSAGE
    return shown if rest <= 0 else f"{shown} and {rest} more"
