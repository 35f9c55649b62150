"""The images of a run as a list, kept from its first start on: data may change, a run's split not.

A row an image: split, path relative to the data's folder (with forward slashes), class, its number
and the file's size, as CSV, gzipped. Whoever goes on with a run, or looks at one, opens its data by
the list. What was added since is not used; what is gone, or has another size or class, is refused
where it is needed. Times of change say nothing: copies and downloads change them.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..files import replacing
from .copies import of_each_file
from .decode import verify_images
from .folder import SPLIT_FOLDERS, SPLIT_NAMES, find_splits
from .layouts import DataError, LabelledFiles, examples, read_folder
from .lists import read_list
from .named import FOLDER
from .names import one_form
from .sources import PUBLISHED
from .splits import ImageSplit, ImageSplits, Split, assemble

COLUMNS = ("split", "path", "class", "number", "bytes")


class Row(NamedTuple):
    """An image: path as the list has it, the class and its number, and the file's bytes."""

    path: str
    label: str
    number: int
    size: int


@dataclass(frozen=True)
class FileList:
    """rows: of each split ("train", perhaps "validation" and "test"), in the split's order."""

    rows: Mapping[str, Sequence[Row]]

    @classmethod
    def of(cls, parts: Mapping[str, Split], classes: Sequence[str], base: Path) -> FileList | None:
        """The list of some splits of files below ``base``; None of arrays, or where targets are no
        classes. Raises DataError if a file is gone."""
        rows = {}
        for split, part in parts.items():
            if not isinstance(part, ImageSplit):
                return None
            if not all(isinstance(target, int) for target in part.targets):
                return None
            known = sizes(part.paths)
            gone = [path for path, size in zip(part.paths, known, strict=True) if size is None]
            if gone:
                raise DataError(f"{len(gone)} images went away just now: {examples(gone)}")
            names = relative(part.paths, base)
            found = zip(names, part.targets, known, strict=True)
            rows[split] = [Row(name, classes[number], number, size) for name, number, size in found]
        return cls(rows)

    @property
    def classes(self) -> tuple[str, ...]:
        labels = {row.number: row.label for rows in self.rows.values() for row in rows}
        return tuple(labels[number] for number in sorted(labels))

    def needed(self, scored: bool) -> list[str]:
        """The splits that must be as they were; scored: the one that figures are reported on."""
        if not scored:
            return list(self.rows)
        return [next(split for split in ("test", "validation", "train") if split in self.rows)]

    def write(self, path: Path) -> None:
        with (
            replacing(path) as file,
            gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed,
            io.TextIOWrapper(packed, "utf-8", errors="surrogateescape", newline="") as text,
        ):
            table = csv.writer(text)
            table.writerow(COLUMNS)
            for split, rows in self.rows.items():
                table.writerows((split, *row) for row in rows)

    @classmethod
    def read(cls, path: Path) -> FileList:
        rows: dict[str, list[Row]] = {}
        try:
            with gzip.open(path, "rt", encoding="utf-8", errors="surrogateescape", newline="") as f:
                table = csv.reader(f)
                if tuple(next(table)) != COLUMNS:
                    raise ValueError("other columns")
                for split, name, label, number, size in table:
                    rows.setdefault(split, []).append(Row(name, label, int(number), int(size)))
            if set(rows) - set(SPLIT_NAMES) or "train" not in rows:
                raise ValueError(f"splits {', '.join(rows)}")
        except (OSError, EOFError, ValueError, StopIteration, zlib.error, csv.Error) as error:
            raise ValueError(
                f"{path}, the list of the images that this was begun with, is damaged ({error}); "
                "restore it, or delete it if the data has not changed since"
            ) from error
        return cls(rows)


