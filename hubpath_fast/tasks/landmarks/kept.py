"""The faces of a run as a list, kept from its first start on: see ``data.kept``.

A row a face: split, photograph as the list names it, a digest of its points and its box, its line
and the photograph's bytes. So a folder may be moved, and rows may be added or change their order;
what is gone, or has other points, another box or another photograph, is refused where it is needed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...data.copies import of_each_file
from ...data.kept import Differences, FileList, Row, sizes
from ...data.layouts import DataError, examples
from .faces import Face, FaceSplit, FaceSplits
from .photos import look
from .read_mat import MatImage
from .sets import Found, assemble, find_faces
from .settings import LandmarkSettings


def face_list(parts: Mapping[str, FaceSplit]) -> FileList:
    """The list of some splits. Raises DataError if a photograph is gone."""
    rows = {}
    for split, part in parts.items():
        known = sizes(_files(part.faces))
        gone = [f.image for f, size in zip(part.faces, known, strict=True) if size is None]
        if gone:
            raise DataError(f"{len(gone)} photographs went away just now: {examples(gone)}")
        rows[split] = [
            Row(face.image, digest(face), face.line, size)
            for face, size in zip(part.faces, known, strict=True)
        ]
    return FileList(rows)


def digest(face: Face) -> str:
    """Of the numbers that make a face: its points and its box."""
    numbers = [*face.points.flatten().tolist(), *face.center, face.scale]
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]


def reopen_faces(
    kept: FileList,
    dataset: str | None,
    data: str | Path,
    images: str | Path | None = None,
    validation: float = 0.15,
    seed: int = 0,
    box: str = "file",
    settings: LandmarkSettings | None = None,
    scored: bool = False,
    verify: bool = True,
    what: str = "run",
) -> FaceSplits:
    """The faces as they were when ``kept`` was written; ``changes`` say what is new since.

    dataset, data, images, validation, seed, box, settings: as ``open_faces`` takes them; nothing is
    held out if the list has a validation split. scored: only the split that figures are reported on
    must be as it was. verify: look at its photographs. what: the list is of, for messages.

    Raises DataError if a needed face is gone or another one now, with how many, or if its
    photograph is broken.
    """
    root = Path(data)
    if not root.exists():
        raise DataError(
            f"the faces of this {what} were in {root}, which does not exist; if it was moved, "
            + ("give its place now (--data-root, --data)" if what == "run" else "move it back")
        )
    found = find_faces(dataset, root, images, box, settings, verify=False)
    faces, differences = _compare(kept, found)
    needed, why = kept.needed(scored), f"; {found.problems[0]}" if found.problems else ""
    differences.refuse(kept, needed, f"faces of {found.where}", scored, what, why)
    if verify:
        _verify([face for split in needed for face in faces[split]])
    # Others may be gone, and are not looked at.
    parts = {
        split: FaceSplit(tuple(face for face in some if face is not None), found.layout)
        for split, some in faces.items()
    }
    splits = assemble(parts, found, validation, seed)
    others = [split for split in kept.rows if split not in needed]
    changes = tuple(_changes(differences, others, found, what))
    return dataclasses.replace(splits, notes=(*splits.notes, *found.notes()), changes=changes)


def _compare(kept: FileList, found: Found) -> tuple[dict[str, list[Face | None]], Differences]:
    """The faces of each split now, None of one that is not there, and what has changed."""
    now: dict[tuple[str, str], tuple[Face, str]] = {}
    for split, some in found.faces.items():
        for face in some:
            now.setdefault((face.image, digest(face)), (face, split))
    listed = {image for image, _ in now}
    missing = {name for reading in found.readings.values() for name in reading.missing}
    faces: dict[str, list[Face | None]] = {}
    differences, used = Differences(), set()
    for split, rows in kept.rows.items():
        gone, changed, some = [], [], []
        for row in rows:
            face, place = now.get((row.path, row.label), (None, split))
            some.append(face)
            used.add((row.path, row.label))
            if face is not None:
                if place != split and not (split == "validation" and place == "train"):
                    differences.moved.append(row.path)
            elif row.path in missing:
                gone.append(row.path)
            elif row.path in listed:
                changed.append(f"{row.path}: other points or another box (line {row.number} then)")
            else:
                changed.append(f"{row.path}: no longer listed, or with a fault")
        there = [(row, face) for row, face in zip(rows, some, strict=True) if face is not None]
        known = sizes(_files([face for _, face in there]))
        for (row, _), size in zip(there, known, strict=True):
            if size is None:
                gone.append(row.path)
            elif size != row.size:
                changed.append(f"{row.path}: {row.size} bytes then, {size} now")
        faces[split], differences.gone[split], differences.changed[split] = some, gone, changed
    differences.added = [image for image, number in now if (image, number) not in used]
    return faces, differences


def _changes(
    differences: Differences, others: Sequence[str], found: Found, what: str
) -> Iterator[str]:
    added, moved = differences.added, differences.moved
    if added:
        yield (
            f"{len(added)} faces were added to {found.where} after this {what} was begun (e.g. "
            f"{added[0]}): not used; start a new {what} to use them"
        )
    if moved:
        yield (
            f"{found.where} lists {len(moved)} faces in another split than when this {what} was "
            f"begun (e.g. {moved[0]}); the {what} keeps its own split"
        )
    count, words = differences.of(others)
    if count:
        yield (
            f"the faces of {found.where} that are not scored are not what they were when this "
            f"{what} was begun: {words}"
        )


def _files(faces: Sequence[Face]) -> list[Path]:
    return [f.source.file if isinstance(f.source, MatImage) else f.source for f in faces]


def _verify(faces: Sequence[Face]) -> None:
    """Raises DataError if photographs are broken."""
    files = list(dict.fromkeys(f.source for f in faces if not isinstance(f.source, MatImage)))
    faults = [seen.fault for seen in of_each_file(files, look) if seen and seen.fault]
    if faults:
        raise DataError(
            f"{len(faults)} of {len(files)} photographs cannot be read; restore: {examples(faults)}"
        )
