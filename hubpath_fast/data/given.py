"""The images that a command is given: files, folders, patterns, and lists on standard input."""

from __future__ import annotations

import codecs
import glob
import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .kinds import is_image
from .layouts import examples

STDIN = "-"
SKIPPED_FOLDERS = ("__MACOSX",)  # of archives made on a Mac: its files end like images and are none
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Given(NamedTuple):
    """path: of an image, as it was given or found. problem: why nothing can be read there, if so;
    then it is what was given."""

    path: str
    problem: str | None = None


def find_images(
    given: Iterable[str], stdin: BinaryIO | None = None
) -> tuple[list[Given], list[str]]:
    """All images that are meant, in the order given, and notes on what was left out.

    given: files, which count as images whatever their ending; folders, with all images below them
    in order of their paths; patterns with * ? [ ] and **, where nothing has such a name; and "-",
    the paths that standard input lists, a line each or with zero bytes between them (files and
    folders, no patterns). stdin: in bytes.

    What is given twice is found twice. What names no image is in its place, with its problem.
    """
    found: list[Given] = []
    notes: list[str] = []
    for text in given:
        if text == STDIN and stdin is not None:
            listed = read_paths(stdin.read())
            if not listed:
                found.append(Given(STDIN, "standard input lists no paths"))
            for line in listed:
                found += _look(line, _existing(line) or _existing(_bare(line)), notes)
            continue
        path = _existing(text)
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


def read_paths(data: bytes) -> list[str]:
    """The paths of a list: a line each, or with zero bytes between them as ``find -print0`` writes
    it; UTF-8, or UTF-16 with its mark. Bytes that are no text stay as they are."""
    if data.startswith(UTF16):
        lines = data.decode("utf-16", "replace").split("\n")
    else:
        data = data.removeprefix(codecs.BOM_UTF8)
        lines = [os.fsdecode(part) for part in data.split(b"\0" if b"\0" in data else b"\n")]
    return [line.removesuffix("\r") for line in lines if line.strip()]


def _bare(line: str) -> str:
    """Without the blanks and quotes that Windows puts around a path."""
    return line.strip().strip("\"'")


def _existing(text: str) -> str | None:
    """The path, in the form of Unicode in which it is there, or with the home folder for "~"."""
    forms = (text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD")))
    return next((p for p in (*forms, os.path.expanduser(text)) if os.path.lexists(p)), None)


def _look(text: str, path: str | None, notes: list[str]) -> list[Given]:
    """What there is at a path; None: nothing."""
    if path is None:
        address = "://" in text
        problem = "addresses are not fetched; download it first" if address else "no such file"
        return [Given(text, problem)]
    if os.path.isdir(path):
        return _in_folder(path, notes)
    return [_file(path)]


def _file(path: str) -> Given:
    """Reading a pipe or a device might wait, or never end."""
    if os.path.isfile(path):
        return Given(path)
    dangling = not os.path.exists(path)
    return Given(path, "a link to what is not there" if dangling else "no regular file")


def _in_folder(folder: str, notes: list[str]) -> list[Given]:
    images: list[Given] = []
    others: list[str] = []
    for path, problem in _files_below(folder):
        if problem is not None:
            images.append(Given(path, problem))
        elif is_image(Path(path)):
            images.append(_file(path))
        elif not os.path.basename(path).startswith("."):
            others.append(path)
    if not images:
        held = f", only {examples(others)}" if others else ""
        return [Given(folder, f"a folder without images, at any depth{held}")]
    notes += _left_out(folder, others)
    return sorted(images, key=lambda item: item.path.split(os.sep))


def _files_below(folder: str) -> Iterator[tuple[str, str | None]]:
    """Every file below a folder, through links too but nowhere twice nor back to where it lies, and
    every folder that cannot be listed, with the reason."""
    refused: list[OSError] = []
    real = Path(os.path.realpath(folder))
    seen = {str(real), *map(str, real.parents)}
    for place, folders, names in os.walk(folder, onerror=refused.append, followlinks=True):
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(place, name))
            if not name.startswith(".") and name not in SKIPPED_FOLDERS and real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        yield from ((os.path.join(place, name), None) for name in names)
    for error in refused:
        yield str(error.filename), f"a folder that cannot be listed ({error.strerror})"


def _match(pattern: str, notes: list[str]) -> list[Given]:
    """What a pattern matches. What of it is there by name is meant by name, brackets or not."""
    parts, literal = Path(os.path.expanduser(pattern)).parts, ""
    while parts and os.path.lexists(os.path.join(literal, parts[0])):
        literal, parts = os.path.join(literal, parts[0]), parts[1:]
    matches = [
        path
        for path in glob.glob(os.path.join(glob.escape(literal), *parts), recursive=True)
        if not set(path[len(literal) :].split(os.sep)) & set(SKIPPED_FOLDERS)
    ]
    if not matches:
        return [Given(pattern, "no file matches this pattern")]
    found: dict[str, Given] = {}  # each once, though "**" matches a folder and all in it
    others: list[str] = []
    for path in matches:
        if os.path.isdir(path):
            found |= {item.path: item for item in _in_folder(path, []) if item.problem is None}
        elif is_image(Path(path)):
            found[path] = _file(path)
        else:
            others.append(path)
    if not found:
        return [Given(pattern, f"no image matches this pattern, only {examples(sorted(matches))}")]
    notes += _left_out(pattern, sorted(others))
    return sorted(found.values(), key=lambda item: item.path.split(os.sep))


def _left_out(where: str, others: list[str]) -> list[str]:
    if not others:
        return []
    files = "1 file is" if len(others) == 1 else f"{len(others)} files are"
    return [f"{where}: {files} left out, no image by its ending: {examples(others)}"]
