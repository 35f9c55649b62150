"""List files: a line an image, ``path class``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from .layouts import IN_MESSAGE, LabelledFiles, Problem, examples
from .names import FileFinder, is_gone, one_form
from .text import Text, read_text
from .walk import DataError

# path, quoted or not, then the class, quoted or not, as the last word
LIST_LINE = re.compile(
    r"""\s*(?:"(?P<double>[^"]+)"|'(?P<single>[^']+)'|(?P<bare>\S.*?))"""
    r"""\s+(?:"(?P<quoted>[^"]+)"|(?P<label>[^\s"]+))\s*"""
)
QUOTES = re.compile(r"""(["']).+\1""")
NO_COMMAS = "commas do not separate, write a space or a tab"
HEADER = re.compile(
    r"""["']?(image|img|path|file|filename|file_?path|name|id)s?(_?(path|name|id|file))?["']?""",
    re.IGNORECASE,
)


class Row(NamedTuple):
    """A line: its number, counted from 1, and the image's path and class, as they are written."""

    number: int
    path: str
    label: str


def read_list(file: Path, check: bool = True) -> LabelledFiles:
    """A list file: a line an image, ``path class``, with paths relative to the file's folder.

    The class is the last word, or what follows the last tab. A path may hold spaces; it, and the
    class, may stand in quotes. If all classes are whole numbers they are counted from 0 without
    gaps; else they are names, sorted. check: look for the images, in either Unicode form.

    Raises DataError for whatever ``scan_list`` finds wrong.
    """
    files = scan_list(file, check)
    if files.problems:
        raise DataError(str(files.problems[0]))
    return files


def scan_list(file: Path, check: bool = True) -> LabelledFiles:
    """``read_list`` of the lines that are right; what is wrong with the others: ``problems``."""
    if not file.is_file():
        raise DataError(f"there is no list file {file}; expected one with lines of: path class")
    text = read_text(file)
    rows, problems = _rows(text)
    if not rows and not problems:
        problems = [Problem(f"{file} names no images", "; expected lines of: path class")]
    rows, unlabelled = _labelled(file, rows)
    problems += unlabelled
    if check:
        finder = FileFinder()
        found = [finder.find(file.parent / os.path.expanduser(row.path)) for row in rows]
        there = [not is_gone(path) for path in found]
        gone = [path for path, here in zip(found, there, strict=True) if not here]
        if text.guessed:
            _check_guess(text, rows, there)
        if gone:
            missing = [row for row, here in zip(rows, there, strict=True) if not here]
            problems.append(missing_problem(file, gone, len(rows), _why_missing(file, missing)))
        rows = [row for row, here in zip(rows, there, strict=True) if here]
        paths = [path for path, here in zip(found, there, strict=True) if here]
    else:
        paths = [file.parent / row.path for row in rows]
        if text.guessed:
            _check_guess(text, rows, [not is_gone(path) for path in paths])
    labels, classes = _list_classes([one_form(row.label) for row in rows])
    return LabelledFiles(file, tuple(paths), labels, classes, problems=tuple(problems))


def _rows(text: Text) -> tuple[list[Row], list[Problem]]:
    rows, wrong = [], []
    for number, line in enumerate(text.lines, start=1):
        if not line.strip():
            continue
        parts = _parse(line.strip())
        if parts is None:
            wrong.append((number, line.strip()))
        else:
            rows.append(Row(number, *parts))
    if not wrong:
        return rows, []
    number, line = wrong[0]
    more = f" (and {len(wrong) - 1} more lines)" if len(wrong) > 1 else ""
    comma = f"; {NO_COMMAS}" if "," in line or ";" in line else ""
    return rows, [
        Problem(
            f"{text.file}, line {number}: expected a path and a class, separated by a space, "
            f"but found {line!r}{more}",
            comma,
        )
    ]


def _parse(line: str) -> tuple[str, str] | None:
    """(path, class) of a line without blanks around it; None if it has no two words."""
    if "\t" in line:
        parts = [part.strip() for part in line.rsplit("\t", 1)]
        path, label = (
            QUOTES.sub(r"\2", part) if QUOTES.fullmatch(part) else part for part in parts
        )
        return path, label
    match = LIST_LINE.fullmatch(line)
    if match is None:
        return None
    return match["double"] or match["single"] or match["bare"], match["quoted"] or match["label"]