@dataclass
class Differences:
    """What data is now against a list of it. gone and changed: by split, in words. moved: listed in
    another split now. added: not in the list."""

    gone: dict[str, list[str]] = field(default_factory=dict)
    changed: dict[str, list[str]] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)

    def of(self, splits: Sequence[str]) -> tuple[int, str]:
        """(how many are gone or changed in these splits, the same in words)."""
        found, words = 0, []
        for what, by_split in (("gone", self.gone), ("changed", self.changed)):
            names = [name for split in splits for name in by_split.get(split, ())]
            found += len(names)
            words += [f"{len(names)} {what} ({examples(names)})"] if names else []
        return found, ", ".join(words)

    def refuse(
        self, kept: FileList, needed: Sequence[str], of: str, scored: bool, what: str, why: str = ""
    ) -> None:
        """Raises DataError if there are some in the splits that are needed. of: what was listed and
        where, such as "images of DIR". scored: the splits are those of figures. what: was begun
        with the list. why: more to say."""
        count, words = self.of(needed)
        if not count:
            return
        total = sum(len(kept.rows[split]) for split in needed)
        raise DataError(
            f"the data is not what it was when this {what} was begun: of the {total} {of} "
            f"{'that are scored' if scored else 'that it began with'}, {words}"
            + (f"; {len(self.added)} were added ({examples(self.added)})" if self.added else "")
            + f"{why}; restore them, or start a new {what}"
        )


def data_base(name: str, root: str | Path) -> Path:
    """The folder that a data set's paths are relative to."""
    return Path(root) if name == FOLDER else PUBLISHED[name].parent(Path(root))


def reopen(
    kept: FileList,
    name: str,
    root: str | Path,
    validation: float,
    seed: int,
    scored: bool = False,
    verify: bool = True,
    what: str = "run",
) -> ImageSplits:
    """The data set as it was when ``kept`` was written; ``changes`` say what is new since.

    name, root, validation, seed: as ``open_dataset`` takes them; nothing is held out if the list
    has a validation split. scored: only the split that figures are reported on must be as it was.
    verify: look for broken images in what must be. what: the list is of, for messages.

    Raises DataError if a needed image is gone, broken or another one now, with how many.
    """
    root = Path(root)
    if not root.is_dir():
        option = "--data" if name == FOLDER else "--data-root"
        places = {
            "run": f"evaluate --data-root DIR, or fit --resume {option}",
            "shelf": "shelf extract --data",
        }
        raise DataError(
            f"the data of this {what} was in {root}, which does not exist; if it was moved, "
            + (f"give {places[what]} DIR" if what in places else "move it back")
        )
    base = data_base(name, root)
    files, differences = _compare(kept, name, base)
    needed = kept.needed(scored)
    differences.refuse(kept, needed, f"images of {root}", scored, what)
    if verify:
        verify_images([path for split in needed for path in files[split]])
    parts: dict[str, Split] = {
        split: ImageSplit(tuple(files[split]), tuple(row.number for row in rows))
        for split, rows in kept.rows.items()
    }
    if name == FOLDER:
        where, hint = str(root), f"give {root}/val"
        notes = []
    else:
        where, hint = f"{PUBLISHED[name].title} ({root})", "hold out nothing (--validation 0)"
        notes = [PUBLISHED[name].note] if PUBLISHED[name].note else []
    splits = assemble(kept.classes, parts, where, validation, seed, hint)
    others = [split for split in kept.rows if split not in needed]
    changes = tuple(_changes(differences, others, root, what))
    return dataclasses.replace(splits, notes=(*splits.notes, *notes), changes=changes)


def _changes(
    differences: Differences, others: Sequence[str], root: Path, what: str
) -> Iterator[str]:
    added, moved = differences.added, differences.moved
    if added:
        yield (
            f"{len(added)} images were added to {root} after this {what} was begun (e.g. "
            f"{added[0]}): not used; start a new {what} to use them"
        )
    if moved:
        yield (
            f"{root} lists {len(moved)} images in another split than when this {what} was begun "
            f"(e.g. {moved[0]}); the {what} keeps its own split"
        )
    count, words = differences.of(others)
    if count:
        yield (
            f"the images of {root} that are not scored are not what they were when this {what} was "
            f"begun: {words}"
        )


