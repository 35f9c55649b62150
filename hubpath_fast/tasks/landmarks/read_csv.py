"""Lists as CSV: HRNet's of 300W and WFLW, by position, and a user's own, by their header."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...data.layouts import DataError
from ...data.text import read_text
from .layouts import LandmarkLayout
from .rows import Listing, Row, as_points, read_numbers

IMAGE_COLUMNS = ("image", "image_name", "image_path", "file", "file_name", "filename", "path")
# Of a box, in the order of scale, centre x, centre y; or of its corners.
BOXES = (
    ("scale", "center_x", "center_y"),
    ("scale", "center_w", "center_h"),
    ("box_x0", "box_y0", "box_x1", "box_y1"),
)
OWN_HEADER = "image,x,y,x,y,... or image,NAME_x,NAME_y,..."
PUBLISHED_HEADER = ("image_name", "scale", "center_w", "center_h")
UNNAMED = re.compile(r"|(original|point|landmark|kp|p)?_*\d*")  # says no more than a number


def read_hrnet_csv(file: Path, layout: LandmarkLayout) -> Listing:
    """One header line, then image, scale, centre x, centre y, and x and y of each landmark, by
    position: 140 columns for 300W, 200 for WFLW."""
    listing = Listing(file)
    lines = _table(listing)
    if not lines:
        return listing
    columns = [
        *PUBLISHED_HEADER,
        *(f"{axis}{i}" for i in range(layout.num_points) for axis in "xy"),
    ]
    wanted = f"{len(columns)} columns: {','.join(PUBLISHED_HEADER)} and {layout.num_points} points"
    number, header = lines[0]
    if len(header) == len(columns) and not read_numbers(header[1:], columns[1:])[1]:
        listing.add(number, f"the first line is a face, expected a header before it ({wanted})")
        return listing
    if len(header) != len(columns) and all(len(cells) != len(columns) for _, cells in lines[1:]):
        listing.add(number, f"{len(header)} columns, expected {wanted}")
        return listing
    _check_any(listing, lines)
    listing.rows = list(_faces(listing, lines[1:], columns, Columns.by_position(len(columns))))
    return listing


def read_own_csv(file: Path) -> Listing:
    """A user's list: a header that begins with ``image``, perhaps a box, and pairs of columns."""
    listing = Listing(file)
    lines = _table(listing)
    if not lines:
        return listing
    number, header = lines[0]
    header = [name.strip() for name in header]
    columns = _own_columns(listing, number, header)
    if columns is None:
        return listing
    listing.names = columns.names
    _check_any(listing, lines)
    listing.rows = list(_faces(listing, lines[1:], header, columns))
    return listing


@dataclass(frozen=True)
class Columns:
    """Where what stands. box: as one of ``BOXES``, or empty. points: x, y, x, y, ..."""

    box: tuple[int, ...]
    points: tuple[int, ...]
    names: tuple[str, ...] = ()

    @classmethod
    def by_position(cls, count: int) -> Columns:
        return cls((1, 2, 3), tuple(range(4, count)))


def _table(listing: Listing) -> list[tuple[int, list[str]]]:
    """Lines with their numbers, without blank ones; none, and a problem, of what is no text.

    Each line is read by itself, so that a quote that is not closed spoils no other.
    """
    try:
        text = read_text(listing.file)
    except DataError as error:
        listing.problems.append(_with_colons(str(error)))
        return []
    listing.guessed = text if text.guessed else None
    lines: list[tuple[int, list[str]]] = []
    for number, line in enumerate(text.lines, start=1):
        if not line.strip():
            continue
        try:
            [cells] = csv.reader([line], skipinitialspace=True, strict=True)
        except csv.Error as error:
            listing.add(number, f"no CSV ({error}), expected names in whole quotes, or in none")
            continue
        if any(cell.strip() for cell in cells):
            lines.append((number, cells))
    if not lines and not listing.problems:
        listing.add(None, f"an empty file, expected a header line ({OWN_HEADER}) and a line a face")
    return lines


def _check_any(listing: Listing, lines: Sequence[tuple[int, list[str]]]) -> None:
    if len(lines) == 1 and not listing.problems:
        listing.add(lines[0][0], "no face after this line, expected a line a face")


def _with_colons(message: str) -> str:
    """ "FILE, line 3: ..." as all problems are written."""
    return re.sub(r", line (\d+): ", r":\1: ", message, count=1).replace(
        "; ", ", expected UTF-8: ", 1
    )


