"""Data sets of faces: the published ones and a user's own lists, with what is held out.

Validation is held out of train by photograph, as one may show several faces; never the test set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ...data.layouts import DataError, examples
from ...data.order import generator
from ...data.splits import check_share
from .faces import Face, FaceSplit, FaceSplits
from .layouts import FACES, LAYOUTS, LandmarkLayout
from .metrics import unit_landmarks
from .places import PARTS, find_list
from .read import BOXES, Reading, faces_by_image, read_faces, set_name
from .read_lists import ATTRIBUTES
from .rows import problem
from .settings import LandmarkSettings, layout_for

SHOWN = 20  # problems in one message, then a count
OWN = "folder"
SUBSETS = {"300w": ("common", "challenge"), "wflw": ATTRIBUTES}
FURTHER = {"300w": ("test",)}  # test sets that are no part of the paper's


@dataclass(frozen=True)
class FaceSet:
    """title: as papers write it. origin: where to get it, and how to lay it out."""

    title: str
    origin: str


FACE_SETS: Mapping[str, FaceSet] = MappingProxyType(
    {
        "300w": FaceSet(
            "300W",
            "images from https://ibug.doc.ic.ac.uk/resources/300-W/, lists "
            "face_landmarks_300w_{train,valid,valid_common,valid_challenge,test}.csv from "
            "https://github.com/HRNet/HRNet-Facial-Landmark-Detection; images in images/ beside "
            "the lists",
        ),
        "wflw": FaceSet(
            "WFLW",
            "https://wywu.github.io/projects/LAB/WFLW.html: WFLW_images and WFLW_annotations "
            "unpacked into one folder; or HRNet's lists face_landmarks_wflw_{train,test,...}.csv "
            "with the images in images/",
        ),
        "cofw": FaceSet(
            "COFW",
            "https://data.caltech.edu/records/bc0bf-nc666 (COFW_color): COFW_train_color.mat and "
            "COFW_test_color.mat in one folder",
        ),
    }
)


def open_faces(
    dataset: str | None,
    data: str | Path,
    images: str | Path | None = None,
    validation: float = 0.15,
    seed: int = 0,
    box: str = "file",
    settings: LandmarkSettings | None = None,
    scored: bool = False,
    verify: bool = True,
) -> FaceSplits:
    """Opens a set of faces.

    Args:
        dataset: "300w", "wflw", "cofw"; "folder" or None: a user's own.
        data: the set's folder; of one's own a list, or a folder with train.csv and, as there are
            some, val.csv and test.csv.
        images: the folder of the photographs, where that is not beside the lists.
        validation: the share of train that is held out, by photograph, drawn by ``seed``, where
            there is no validation list; 0: nothing. Without test, validation stands in for it.
        box: "points": boxes are made from the points even where lists have some.
        settings: their ``unit`` and ``flip_pairs`` count here; None: the defaults.
        verify: look at the head of every photograph. scored: only of the split that figures are
            reported on.

    Raises:
        DataError: with all problems of all lists; if nothing can be held out, or nothing is left to
            report on.
        ValueError: an unknown name, pairs or a unit of landmarks that are not there.
    """
    check_share(validation)
    found = find_faces(dataset, data, images, box, settings, scored, verify)
    found.refuse()
    parts = {split: FaceSplit(tuple(faces), found.layout) for split, faces in found.faces.items()}
    splits = assemble(parts, found, validation, seed)
    return dataclasses.replace(splits, notes=(*splits.notes, *found.notes()))


@dataclass
class Found:
    """What the lists of a set hold. name: None: a user's own. where: it, in messages. readings: by
    split. problems: all of them. subsets: of the test set, its faces by their keys. others: further
    test sets, by name. remarks: on lists that are not used."""

    name: str | None
    where: str
    readings: dict[str, Reading]
    problems: list[str]
    layout: LandmarkLayout
    subsets: dict[str, set[tuple]] = dataclasses.field(default_factory=dict)
    others: dict[str, Reading] = dataclasses.field(default_factory=dict)
    remarks: list[str] = dataclasses.field(default_factory=list)

    @property
    def faces(self) -> dict[str, list[Face]]:
        """By split. A published list that has a face twice was published so."""
        return {
            split: reading.faces if self.name is None else _in_order(reading)
            for split, reading in self.readings.items()
        }

    def refuse(self) -> None:
        """Raises DataError with all problems, if there are some."""
        if not self.problems:
            return
        count = len(self.problems)
        shown = [f"  {text}" for text in self.problems[:SHOWN]]
        if count > SHOWN:
            shown.append(f"  and {count - SHOWN} more; `{self._check()}` lists all")
        head = f"{self.where}: 1 problem" if count == 1 else f"{self.where}: {count} problems"
        missing = self.name and any(reading.file is None for reading in self.readings.values())
        origin = [f"get it: {FACE_SETS[self.name].origin}"] if missing else []
        raise DataError("\n".join([head, *shown, *origin]))

    def _check(self) -> str:
        path = self.where.removesuffix(")").partition(" (")[2] or self.where
        return f"hubpath data check {f'{self.name} --root ' if self.name else ''}{path}"

    def notes(self) -> list[str]:
        """What is to be known of the lists, whatever is held out of them."""
        return [*self.remarks, *self.on_files(), *self.on_counts()]

    def on_files(self) -> list[str]:
        notes = []
        turned = list(dict.fromkeys(n for r in self.readings.values() for n in r.turned))
        if turned:
            how = (
                "turned upright, as viewers show them, and their points are taken as of that"
                if self.name is None
                else "read as they are stored, which is what published coordinates mean"
            )
            notes.append(
                f"{_count(len(turned), 'photograph carries', 'photographs carry')} an EXIF "
                f"orientation ({examples(turned)}): {how}"
            )
        if self.name is None and self.layout.flip is None:
            notes.append(
                "which landmarks change places in a mirror is not known, so no face is mirrored; "
                "--flip-pairs 0-1,... says it"
            )
        again = sum(len(reading.again) for reading in self.readings.values())
        if self.name is not None and again:
            notes.append(f"{_count(again, 'face stands', 'faces stand')} twice in {self.where}")
        return notes

    def on_counts(self) -> list[str]:
        """A note where a published set has other counts."""
        if self.name is None:
            return []
        published = FACES[self.name]
        wanted = {"train": published["train"], "test": published["full"]}
        other = {s: len(faces) for s, faces in self.faces.items() if len(faces) != wanted.get(s)}
        if not other:
            return []
        has = ", ".join(f"{count:,} {split}" for split, count in other.items())
        want = ", ".join(f"{wanted.get(split, 0):,} {split}" for split in other)
        return [f"{self.where} has {has} faces, where {want} are published: figures do not compare"]


def find_faces(
    dataset: str | None,
    data: str | Path,
    images: str | Path | None,
    box: str = "file",
    settings: LandmarkSettings | None = None,
    scored: bool = False,
    verify: bool = True,
    decode: bool = False,
) -> Found:
    """All lists of a set, with all that is wrong with them."""
    if box not in BOXES:
        raise ValueError(f"box: expected one of {', '.join(BOXES)}, got {box!r}")
    name, root = set_name(dataset), Path(data)
    where = f"{FACE_SETS[name].title} ({root})" if name else str(root)
    options: dict[str, Any] = {"images": images, "box": box, "verify": verify, "decode": decode}
    tested = root.is_dir() and (name is not None or find_list(root, None, "test") is not None)
    trained = {**options, "verify": verify and not (scored and tested)}
    readings = {"train": read_faces(root, name, part="train" if root.is_dir() else None, **trained)}
    if root.is_dir() and name is not None:
        readings["test"] = read_faces(root, name, part="full", **options)
    elif root.is_dir() and readings["train"].file is not None:
        for part in PARTS[1:]:
            if find_list(root, None, part):
                readings[part] = read_faces(root, None, part=part, **options)
    problems = [text for reading in readings.values() for text in reading.problems]
    if name is None:
        problems += [text for reading in readings.values() for text in reading.repeated]
        problems += _other_landmarks(readings)
    names = LAYOUTS[name].names if name else readings["train"].names
    settings = LandmarkSettings() if settings is None else settings
    if not names:  # the header of train is wrong, which is said
        layout = LandmarkLayout(OWN, 1)
    else:
        layout = layout_for(name or OWN, names, settings)
        problems += _without_unit(readings, layout)
    found = Found(name, where, readings, problems, layout)
    if root.is_dir() and name is not None:
        _find_subsets(found, root, options)
    return found


def assemble(
    parts: Mapping[str, FaceSplit], found: Found, validation: float, seed: int
) -> FaceSplits:
    """The set of ``parts`` ("train", perhaps "validation" and "test"), with what is missing made.

    Raises DataError if nothing can be held out or nothing is left to report on.
    """
    where, splits, notes = found.where, dict(parts), []
    if "validation" not in splits:
        whole = splits["train"]
        kept, held = hold_out(whole.faces, validation, seed)
        if validation and not held:
            raise DataError(
                f"{where} has all faces to train on in one photograph, so none can be held out for "
                "validation; add photographs, give a validation list, or hold out nothing "
                "(--validation 0)"
            )
        splits["train"], splits["validation"] = whole.subset(kept), whole.subset(held)
        notes.append(
            f"no validation list in {where}: {len(held)} of {len(whole)} training faces held out, "
            f"by photograph (seed {seed})"
            if validation
            else f"nothing held out of {where}: the weights of the last step are kept, unchosen"
        )
    test_is_validation = "test" not in splits
    if test_is_validation:
        if not len(splits["validation"]):
            raise DataError(
                f"{where} has no test list and nothing is held out (validation is 0), so nothing "
                "is left to report on; add a test list or hold out a share"
            )
        splits["test"] = splits["validation"]
        notes.append(
            f"no test list in {where}: results are on the validation faces, on which settings and "
            "checkpoints are chosen too, and so are a little too good"
        )
    notes += shared_photographs(splits, test_is_validation)
    positions = {key_of(face): i for i, face in enumerate(splits["test"].faces)}
    subsets = {
        name: tuple(sorted(positions[key] for key in keys if key in positions))
        for name, keys in found.subsets.items()
    }
    others = {
        name: FaceSplit(tuple(_in_order(reading)), found.layout)
        for name, reading in found.others.items()
    }
    return FaceSplits(
        found.layout,
        **splits,
        test_is_validation=test_is_validation,
        notes=tuple(notes),
        parts=parts,
        subsets={name: chosen for name, chosen in subsets.items() if chosen},
        others=others,
    )


def hold_out(faces: Sequence[Face], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(kept, held): positions in ``faces``, ascending, with ``share`` of the photographs held, and
    with each all its faces. At least one is held, unless it is the only one or the share is 0, and
    one is always kept."""
    groups = [members for _, members in faces_by_image(faces)]
    count = min(max(round(len(groups) * share), 1), len(groups) - 1) if share else 0
    order = torch.randperm(len(groups), generator=generator(seed, "hold out photographs"))
    chosen = {i for group in order[:count].tolist() for i in groups[group]}
    return [i for i in range(len(faces)) if i not in chosen], sorted(chosen)


