"""WFLW's own lists: a line a face, 207 fields separated by blanks.

196 coordinates, 4 of a detector's box (x0 y0 x1 y1), 6 attributes (pose, expression, illumination,
make-up, occlusion, blur; 0 or 1) and the image's name. The published box is not the detector's but
is made from the points. Lists without box and attributes have 197 fields.
"""

from __future__ import annotations

from pathlib import Path

from ...data.layouts import DataError
from ...data.text import read_text
from .rows import Listing, Row, as_points, read_numbers

# As the published subsets are called, in the order of the attributes.
ATTRIBUTES = ("largepose", "expression", "illumination", "makeup", "occlusion", "blur")
COORDINATES = 196
BOX = ("box x0", "box y0", "box x1", "box y1")
COLUMNS = (*(f"{axis}{i}" for i in range(COORDINATES // 2) for axis in "xy"), *BOX, *ATTRIBUTES)
FIELDS = len(COLUMNS) + 1
PLAIN_FIELDS = COORDINATES + 1


def read_wflw_list(file: Path) -> Listing:
    """WFLW's own list; the groups of a face are its attributes that are 1."""
    listing = Listing(file)
    try:
        lines = read_text(file).lines
    except DataError as error:
        listing.add(None, f"{error}, expected WFLW's list or CSV")
        return listing
    numbered = [(i, line) for i, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        listing.add(None, f"an empty file, expected a line a face of {FIELDS} fields")
        return listing
    counts = [len(line.split(None, FIELDS - 1)) for _, line in numbered]
    # A name may hold blanks, so that a list of 197 fields is known by all its lines.
    plain = all(count < FIELDS for count in counts) and counts.count(PLAIN_FIELDS) > len(counts) / 2
    fields = PLAIN_FIELDS if plain else FIELDS
    listing.told = not plain
    for line, text in numbered:
        cells = text.strip().split(None, fields - 1)
        if len(cells) != fields:
            listing.add(
                line,
                f"{len(cells)} fields, expected {fields}: {COORDINATES} coordinates, "
                + ("" if plain else "4 of a box, 6 attributes, ")
                + "and the image",
            )
            continue
        values, fault = read_numbers(cells[:-1], COLUMNS[: fields - 1])
        flags = values[COORDINATES + len(BOX) :]
        if fault is None and set(flags) - {0.0, 1.0}:
            fault = (
                f"the attributes {' '.join(cells[-7:-1])}, expected 6 of 0 or 1 before the image"
            )
        if fault is not None:
            listing.add(line, fault)
            continue
        groups = tuple(name for name, flag in zip(ATTRIBUTES, flags) if flag)  # noqa: B905
        listing.rows.append(Row(line, cells[-1], as_points(values[:COORDINATES]), groups=groups))
    return listing
