"""Lists of annotated faces, of the published sets and of a user's own: records and problems.

A problem is "file:line: what it is, expected what". All of them are found in one go, and a row
without one is what it would be if all others were right, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...data.copies import of_each_file
from ...data.layouts import DataError
from ...fields import there_are
from .faces import Face
from .geometry import PIXELS_PER_SCALE, box_of_points
from .layouts import LAYOUTS, LandmarkLayout
from .photos import Look, look
from .places import LISTS, OWN, ImageFinder, find_list
from .read_csv import read_hrnet_csv, read_own_csv
from .read_lists import ATTRIBUTES, read_wflw_list
from .read_mat import MatImage, kind_of, read_cofw
from .rows import Listing, Row, encoding_fault, problem

BOXES = ("file", "points")
SUBSETS = (*ATTRIBUTES, "common", "challenge")


def read_landmarks(
    path: str | Path,
    name: str | None,
    images: str | Path | None = None,
    part: str | None = None,
) -> tuple[list[Face], list[str]]:
    """(records, problems) of a list of annotated faces.

    Args:
        path: a list, or the folder of a set.
        name: "300w" or "wflw": HRNet's CSV (one header line, then columns by position), or WFLW's
            own list; "cofw": a .mat of MATLAB 7.3 (by h5py) or older (by scipy); "csv", "folder" or
            None: a user's own list, ``image,x,y,...`` or ``image,left_eye_x,left_eye_y,...``,
            perhaps with columns scale,center_x,center_y or box_x0,box_y0,box_x1,box_y1.
        images: the folder of the photographs; None: beside the list, or in images/ there.
        part: of a folder "train" (None), "test" or a subset such as "largepose" or "common"; of
            WFLW's own list a subset; of a .mat "train" or "test", None: whichever is there.

    Returns:
        The faces that are right, and a string for each fault: "file:line: what, expected what".

    Raises:
        ValueError: a name or a part that there is none of.
        DataError: h5py, which the file needs, is not installed.
    """
    reading = read_faces(Path(path), set_name(name), images, part)
    return reading.faces, sorted(reading.problems + reading.repeated, key=_line_of)


@dataclass
class Reading:
    """What is in a list. faces: that are right. repeated: a problem for each face that stands there
    again, and ``again``: these faces. names: of the landmarks, of a user's list. boxed: whether the
    list gives boxes. told: whether it says of each face which groups it is in. turned: photographs
    that carry an orientation. missing: those that are not there. file: None: there is none."""

    file: Path | None = None
    faces: list[Face] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    again: list[Face] = field(default_factory=list)
    names: tuple[str, ...] = ()
    boxed: bool = False
    told: bool = False
    turned: list[str] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)


def set_name(name: str | None) -> str | None:
    """A published set's name, or None for a user's own list; ValueError if it is neither."""
    if name in OWN:
        return None
    plain = str(name).strip().lower().replace("-", "").replace("_", "")
    if plain in LAYOUTS:
        return plain
    known = (*LAYOUTS, *(own for own in OWN if own))
    raise ValueError(f"name {name!r} is unknown; {there_are(known, plain)}")


def read_faces(
    path: Path,
    name: str | None,
    images: str | Path | None = None,
    part: str | None = None,
    box: str = "file",
    verify: bool = True,
    decode: bool = False,
) -> Reading:
    """``read_landmarks``, with what else is to be known. box: "points": made from the points even
    where the list has one. verify: look at the head of every photograph; else only whether it is
    there. decode: at all its pixels."""
    if part is not None and part not in LISTS[name]:
        raise ValueError(f"part: expected one of {', '.join(LISTS[name])}, got {part!r}")
    group = None
    if images is not None and not Path(images).is_dir():
        what = "no such folder, expected the one of the images"
        return Reading(problems=[problem(images, None, what)])
    if path.is_dir():
        part = part or "train"
        file = find_list(path, name, part)
        if file is None and name == "wflw" and part in ATTRIBUTES:
            file, group = find_list(path, name, "test"), part
        if file is None:
            wanted = " or ".join(_files(name, part))
            return Reading(problems=[problem(path, None, f"no {part} list, expected {wanted}")])
    elif path.is_file():
        file, group = path, part
    else:
        return Reading(problems=[problem(path, None, "no such file, expected a list of faces")])
    listing = _listing(file, name, part)
    if group in SUBSETS and listing.told:
        listing.rows = [row for row in listing.rows if group in row.groups]
    elif group in SUBSETS and listing.rows and group not in file.name:
        listing.rows = []
        listing.add(
            None, f"nothing tells which faces are {group}, expected {_files(name, group)[0]}"
        )
    reading = Reading(file, problems=listing.problems, names=listing.names, told=listing.told)
    reading.boxed = any(row.box is not None for row in listing.rows)
    _make_faces(reading, listing, name, images, box, verify, decode)
    reading.problems.sort(key=_line_of)
    return reading


def _files(name: str | None, part: str) -> Sequence[str]:
    return LISTS[name][part]


def _listing(file: Path, name: str | None, part: str | None) -> Listing:
    """By the file's first bytes: a .mat, WFLW's own list, or CSV."""
    try:
        kind = kind_of(file)
    except OSError as error:
        return Listing(file, problems=[problem(file, None, f"{error.strerror}, expected a list")])
    if name == "cofw":
        return read_cofw(file, {"full": "test"}.get(part, part))
    if kind is not None:
        what = "a MATLAB file, expected CSV; COFW's are read by the name cofw"
        return Listing(file, problems=[problem(file, None, what)])
    if name is None:
        return read_own_csv(file)
    if name == "wflw" and _is_wflw_list(file):
        return read_wflw_list(file)
    return read_hrnet_csv(file, LAYOUTS[name])


def _is_wflw_list(file: Path) -> bool:
    """Most of its first line are numbers, with blanks between them."""
    with open(file, "rb") as stream:
        first = stream.readline()
    return b"," not in first or len(first.split()) > 100


def _make_faces(
    reading: Reading,
    listing: Listing,
    name: str | None,
    images: str | Path | None,
    box: str,
    verify: bool,
    decode: bool,
) -> None:
    """Fills in the faces, and problems with photographs, boxes and points."""
    layout, rows = LAYOUTS.get(name), listing.rows
    finder = ImageFinder(reading.file, images)
    sources = {row.name: row.source or finder.find(row.name) for row in rows}
    if images is None and len(sources) > 1 and not any(sources.values()):
        # Said once: of a list without its photographs the rows may all be right.
        reading.problems.append(
            problem(
                reading.file,
                None,
                f"none of its {len(sources)} images is there, expected them in "
                f"{_shown(finder.folders)}, or their folder given",
            )
        )
        sources = {name: finder.folders[0] / name for name in sources}
        verify = False
    looks = _looks(sources, verify, decode)
    reading.turned = [name for name, seen in looks.items() if seen.orientation != 1]
    reading.missing = {name for name, source in sources.items() if source is None}
    seen: dict[tuple, int] = {}
    for row in rows:
        source = sources[row.name]
        fault = None
        if source is None and listing.guessed is not None and not row.name.isascii():
            fault = encoding_fault(listing.guessed, row.line)
        elif source is None:
            fault = f"there is no image {row.name!r}, expected it in {_shown(finder.folders)}"
        elif row.name in looks and looks[row.name].fault is not None:
            why = looks[row.name].fault
            fault = f"the image {row.name!r} cannot be read: {why}, expected a whole one"
        made = _face(reading.file, row, source, layout, box, looks.get(row.name))
        if fault is None and isinstance(made, str):
            fault = made
        if fault is not None:
            reading.problems.append(problem(reading.file, row.line, fault))
            continue
        key = (str(source), row.points.numpy().tobytes())
        first = seen.setdefault(key, row.line)
        if first != row.line:
            what = f"the same face as in line {first} (image and points), expected each face once"
            reading.repeated.append(problem(reading.file, row.line, what))
            reading.again.append(made)
            continue
        reading.faces.append(made)


def _face(
    file: Path,
    row: Row,
    source: Path | MatImage | None,
    layout: LandmarkLayout | None,
    box: str,
    seen: Look | None,
) -> Face | str:
    """A face, or what is wrong with its points or its box."""
    points = row.points
    if bool((points == points[0]).all()):
        return f"all points lie at {_at(points[0])}, expected a face with some extent"
    if layout is not None and layout.outer_eye_corners is not None:
        first, second = layout.outer_eye_corners
        if torch.equal(points[first], points[second]):
            return (
                f"the outer eye corners, landmarks {first} and {second}, coincide at "
                f"{_at(points[first])}, expected two points: errors are divided by their distance"
            )
    scale, x, y = row.box if row.box is not None and box == "file" else box_of_points(points)
    origin, upright = (0, True) if layout is None else (layout.origin, False)
    size = None if seen is None else seen.shown_size(upright)
    if size is not None:
        half = PIXELS_PER_SCALE * scale / 2
        left, right = x - half - origin, x + half - origin
        top, bottom = y - half - origin, y + half - origin
        if right <= -0.5 or bottom <= -0.5 or left >= size[0] - 0.5 or top >= size[1] - 0.5:
            return (
                f"the box ({left:g}, {top:g} to {right:g}, {bottom:g}) lies outside of the image "
                f"{row.name!r}, expected a box that touches its {size[0]} x {size[1]} pixels"
            )
    return Face(
        row.name,
        points,
        (x, y),
        scale,
        source,
        file,
        row.line,
        row.groups,
        row.occluded,
        origin,
        upright,
        size,
    )


def _looks(
    sources: dict[str, Path | MatImage | None], verify: bool, decode: bool
) -> dict[str, Look]:
    """What the photographs are, by name; nothing without ``verify``."""
    if not verify:
        return {}
    names = [name for name, source in sources.items() if source is not None]

    def of(source: Path | MatImage) -> Look:
        if not isinstance(source, MatImage):
            return look(source, decode)
        try:
            if decode:
                source.read()
            return Look(source.shape())
        except DataError as error:
            return Look(fault=str(error))

    found = of_each_file([sources[name] for name in names], of)
    lost = Look(fault="it went away just now")
    return {name: seen or lost for name, seen in zip(names, found, strict=True)}


def _shown(folders: Sequence[Path]) -> str:
    return " or ".join(map(str, folders[:2]))


def _at(point: torch.Tensor) -> str:
    x, y = point.tolist()
    return f"({x:g}, {y:g})"


def _line_of(text: str) -> tuple[int, str]:
    """In the order of the file."""
    for part in text.split(":"):
        if part.isdigit():
            return int(part), text
    return 0, text


def faces_by_image(faces: Sequence[Face]) -> Iterator[tuple[Path | MatImage, list[int]]]:
    """Photographs in the order of their first face, with the positions of their faces."""
    places: dict[Path | MatImage, list[int]] = {}
    for i, face in enumerate(faces):
        places.setdefault(face.source, []).append(i)
    yield from places.items()
