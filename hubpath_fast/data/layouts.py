"""Where the images of a split are and what class each has: folders of classes, and list files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .later import image_folder

IN_MESSAGE = 5  # that many examples, then a count

# path, quoted or not, then the class, quoted or not, as the last word
LIST_LINE = re.compile(
    r"""\s*(?:"(?P<double>[^"]+)"|'(?P<single>[^']+)'|(?P<bare>\S.*?))"""
    r"""\s+(?:"(?P<quoted>[^"]+)"|(?P<label>[^\s"]+))\s*"""
)


class DataError(ValueError):
    """Data that cannot be trained or tested on as they are."""


@dataclass(frozen=True)
class LabelledFiles:
    """The images of one split by class name, in a fixed order.

    source: the folder or list file, for messages. paths and labels: equally long. classes: all that
    the split names, in order; a class may have no image.
    """

    source: Path
    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    classes: tuple[str, ...]


def is_image(path: Path) -> bool:
    return path.suffix.lower() in image_folder.IMG_EXTENSIONS and not path.name.startswith(".")


def class_folders(folder: Path) -> list[Path]:
    """The folders in ``folder`` that may be classes: all but hidden ones, by name."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def read_folder(folder: Path) -> LabelledFiles:
    """ImageFolder's layout: a folder a class, named like it, images at any depth below."""
    paths, labels, classes = [], [], class_folders(folder)
    for class_folder in classes:
        images = sorted(path for path in class_folder.rglob("*") if is_image(path))
        paths += images
        labels += [class_folder.name] * len(images)
    names = tuple(path.name for path in classes)
    if not paths:
        loose = any(is_image(path) for path in folder.iterdir())
        raise DataError(
            f"{folder} holds no images in folders of classes"
            + (" (only images outside of them, whose class is unknown)" if loose else "")
            + f"; expected {folder}/CLASS/IMAGE with images ending in "
            + ", ".join(image_folder.IMG_EXTENSIONS)
        )
    return LabelledFiles(folder, tuple(paths), tuple(labels), names)


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
