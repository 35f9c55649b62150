"""The images below a folder, and what is left out, counted by reason.

Links are followed, to files and to folders. A folder is read once for each class, and one that
encloses the place of its link is not followed: it would hold other classes' images.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .kinds import (
    TEXT_ENDINGS,
    is_image,
    is_output,
    is_system_file,
    is_system_folder,
    missing_ending,
)

# Of what is left out, some may be images of the user's; none is, but the user should know; none is.
MAYBE_IMAGES, NO_IMAGES, LITTER = "may be images", "no images", "litter"
WRITTEN = "folders that hubpath wrote"
OF_SYSTEM, OF_TOOLS = "files of the system", "folders of the system or of other tools"
LOOPS = "links back to what is read already"
SNIFFED = 20  # files without an ending that are opened to see if they are images


class DataError(ValueError):
    """Data that cannot be trained or tested on as they are."""


@dataclass(frozen=True)
class Skipped:
    """What was left out for one reason.

    reason: as it is said after a number above 1, such as ".heic files". example: one of them.
    weight: MAYBE_IMAGES, NO_IMAGES or LITTER.
    """

    reason: str
    count: int
    example: Path
    weight: str

    @property
    def is_litter(self) -> bool:
        return self.weight == LITTER

    def __str__(self) -> str:
        one = re.sub(r"(file|folder|image|link|thing)s", r"\1", self.reason, count=1)
        return f"1 {one}" if self.count == 1 else f"{self.count:,} {self.reason}"

    def shown(self) -> str:
        return f"{self} ({self.example})"


class Leftovers:
    """Counts what is left out, by reason."""

    def __init__(self) -> None:
        self._found: dict[str, Skipped] = {}

    def add(self, reason: str, example: Path, weight: str = MAYBE_IMAGES, count: int = 1) -> None:
        known = self._found.get(reason)
        self._found[reason] = (
            Skipped(reason, count, example, weight)
            if known is None
            else replace(known, count=known.count + count)
        )

    def cannot_list(self, folder: Path, error: OSError, root: bool) -> None:
        """root: see ``list_folder``."""
        if root:
            raise DataError(f"the folder {folder} cannot be read ({error.strerror})") from error
        self.add(f"folders that cannot be read ({error.strerror})", folder)

    def merge(self, others: Iterable[Skipped]) -> None:
        for skipped in others:
            self.add(skipped.reason, skipped.example, skipped.weight, skipped.count)

    def no_class(self) -> bool:
        """Whether something was left out, and nothing but what ``hubpath`` wrote or links up."""
        return bool(self._found) and self._found.keys() <= {WRITTEN, LOOPS}

    def all(self) -> tuple[Skipped, ...]:
        """What may be images first, and the most of it."""
        order = (MAYBE_IMAGES, NO_IMAGES, LITTER)
        return tuple(sorted(self._found.values(), key=lambda s: (order.index(s.weight), -s.count)))


@dataclass
class Entries:
    """What a folder holds, by name, without what is hidden or of the system."""

    folders: list[Path]
    files: list[Path]


def list_folder(folder: Path, leftovers: Leftovers, root: bool = False) -> Entries | None:
    """The folders and files in ``folder``; None, and a reason, if there is nothing to be read.

    root: the folder was named by the user: read whatever wrote it; DataError if it cannot be.

    Hidden entries, what systems and other tools leave, links to nothing and what is neither file
    nor folder go to ``leftovers``. A link to nothing that is called like an image stays among the
    files: it is an image that is missing.
    """
    try:
        found = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        leftovers.cannot_list(folder, error, root)
        return None
    if not root and is_output(folder, (entry.name for entry in found)):
        leftovers.add(WRITTEN, folder, NO_IMAGES)
        return None
    entries = Entries([], [])
    for entry in found:
        path = folder / entry.name
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            if is_image(path):
                entries.files.append(path)  # read, and refused, with the others
            elif entry.is_symlink():
                leftovers.add("links to what does not exist", path)
            else:
                leftovers.add(f"files that cannot be read ({error.strerror})", path)
            continue
        if stat.S_ISDIR(mode):
            if not _is_hidden_folder(path, leftovers):
                entries.folders.append(path)
        elif stat.S_ISREG(mode):
            if not _is_hidden_file(path, leftovers):
                entries.files.append(path)
        else:
            leftovers.add("things that are neither file nor folder", path, NO_IMAGES)
    return entries


def _is_hidden_folder(path: Path, leftovers: Leftovers) -> bool:
    if is_system_folder(path):
        leftovers.add(OF_TOOLS, path, NO_IMAGES)
    elif path.name.startswith("."):
        leftovers.add("hidden folders", path)
    else:
        return False
    return True


def _is_hidden_file(path: Path, leftovers: Leftovers) -> bool:
    if is_system_file(path):
        leftovers.add(OF_SYSTEM, path, LITTER)
    elif path.name.startswith("."):
        leftovers.add("hidden images", path)
    else:
        return False
    return True


def walk(folder: Path, leftovers: Leftovers, root: bool = False) -> list[Path]:
    """All images at any depth below ``folder``, sorted; what is no image goes to ``leftovers``.

    root: see ``list_folder``.
    """
    return sorted(images_below(folder, leftovers, root))


def images_below(folder: Path, leftovers: Leftovers, root: bool = False) -> Iterator[Path]:
    """The images of ``walk`` as they are found: real folders before links to others."""
    seen, waiting, linked, sniffed = set(), [folder], [], 0
    while waiting or linked:
        here = waiting.pop() if waiting else linked.pop(0)
        real, named = _real(here), root and here == folder  # "." encloses all, and is meant
        if real in seen or (not named and _encloses(real, folder, here)):
            leftovers.add(LOOPS, here, NO_IMAGES)
            continue
        seen.add(real)
        entries = list_folder(here, leftovers, named)
        if entries is None:
            continue
        for path in entries.folders:
            (linked if path.is_symlink() else waiting).append(path)
        for path in entries.files:
            if is_image(path):
                yield path
            else:
                sniffed += not path.suffix
                leave_out(path, leftovers, sniffed <= SNIFFED)


def holds_images(folder: Path) -> bool:
    """Whether there is an image at any depth below ``folder``, but for what ``hubpath`` wrote."""
    return next(images_below(folder, Leftovers()), None) is not None


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _encloses(real: Path, folder: Path, link: Path) -> bool:
    """Whether ``real`` holds the class's folder, or the place of the link that leads to it."""
    # Not path.parent: that of ".." would be ".".
    places = [_real(Path(os.path.abspath(path)).parent) for path in (folder, link)]
    return any(real in (place, *place.parents) for place in places) or real in _real(folder).parents


def leave_out(path: Path, leftovers: Leftovers, sniff: bool = True) -> None:
    """Counts a file that is not called like an image. sniff: look into one without an ending."""
    ending = path.suffix.lower()
    if ending in TEXT_ENDINGS:
        leftovers.add(f"{ending} files", path, LITTER)
    elif re.fullmatch(r"\.[a-z][a-z0-9]{0,7}", ending):
        leftovers.add(f"{ending} files", path)
    elif ending:  # not a kind for each number, as of img.0001
        leftovers.add("files with unknown endings", path)
    elif sniff and (ending := missing_ending(path)):
        leftovers.add(f"images without the ending {ending}", path)
    else:
        leftovers.add("files without an ending", path)