def shared_photographs(
    splits: Mapping[str, FaceSplit], test_is_validation: bool = False
) -> list[str]:
    """A sentence for two splits that show the same photographs."""
    seen = {split: {face.source for face in part.faces} for split, part in splits.items()}
    found = []
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        if test_is_validation and second == "test":
            continue
        both = seen.get(first, set()) & seen.get(second, set())
        if both:
            names = sorted({f.image for f in splits[second].faces if f.source in both})
            found.append(
                f"{_count(len(both), 'photograph is', 'photographs are')} in both {first} and "
                f"{second} ({examples(names)}): figures are too good"
            )
    return found


def key_of(face: Face) -> tuple:
    """What tells a face from all others: its photograph and its points."""
    return str(face.source), face.points.numpy().tobytes()


def _in_order(reading: Reading) -> list[Face]:
    return sorted([*reading.faces, *reading.again], key=lambda face: face.line)


def _other_landmarks(readings: Mapping[str, Reading]) -> list[str]:
    train = readings["train"]
    return [
        problem(
            reading.file,
            None,
            f"{len(reading.names)} landmarks ({examples(reading.names)}), expected the "
            f"{len(train.names)} of {train.file} ({examples(train.names)})",
        )
        for reading in readings.values()
        if train.names and reading.names and reading.names != train.names
    ]


