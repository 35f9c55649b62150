"""A set of faces on disk: its counts, all that is wrong with it, and its boxes against the rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...data.check import CheckReport
from ...data.layouts import DataError
from .draw import draw_pair
from .faces import Face, FaceSplit
from .geometry import PIXELS_PER_SCALE, box_of_points
from .layouts import FACES
from .sets import FACE_SETS, Found, assemble, find_faces, shared_photographs

RULE = (
    "the rule of the boxes: left and top are the smallest coordinates rounded down, right and "
    "bottom the largest rounded up; the centre is in their middle, scale is the longer side / 200; "
    "crops are 1.25 times as large"
)
ENOUGH = 0.5  # pixels by which a box may differ from the rule: lists round


def check_faces(
    name: str | None,
    root: str | Path,
    images: str | Path | None = None,
    decode: bool = False,
    out: str | Path | None = None,
) -> CheckReport:
    """Looks at a set of faces, and draws one of them beside its mirror image.

    name: "300w", "wflw" or "cofw", whose folder is ``root``; None: ``root`` is a user's own list,
    or a folder with train.csv. images: the folder of the photographs. decode: read all pixels of
    every photograph. out: the file of the drawing; None: none is made.

    Raises DataError if there is nothing to look at.
    """
    root = Path(root)
    if not root.exists():
        raise DataError(f"{root}: no such file or folder, expected the faces")
    found = find_faces(name, root, images, decode=decode)
    faces = found.faces
    landmarks = len(found.layout.names) if found.readings["train"].names or name else 0
    counts = [("landmarks", landmarks, None)]
    counts += [(f"{split} faces", len(some), None) for split, some in faces.items()]
    problems: list[str] = []
    if name is not None:
        counts, problems = _published(found)
    everything = [face for some in faces.values() for face in some]
    counts.append(("photographs", len({face.source for face in everything}), None))
    parts = {split: FaceSplit(tuple(some), found.layout) for split, some in faces.items()}
    problems += shared_photographs(parts)
    refused, notes = list(found.problems), [*found.remarks, *found.on_files()]
    if not refused:
        try:
            notes += [
                note for note in assemble(parts, found, 0.15, 0).notes if note not in problems
            ]
        except DataError as error:
            refused.append(str(error))
    if name is not None and any(reading.file is None for reading in found.readings.values()):
        notes.append(f"get it: {FACE_SETS[name].origin}")
    seen = [face for face in everything if face.size is not None]
    notes += [*_boxes(found), *_points(seen), *_in_photographs(seen)]
    if out is not None and seen:
        try:
            draw_pair(seen[0], found.layout, Path(out))
            notes.append(f"one face and its mirror image, its landmarks by number: {out}")
        except OSError as error:
            notes.append(f"no face was drawn: {out} cannot be written ({error.strerror or error})")
    return CheckReport(
        FACE_SETS[name].title if name else str(root),
        tuple(counts),
        tuple(problems),
        tuple(notes),
        tuple(refused),
        things="faces",
        command="hubpath landmarks fit",
    )


def _published(found: Found) -> tuple[list[tuple[str, int, int | None]], list[str]]:
    """Counts beside the published ones, and a sentence for each that is another."""
    numbers = {"train": len(found.faces["train"]), "full": len(found.faces.get("test", ()))}
    numbers |= {part: len(keys) for part, keys in found.subsets.items()}
    further = {part: len(reading.faces) for part, reading in found.others.items()}
    numbers |= further
    counts: list[tuple[str, int, int | None]] = [("landmarks", found.layout.num_points, None)]
    problems = []
    for part, published in FACES[found.name].items():
        if part not in numbers:
            problems.append(f"{part}: no list of it, {published:,} faces published")
            continue
        counts.append((f"{part} faces", numbers[part], published))
        if numbers[part] != published:
            problems.append(f"{part}: {numbers[part]:,} faces found, {published:,} published")
    return counts, problems


def _boxes(found: Found) -> list[str]:
    """How the boxes that lists give compare with the rule."""
    boxed = [
        face
        for split, reading in found.readings.items()
        if reading.boxed
        for face in found.faces[split]
    ]
    if not boxed:
        return [f"boxes are made from the points; {RULE}"]
    other = []
    for face in boxed:
        scale, x, y = box_of_points(face.points)
        moved = max(abs(x - face.center[0]), abs(y - face.center[1]))
        if max(moved, abs(scale - face.scale) * PIXELS_PER_SCALE) > ENOUGH:
            other.append((face, scale, x, y))
    if not other:
        return [f"all {len(boxed):,} boxes are those of the rule; {RULE}"]
    face, scale, x, y = other[0]
    return [
        f"{len(other):,} of {len(boxed):,} boxes differ from the rule, such as {face.file}:"
        f"{face.line}: scale {face.scale:g} at ({face.center[0]:g}, {face.center[1]:g}), by the "
        f"rule {scale:g} at ({x:g}, {y:g}); --box points takes the rule's; {RULE}"
    ]


def _points(faces: Sequence[Face]) -> list[str]:
    """Points outside of the photographs, and those that are occluded."""
    notes, total = [], sum(len(face.points) for face in faces)
    outside = [(face, count) for face in faces if (count := int(face.outside().sum()))]
    if outside:
        first, count = outside[0][0], sum(count for _, count in outside)
        notes.append(
            f"{count:,} of {total:,} points lie outside of their photographs, in {len(outside):,} "
            f"faces, such as {first.file}:{first.line}; they are learned where a crop holds them, "
            "and always counted"
        )
    elif faces:
        notes.append(f"all {total:,} points lie in their photographs")
    told = [face.occluded for face in faces if face.occluded is not None]
    if told:
        share = sum(float(flags.double().mean()) for flags in told) / len(told)
        notes.append(f"{100 * share:.1f} % of the landmarks are said to be occluded, and count")
    return notes


def _in_photographs(faces: Sequence[Face]) -> list[str]:
    """How many faces photographs show."""
    by_photo = Counter(face.source for face in faces)
    several = {source: count for source, count in by_photo.items() if count > 1}
    if not several:
        return ["each photograph shows one face"] if faces else []
    source, most = max(several.items(), key=lambda item: item[1])
    name = next(face.image for face in faces if face.source == source)
    return [
        f"{len(several):,} of {len(by_photo):,} photographs show several faces, up to {most} "
        f"({name}); those of one are never held out apart"
    ]
