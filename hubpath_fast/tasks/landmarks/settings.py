"""Of a task of landmarks: its points, its targets, its heads, and how training faces are moved."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...fields import Settings, setting
from .digits import DIGITS_LAYOUT
from .layouts import LAYOUTS, LandmarkLayout, flip_of_pairs
from .maps import KINDS
from .metrics import UNITS, unit_landmarks
from .read import BOXES

_PAIR = re.compile(r"(\d+)-(\d+)")


def read_pairs(text: str) -> list[tuple[int, int]]:
    """ "0-32,1-31" -> [(0, 32), (1, 31)]; ValueError unless it is pairs of landmarks."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    found = [_PAIR.fullmatch(part) for part in parts]
    if not parts or not all(found):
        raise ValueError(f"flip_pairs: expected pairs of landmarks such as 0-32,1-31, got {text!r}")
    return [(int(pair[1]), int(pair[2])) for pair in found]


def _pairs(value: Any) -> Any:
    if isinstance(value, str):
        read_pairs(value)
    return value


def _unit(value: Any) -> Any:
    if isinstance(value, str) and value not in UNITS and not _PAIR.fullmatch(value):
        raise ValueError(
            f"unit: expected one of {', '.join(UNITS)}, or two landmarks such as 36-45, got "
            f"{value!r}"
        )
    return value


@dataclass(frozen=True, kw_only=True)
class LandmarkSettings(Settings):
    """See ``hubpath landmarks fit``; the presets landmarks-300w, -wflw and -cofw are the paper's.

    All of them are added settings: a run of another task is what it was without them.
    """

    targets: str = setting(
        "subpixel",
        "what maps are taught: a bump about the point itself, or, as published, about the middle "
        "of the cell that it lies in",
        choices=KINDS, added=True,
    )  # fmt: skip
    sigma: float | None = setting(
        None, "of the bumps, in cells of the map; None: the set's own, 1.5 for your own faces",
        above=0, added=True,
    )  # fmt: skip
    head_width: int = setting(
        256, "channels of the deconvolutions between a network and its maps", low=1, added=True
    )
    unit: str | None = setting(
        None,
        "what errors are divided by: ocular (outer eye corners), pupil, diagonal (of the box of "
        "the points) or two landmarks such as 36-45; None: the set's, diagonal for your own",
        convert=_unit, added=True,
    )  # fmt: skip
    flip_pairs: str | None = setting(
        None,
        "landmarks that change places in a mirror, such as 0-32,1-31, of your own faces; None: "
        "faces are not mirrored",
        convert=_pairs, added=True,
    )  # fmt: skip
    images: str | None = setting(
        None, "folder that the images of your own list lie in; None: the list's",
        free=True, added=True, convert=str,
    )  # fmt: skip
    box: str = setting(
        "file",
        "where the box of a face comes from: the list, or its points by the published rule; a list "
        "without boxes is always done by the points",
        choices=BOXES, added=True,
    )  # fmt: skip
    rotation: float = setting(
        30.0, "degrees that a training face is turned by at most", low=0, high=180, added=True
    )
    rotation_prob: float = setting(0.6, "of turning it at all", low=0, high=1, added=True)
    scaling: float = setting(
        0.25, "that its box is made larger or smaller by at most, as a share", low=0, below=1,
        added=True,
    )  # fmt: skip


def layout_for(dataset: str, names: Sequence[str], settings: LandmarkSettings) -> LandmarkLayout:
    """The landmarks of a set that is published, or of one's own faces, whose landmarks are called
    ``names``; with the unit and, of one's own, the mirror that the settings say.

    Raises ValueError where they name landmarks that there are none of.
    """
    layout, pairs = LAYOUTS.get(dataset), settings.flip_pairs
    if dataset == DIGITS_LAYOUT.name:
        layout = DIGITS_LAYOUT
        if settings.unit is not None:
            raise ValueError(f"unit: digits have their own, got {settings.unit!r}; leave it out")
    if layout is None:
        names = tuple(names)
        layout = LandmarkLayout(dataset, len(names), names=names)
        if pairs is not None:
            flip = flip_of_pairs(read_pairs(pairs), len(names))
            layout = dataclasses.replace(layout, flip=flip)
    elif pairs is not None:
        raise ValueError(f"flip_pairs: {dataset} has its own, got {pairs!r}; leave it out")
    if settings.unit is None:
        return layout
    if settings.unit != "diagonal":
        unit_landmarks(layout, settings.unit)  # refuses what is not there
    return dataclasses.replace(layout, unit=settings.unit)