def _labelled(file: Path, rows: list[Row]) -> tuple[list[Row], list[Problem]]:
    """The rows with a class: -1 is a usual mark for none."""
    without = [row for row in rows if re.fullmatch("-[0-9]+", row.label)]
    if not without:
        return rows, []
    first, chosen = without[0], set(without)
    return [row for row in rows if row not in chosen], [
        Problem(
            f"{file} gives {len(without)} images the class {first.label} (line {first.number}: "
            f"{first.path})",
            "; as a rule that marks images without a class, and it would be one of its own: leave "
            "these lines out, or count classes from 0",
        )
    ]


def _check_guess(text: Text, rows: Sequence[Row], there: Sequence[bool]) -> None:
    """Raises DataError unless letters that were guessed are right: those of a path if it exists,
    those of a class if the path, which exists, holds them, too."""
    for row, here in zip(rows, there, strict=True):
        known = {one_form(part) for part in re.split(r"[\\/]", row.path)} if here else set()
        if not (row.path.isascii() or here) or not (
            row.label.isascii() or one_form(row.label) in known
        ):
            raise text.refuse(row.number)


def check_missing(source: Path, paths: Sequence[Path]) -> None:
    """Raises DataError if images that ``source`` names do not exist."""
    missing = [path for path in paths if is_gone(path)]
    if missing:
        raise DataError(str(missing_problem(source, missing, len(paths))))


def missing_problem(source: Path, missing: Sequence[Path], count: int, why: str = "") -> Problem:
    """count: of all images. why: a guess, as a clause."""
    return Problem(
        f"{source} names {len(missing)} of {count} images that do not exist",
        f" (paths are taken relative to the list file): {examples(missing)}{why}",
        example=missing[0],
    )


def _why_missing(file: Path, missing: Sequence[Row]) -> str:
    """A guess from the first line whose image is missing; "" if there is none."""
    row = missing[0]
    written = f"{row.path} {row.label}"
    cut, _, more = row.path.rpartition(" ")
    if "," in written and (file.parent / written.partition(",")[0].strip("\"'")).is_file():
        return f"; {NO_COMMAS}"
    if row.number == 1 and HEADER.fullmatch(row.path):
        return "; line 1 looks like a header: remove it"
    if cut and (file.parent / cut).is_file():
        return (
            f"; line {row.number} has more words than a path and a class: a class with spaces "
            f'stands in quotes ("{more} {row.label}"), and each image has one class'
        )
    if PureWindowsPath(row.path).drive and not Path(row.path).drive:
        return f"; line {row.number} is a path of Windows: write paths relative to the list file"
    folder, name = (file.parent / row.path).parent, Path(row.path).name
    if folder.is_dir() and name.lower() in {path.name.lower() for path in folder.iterdir()}:
        return f"; {name} is there, in other capitals"
    if Path(row.path).is_file():
        return f"; {row.path} exists relative to the current folder, not to that of the list file"
    return ""


def _list_classes(labels: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(labels, classes), with numbers written alike: "07" is class "7"."""
    if not all(re.fullmatch("[0-9]{1,18}", label) for label in labels):
        return tuple(labels), tuple(sorted(set(labels)))
    numbers = [int(label) for label in labels]
    return tuple(map(str, numbers)), tuple(map(str, sorted(set(numbers))))


def gap_problem(files: LabelledFiles) -> Problem | None:
    """What to say if the classes are numbers but not 0, 1, ... without gaps."""
    if not files.classes or not all(re.fullmatch("[0-9]{1,18}", name) for name in files.classes):
        return None
    numbers = {int(name) for name in files.classes}
    count = max(numbers) + 1 - len(numbers)
    if not count:
        return None
    # Not all of them: numbers may be anybody's identities.
    gaps = list(islice((n for n in range(max(numbers)) if n not in numbers), IN_MESSAGE))
    hint = "subtract 1 from every class" if gaps == [0] else "renumber, or use names"
    return Problem(
        f"{files.source} has numbered classes up to {max(numbers)} but no image of class "
        + examples(gaps, count),
        f"; classes are counted from 0 without gaps: {hint}",
    )


def check_gaps(files: LabelledFiles) -> None:
    """Raises DataError if the classes are numbers but not 0, 1, ... without gaps."""
    problem = gap_problem(files)
    if problem is not None:
        raise DataError(str(problem))
