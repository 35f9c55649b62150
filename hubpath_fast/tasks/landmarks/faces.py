"""Faces: annotated photographs, the splits that they are in, and what a network is trained on.

Letters: L landmarks, S pixels a side of a crop; a map has S / 4 cells a side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...data.images import drawn_by
from ...data.order import Draw, mix
from .geometry import PIXELS_PER_SCALE, crop_matrix, transform_points
from .layouts import LandmarkLayout
from .metrics import normalizer
from .photos import read_face_image
from .read_mat import MatImage
from .windows import MARGIN, Window, cut, find_place, read_crop

if TYPE_CHECKING:
    from .cache import WindowStore

CELL = 4  # pixels of a crop to each side of a map's cell


@dataclass(frozen=True, eq=False)
class Face:
    """An annotated face: a row of a list.

    image: the photograph's name as the list has it. points: float64 [L, 2], annotated numbers.
    center: of the box, (x, y). scale: its side / 200. source: the photograph. file, line: where it
    stands. groups: the subsets it is in. occluded: bool [L]; None: not told. origin: the annotated
    number of the first pixel's centre. upright: whether the photograph is turned as EXIF says
    before the numbers mean anything. size: (width, height) of the photograph; None: not looked at.
    """

    image: str
    points: Tensor
    center: tuple[float, float]
    scale: float
    source: Path | MatImage
    file: Path
    line: int
    groups: tuple[str, ...] = ()
    occluded: Tensor | None = None
    origin: int = 0
    upright: bool = False
    size: tuple[int, int] | None = None

    def pixels(self) -> Tensor:
        """uint8 [3, H, W]; DataError, with the path, if the photograph is broken."""
        if isinstance(self.source, MatImage):
            return self.source.read()
        return read_face_image(self.source, self.upright)

    def outside(self) -> Tensor:
        """bool [L]: the landmarks that lie outside the photograph, whose size must be known."""
        low, high = self.origin - 0.5, torch.tensor(self.size) + self.origin - 0.5
        return ((self.points < low) | (self.points >= high)).any(dim=1)

    def __getstate__(self) -> dict[str, Any]:
        # Tensors that are sent to another process take a file handle each.
        state = dict(self.__dict__)
        for name in ("points", "occluded"):
            if state[name] is not None:
                state[name] = state[name].numpy()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in ("points", "occluded"):
            if state[name] is not None:
                state[name] = torch.from_numpy(state[name])
        self.__dict__.update(state)


@dataclass(frozen=True, eq=False)
class FaceSplit:
    """faces: in order. layout: of their landmarks. store: their windows, already cut, and
    ``places``: which of them are this split's."""

    faces: tuple[Face, ...]
    layout: LandmarkLayout
    store: WindowStore | None = None
    places: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.faces)

    def load(self, index: int) -> Tensor:
        """The photograph of a face, uint8 [3, H, W]; DataError that names it if it is broken."""
        return self.faces[index].pixels()

    def subset(self, indices: Sequence[int]) -> FaceSplit:
        places = tuple(self.places[i] for i in indices) if self.places else ()
        return dataclasses.replace(self, faces=tuple(self.faces[i] for i in indices), places=places)

    def points(self) -> Tensor:
        """float64 [n, L, 2]: annotated numbers of all faces."""
        if not self.faces:
            return torch.empty(0, self.layout.num_points, 2, dtype=torch.float64)
        return torch.stack([face.points for face in self.faces])


@dataclass(frozen=True)
class FaceSplits:
    """A data set of faces.

    train, validation (what settings and checkpoints are chosen by; perhaps empty) and test.
    test_is_validation: there is no test list, and validation stands in for it. notes: what to know
    of it. changes: what has changed in the data since a run began with it. parts: the splits that
    the data itself has. subsets: positions in test, by the names of published parts of it. others:
    further test sets, which are no part of test: 300W's "test" of 600.
    """

    layout: LandmarkLayout
    train: FaceSplit
    validation: FaceSplit
    test: FaceSplit
    test_is_validation: bool
    notes: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    parts: Mapping[str, FaceSplit] = field(default_factory=dict)
    subsets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    others: Mapping[str, FaceSplit] = field(default_factory=dict)

    @property
    def distinct(self) -> dict[str, FaceSplit]:
        """The splits by name, each face once: without test where validation stands in for it."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        if self.test_is_validation:
            del splits["test"]
        return splits

    def subset(self, name: str) -> FaceSplit:
        """A part of test, or another test set, by name; ValueError with the names there are."""
        if name in self.subsets:
            return self.test.subset(self.subsets[name])
        if name in self.others:
            return self.others[name]
        known = ", ".join([*self.subsets, *self.others]) or "none"
        raise ValueError(f"subset: expected one of this data ({known}), got {name!r}")


@dataclass(frozen=True)
class FaceAugment:
    """How training faces are moved: mirrored half of the time (if ``flip``, and where the layout
    knows its pairs), turned by U(-rotation, rotation) degrees with ``rotation_prob``, and their box
    made larger by U(1 - scaling, 1 + scaling)."""

    flip: bool = True
    rotation: float = 30.0
    rotation_prob: float = 0.6
    scaling: float = 0.25

    @property
    def reach(self) -> float:
        """What crops cover, in halves of the evaluation crop's side, to each side of its centre."""
        turn = math.radians(min(self.rotation, 45.0)) if self.rotation_prob else 0.0
        return (1 + self.scaling) * (math.cos(turn) + math.sin(turn))