def _compare(kept: FileList, name: str, base: Path) -> tuple[dict[str, list[Path]], Differences]:
    """Where the files of each split are, and what has changed."""
    tops = {row.path.partition("/")[0] for rows in kept.rows.values() for row in rows}
    now, complete = _named_now(name, base, flat=not tops <= SPLIT_FOLDERS)
    # What is named now, by path: the file, and the (split, class) of each time it is named.
    there: dict[str, tuple[Path, list[tuple[str, str]]]] = {}
    for split, files in now.items():
        names = relative(files.paths, base)
        for key, path, label in zip(names, files.paths, files.labels, strict=True):
            there.setdefault(key, (path, []))[1].append((split, label))
    composed: dict[str, str] = {}  # other systems may keep a name in another Unicode form
    found, differences, used = {}, Differences(), set()
    for split, rows in kept.rows.items():
        gone, changed, paths, unlisted = [], [], [], set()
        for row in rows:
            key = row.path
            if key not in there and not (key.isascii() or composed):
                composed = {one_form(other): other for other in there}
            key = key if key in there else composed.get(one_form(key), key)
            path, entries = there.get(key, (base / row.path, None))
            paths.append(path)
            used.add(key)
            if entries is None and complete:
                unlisted.add(row.path)
            elif complete:
                labels = {one_form(label) for _, label in entries}
                if one_form(row.label) not in labels:
                    changed.append(f"{row.path}: class {row.label} then, {entries[0][1]} now")
                elif name == FOLDER and _is_moved(split, {other for other, _ in entries}):
                    differences.moved.append(row.path)
        for row, size in zip(rows, sizes(paths), strict=True):
            if size is None:
                gone.append(row.path)
            elif row.path in unlisted:
                changed.append(f"{row.path}: no longer listed")
            elif size != row.size:
                changed.append(f"{row.path}: {row.size} bytes then, {size} now")
        found[split], differences.gone[split], differences.changed[split] = paths, gone, changed
    differences.added = [key for key in there if key not in used]
    return found, differences


def _is_moved(split: str, now: set[str]) -> bool:
    """Whether lists put an image into another split; validation may have been held out of train."""
    return split not in now and not (split == "validation" and "train" in now)


def _named_now(name: str, base: Path, flat: bool) -> tuple[dict[str, LabelledFiles], bool]:
    """What the data names now, by split, and whether that is more than the files themselves tell:
    of list files and annotations it is, of folders not.

    flat: the list is of a folder CLASS/IMAGE, whatever else lies in it now.
    """
    if name != FOLDER:
        classes, parts = PUBLISHED[name].open(base)
        return {
            split: LabelledFiles(base, part.paths, tuple(classes[t] for t in part.targets), classes)
            for split, part in parts.items()
        }, True
    if (base / "train.txt").is_file():
        places = {
            split: next((p for n in some if (p := base / f"{n}.txt").is_file()), None)
            for split, some in SPLIT_NAMES.items()
        }
        # A missing image is said with all else that is different.
        return {s: read_list(place, check=False) for s, place in places.items() if place}, True
    try:
        if flat:
            return {"train": read_folder(base)}, False
        return find_splits(base, require_train=False), False
    except DataError:  # nothing is there any more, and so all is gone
        return {}, False


def relative(paths: Sequence[Path], base: Path) -> list[str]:
    """As lists have them; of files that lie elsewhere the whole path."""
    prefix = os.path.join(base, "")
    names = (str(path) for path in paths)
    names = (name[len(prefix) :] if name.startswith(prefix) else name for name in names)
    return [name.replace(os.sep, "/") if os.sep != "/" else name for name in names]


def sizes(paths: Sequence[Path]) -> list[int | None]:
    """Of each file its bytes; None where there is none."""
    return of_each_file(paths, lambda path: os.stat(path).st_size)