def _faces(
    listing: Listing,
    lines: Sequence[tuple[int, list[str]]],
    header: Sequence[str],
    columns: Columns,
) -> Iterator[Row]:
    """The rows that are right; a problem for each that is not."""
    where = [*columns.box, *columns.points]
    names = [header[i] or str(i + 1) for i in where]
    for line, cells in lines:
        if len(cells) != len(header):
            listing.add(line, f"{len(cells)} columns, expected {len(header)} as in the header")
            continue
        if not cells[0].strip():
            listing.add(line, "no image (its column is empty), expected the name of a file")
            continue
        values, fault = read_numbers([cells[i] for i in where], names)
        box, split = None, len(columns.box)
        if fault is None and split:
            box, fault = _box(values[:split])
        if fault is not None:
            listing.add(line, fault)
            continue
        yield Row(line, cells[0], as_points(values[split:]), box)


def _box(values: Sequence[float]) -> tuple[tuple[float, float, float] | None, str | None]:
    """(scale, centre x, centre y) of a box as written, or what is wrong with it."""
    if len(values) == 3:
        if values[0] > 0:
            return tuple(values), None
        return None, f"scale {values[0]:g}, expected a number above 0 (a box's side / 200)"
    left, top, right, bottom = values
    if right <= left or bottom <= top:
        return None, (
            f"the box {left:g},{top:g},{right:g},{bottom:g} is empty, expected box_x0 < box_x1 and "
            "box_y0 < box_y1"
        )
    scale = max(right - left, bottom - top) / 200
    return (scale, (left + right) / 2, (top + bottom) / 2), None


def _own_columns(listing: Listing, number: int, header: list[str]) -> Columns | None:
    """Where what stands, by the header; None and a problem where that cannot be told."""
    lower = [name.lower() for name in header]
    if len(header) == 1 and (separator := next((s for s in ";\t" if s in header[0]), None)):
        listing.add(
            number, f"columns are separated by {separator!r}, expected commas: {OWN_HEADER}"
        )
        return None
    if lower[0] not in IMAGE_COLUMNS:
        found = (
            f"the first column is {header[0]!r}" if header[0] else "the first column has no name"
        )
        if all(not read_numbers([cell], ["x"])[1] for cell in header[1:]):
            found = "no header line"
        listing.add(number, f"{found}, expected a header such as {OWN_HEADER}")
        return None
    box = next((found for names in BOXES if (found := _all_of(names, lower))), ())
    known = {name for names in BOXES for name in names}
    rest = [i for i in range(1, len(header)) if i not in box]
    odd = [header[i] for i in rest if lower[i] in known]
    if odd:
        wanted = " or ".join(",".join(names) for names in BOXES)
        listing.add(number, f"a part of a box ({','.join(odd)}), expected all of {wanted}")
        return None
    names = _pairs(listing, number, header, rest)
    return None if names is None else Columns(box, tuple(rest), names)


def _all_of(names: Sequence[str], header: Sequence[str]) -> tuple[int, ...]:
    return tuple(map(header.index, names)) if all(name in header for name in names) else ()


def _pairs(
    listing: Listing, number: int, header: Sequence[str], rest: Sequence[int]
) -> tuple[str, ...] | None:
    """Names of the landmarks, from the pairs of columns; None and a problem if they are none."""
    wanted = "expected pairs such as x,y or left_eye_x,left_eye_y"
    if not rest:
        listing.add(number, f"no columns of points, {wanted}")
        return None
    names = []
    for at in range(0, len(rest), 2):
        pair = [header[i] for i in rest[at : at + 2]]
        parts = [_axis(name) for name in pair]
        if (
            len(pair) == 1
            or [axis for axis, _ in parts] != ["x", "y"]
            or parts[0][1] != parts[1][1]
        ):
            shown = " and ".join(map(repr, pair))
            where = f"column {rest[at] + 1}" + (f" and {rest[at + 1] + 1}" if len(pair) > 1 else "")
            listing.add(number, f"{where}: {shown} is no pair, {wanted}")
            return None
        names.append(parts[0][1])
    twice = sorted({name for name in names if names.count(name) > 1})
    if all(UNNAMED.fullmatch(name.lower()) for name in names):
        return tuple(map(str, range(len(names))))
    if twice:
        listing.add(number, f"the landmark {twice[0]!r} stands twice, expected different names")
        return None
    return tuple(names)


def _axis(column: str) -> tuple[str, str]:
    """("x", "left_eye") of "left_eye_x", ("x", "3") of "x3"; ("", ...) where it says no axis."""
    name = column.strip()
    if match := re.fullmatch(r"(?i)(.*?)[ _.-]*([xy])", name):
        return match[2].lower(), match[1]
    if match := re.fullmatch(r"(?i)([xy])[ _.-]*(\d+)", name):
        return match[1].lower(), match[2]
    return "", name