DEFAULT_REACH = FaceAugment().reach


class FaceDataset(Dataset):
    """Items (crop uint8 [3, S, S], target float32 [L, 4]) of a split.

    A target's rows are x and y in cells of the map, the weight, 0 only where that cell lies outside
    the map, and the unit that errors are divided by, in cells.

    Args:
        split: of faces.
        size: S, a multiple of 4.
        unit: "ocular", "pupil", "diagonal" or "I-J"; None: the layout's.
        augment: None: the face's own box, unturned, as in evaluation.
        jitter: j: boxes are shifted by U(-j, j) of their side to each axis and made larger by
            U(1 - j, 1 + j), the same for a face each time, as a detector would give them.

    ``dataset[i]`` draws from torch's generator, ``dataset[Draw(i, seed)]`` by the seed alone.
    """

    def __init__(
        self,
        split: FaceSplit,
        size: int,
        unit: str | None = None,
        augment: FaceAugment | None = None,
        jitter: float = 0.0,
    ):
        if size < CELL or size % CELL:
            raise ValueError(f"size: expected a multiple of {CELL} pixels a side, got {size}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter: expected a share from 0 to below 1, got {jitter}")
        self.split, self.size, self.augment, self.jitter = split, size, augment, jitter
        layout = split.layout
        self.units = normalizer(split.points(), layout, unit or layout.unit)  # annotated numbers
        # At least the default one, so that windows are the same in training and evaluation.
        moved = 1 + jitter + 2 * jitter / MARGIN
        self.reach = max(DEFAULT_REACH, augment.reach if augment else 1.0, moved)
        self._flip = None if layout.flip is None else list(layout.flip)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | Draw) -> tuple[Tensor, Tensor]:
        if isinstance(key, Draw):
            with drawn_by(key.seed):
                return self[key.index]
        matrix, mirrored = self._matrix(key)
        crop = read_crop(self.window(key), matrix[0], self.size, self.split.layout.origin)
        return crop, self._target(key, matrix, mirrored)

    def matrix(self, index: int) -> Tensor:
        """float64 [2, 3]: from a face's annotated numbers to its crop, unless that is augmented."""
        return self._still(index)[0]

    def targets(self) -> Tensor:
        """float32 [n, L, 4]: the targets of all faces, without reading a photograph, unless these
        are augmented."""
        found = [self._target(i, self._still(i), False) for i in range(len(self))]
        return torch.stack(found) if found else torch.empty(0, self.split.layout.num_points, 4)

    def window(self, index: int) -> Window:
        """From the split's store, or cut from the photograph."""
        split = self.split
        if split.store is not None and split.store.serves(self.size, self.reach):
            return split.store[split.places[index]]
        image = split.load(index)
        height, width = image.shape[1:]
        return cut(image, find_place(split.faces[index], self.size, self.reach, width, height))

    def _still(self, index: int) -> Tensor:
        """float64 [1, 2, 3]."""
        if self.augment is not None:
            raise ValueError("augment: an augmented face is another each time, expected None")
        return self._matrix(index)[0]

    def _matrix(self, index: int) -> tuple[Tensor, bool]:
        """float64 [1, 2, 3], and whether it mirrors."""
        face = self.split.faces[index]
        center = torch.tensor([face.center], dtype=torch.float64)
        scale, rotation, mirrored = face.scale, 0.0, False
        if self.augment is not None:
            # Always four, so that what one setting draws does not depend on another.
            mirror, turn, angle, larger = torch.rand(4, dtype=torch.float64).tolist()
            mirrored = self.augment.flip and self._flip is not None and mirror < 0.5
            if turn < self.augment.rotation_prob:
                rotation = (2 * angle - 1) * self.augment.rotation
            scale *= 1 + (2 * larger - 1) * self.augment.scaling
        if self.jitter:
            draw = torch.Generator().manual_seed(mix("box", index))
            right, down, larger = torch.rand(3, generator=draw, dtype=torch.float64).tolist()
            side = PIXELS_PER_SCALE * face.scale * self.jitter
            center += torch.tensor([[(2 * right - 1) * side, (2 * down - 1) * side]])
            scale *= 1 + (2 * larger - 1) * self.jitter
        turned = torch.tensor([rotation], dtype=torch.float64)
        scales = torch.tensor([scale], dtype=torch.float64)
        flip = torch.tensor([True]) if mirrored else None
        return crop_matrix(center, scales, turned, self.size, MARGIN, flip), mirrored

    def _target(self, index: int, matrix: Tensor, mirrored: bool) -> Tensor:
        [points] = transform_points(matrix, self.split.faces[index].points[None]) / CELL
        if mirrored:
            points = points[self._flip]
        cells = self.size // CELL
        inside = ((points >= 0) & (points < cells)).all(dim=1, keepdim=True)
        # The matrix is a similarity: a column's length is how many pixels a number becomes.
        unit = (self.units[index] * matrix[0, :, 0].norm() / CELL).expand(len(points), 1)
        return torch.cat([points, inside.double(), unit], 1).float()