def _without_unit(readings: Mapping[str, Reading], layout: LandmarkLayout) -> list[str]:
    """Faces whose errors cannot be divided. Whoever has a box has a diagonal."""
    if layout.unit == "diagonal":
        return []
    one, other = (list(numbers) for numbers in unit_landmarks(layout, layout.unit))
    names = [" and ".join(layout.names[i] for i in numbers) for numbers in (one, other)]
    return [
        problem(
            face.file,
            face.line,
            f"landmarks {names[0]} and {names[1]} coincide, expected two points: errors are "
            "divided by their distance",
        )
        for reading in readings.values()
        for face in reading.faces
        if len(face.points) == layout.num_points
        and torch.equal(face.points[one].mean(dim=0), face.points[other].mean(dim=0))
    ]


def _find_subsets(found: Found, root: Path, options: Mapping[str, Any]) -> None:
    """The parts of the test set, by its own attributes or by their lists, and the further ones."""
    test = found.readings["test"]
    if test.told:
        for name in SUBSETS[found.name]:
            keys = {key_of(face) for face in test.faces if name in face.groups}
            found.subsets[name] = keys
        return
    known = {key_of(face) for face in _in_order(test)}
    for name in SUBSETS.get(found.name, ()):
        if test.file is None or find_list(root, found.name, name) is None:
            continue
        part = read_faces(root, found.name, part=name, **{**options, "verify": False})
        strangers = [face for face in part.faces if key_of(face) not in known]
        found.problems += part.problems
        # Faces that the test list has, too, but with a fault are said once.
        if not test.problems:
            found.problems += [
                problem(f.file, f.line, f"a face that is not in {test.file}, expected one of it")
                for f in strangers
            ]
        found.subsets[name] = {key_of(face) for face in part.faces} & known
    for name in FURTHER.get(found.name, ()):
        file = find_list(root, found.name, name)
        if file is None or file == test.file:
            continue
        part = read_faces(root, found.name, part=name, **options)
        if part.problems:
            found.remarks.append(
                f"the further test list {file.name} is not used, for {len(part.problems)} "
                f"problems: {part.problems[0]}"
            )
        else:
            found.others[name] = part


def _count(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
