"""The images that a command is given: files, folders, patterns, and lists on standard input."""

from __future__ import annotations

import contextlib
import glob
import os
import stat
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .kinds import is_image, is_output, is_system_folder
from .layouts import examples
from .names import FileFinder
from .text import read_paths
from .walk import NO_IMAGES, OF_SYSTEM, OF_TOOLS, WRITTEN, Leftovers, images_below, leave_out

STDIN = "-"


class Given(NamedTuple):
    """path: of an image, as it was given or found. problem: why nothing can be read there, if so;
    then it is what was given."""

    path: str
    problem: str | None = None


class _Below(Leftovers):
    """``unlisted``: the folders that cannot be listed, each with its problem."""

    def __init__(self) -> None:
        super().__init__()
        self.unlisted: list[Given] = []

    def cannot_list(self, folder: Path, error: OSError, root: bool) -> None:
        problem = f"a folder that cannot be listed ({error.strerror})"
        self.unlisted.append(Given(str(folder), problem))


def find_images(
    given: Iterable[str], stdin: BinaryIO | None = None
) -> tuple[list[Given], list[str]]:
    """All images that are meant, in the order given, and notes on what was left out.

    given: files, which count as images whatever their ending; folders, with all images below them
    in order of their paths, found as those to train on are (``walk``); patterns with * ? [ ] and
    **, where nothing has such a name; and "-", the paths that standard input lists, a line each or
    with zero bytes between them (files and folders, no patterns). stdin: in bytes.

    What is given twice is found twice. What names no image is in its place, with its problem.
    """
    found: list[Given] = []
    notes: list[str] = []
    finder = FileFinder()
    for text in given:
        if text == STDIN and stdin is not None:
            listed = read_paths(stdin.read())
            if not listed:
                found.append(Given(STDIN, "standard input lists no paths"))
            for line in listed:
                path = _existing(line, finder) or _existing(_bare(line), finder)
                found += _look(line, path, notes)
            continue
        path = _existing(text, finder)
        found += (
            _match(text, notes)
            if path is None and glob.has_magic(text)
            else _look(text, path, notes)
        )
    paths = [item.path for item in found if item.problem is None]
    again = len(paths) - len(set(paths))
    if again:
        notes.append(
            f"{again} of {len(paths)} images are given again; each is answered as often as given"
        )
    return found, notes


def _bare(line: str) -> str:
    """Without the blanks and quotes that Windows puts around a path."""
    return line.strip().strip("\"'")


def _existing(text: str, finder: FileFinder) -> str | None:
    """The path, as it is stored, or with the home folder for "~"."""
    for path in (text, os.path.expanduser(text)):
        if os.path.lexists(path):
            return path
        found = str(finder.find(path))
        if path and os.path.lexists(found):
            return found
    return None


def _look(text: str, path: str | None, notes: list[str]) -> list[Given]:
    """What there is at a path; None: nothing."""
    if path is None:
        address = "://" in text
        problem = "addresses are not fetched; download it first" if address else "no such file"
        return [Given(text, problem)]
    if not os.path.isdir(path):
        return [_file(path)]
    leftovers = _Below()
    images = _in_folder(path, leftovers)
    if not images:
        return [Given(path, f"a folder without images, at any depth{_only(leftovers)}")]
    _note(path, leftovers, notes)
    return images


def _file(path: str) -> Given:
    """Reading a pipe or a device might wait, or never end."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return Given(path, "a link to what is not there")
    except OSError as error:
        return Given(path, f"cannot be read ({error.strerror})")
    return Given(path, None if regular else "no regular file")


def _in_folder(folder: str, leftovers: _Below) -> list[Given]:
    """All images below it and all folders that cannot be listed, in order of their paths."""
    before = len(leftovers.unlisted)
    found = [_file(str(path)) for path in images_below(Path(folder), leftovers, root=True)]
    return _in_order([*found, *leftovers.unlisted[before:]])


def _in_order(found: Iterable[Given]) -> list[Given]:
    return sorted(found, key=lambda item: item.path.split(os.sep))


def _match(pattern: str, notes: list[str]) -> list[Given]:
    """What a pattern matches. What of it is there by name is meant by name, brackets or not."""
    parts, literal = Path(os.path.expanduser(pattern)).parts, ""
    while parts and os.path.lexists(os.path.join(literal, parts[0])):
        literal, parts = os.path.join(literal, parts[0]), parts[1:]
    matches = glob.glob(os.path.join(glob.escape(literal), *parts), recursive=True)
    if not matches:
        return [Given(pattern, "no file matches this pattern")]
    found: list[Given] = []
    leftovers, closed, read = _Below(), {}, set()
    why_closed = lru_cache(maxsize=None)(_why_closed)
    for path in sorted(matches):
        if not read.isdisjoint(Path(path).parents):  # "**" matches a folder and all in it
            continue
        way = _on_the_way(path, literal)
        shut = next((folder for folder in way if why_closed(folder)), None)
        if shut is not None:
            closed[shut] = why_closed(shut)
        elif os.path.isdir(path):
            read.add(Path(path))
            found += _in_folder(path, leftovers)
        elif is_image(Path(path)):
            found.append(_file(path))
        else:
            leave_out(Path(path), leftovers)
    for folder, reason in closed.items():
        leftovers.add(reason, Path(folder), NO_IMAGES)
    if not found:
        return [Given(pattern, f"no image matches this pattern{_only(leftovers)}")]
    _note(pattern, leftovers, notes)
    return _in_order(found)


def _on_the_way(path: str, literal: str) -> list[str]:
    """From the first part of a match that was not written literally to the match itself."""
    steps = Path(path).relative_to(literal).parts
    return [os.path.join(literal, *steps[: i + 1]) for i in range(len(steps))]


def _why_closed(path: str) -> str | None:
    """The reason for which a folder is left out whatever it holds, as in ``walk``."""
    if not os.path.isdir(path):
        return None
    if is_system_folder(Path(path)):
        return OF_TOOLS
    with contextlib.suppress(OSError):
        return WRITTEN if is_output(Path(path), os.listdir(path)) else None
    return None


def _note(where: str, leftovers: Leftovers, notes: list[str]) -> None:
    told = [skipped.shown() for skipped in leftovers.all() if skipped.reason != OF_SYSTEM]
    if told:
        notes.append(f"{where}: left out: {examples(told)}")


def _only(leftovers: Leftovers) -> str:
    held = [skipped.shown() for skipped in leftovers.all()]
    return f", only {examples(held)}" if held else ""
