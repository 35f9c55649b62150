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
        self._points = split.points()
        self._units = normalizer(self._points, layout, unit or layout.unit)  # annotated numbers
        centers = [face.center for face in split.faces]
        self._centers = torch.tensor(centers, dtype=torch.float64).view(-1, 2)
        self._scales = torch.tensor([face.scale for face in split.faces], dtype=torch.float64)
        self._flip = None if layout.flip is None else list(layout.flip)
        # At least the default one, so that windows are the same in training and evaluation.
        moved = 1 + jitter + 2 * jitter / MARGIN
        self.reach = max(DEFAULT_REACH, augment.reach if augment else 1.0, moved)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | Draw) -> tuple[Tensor, Tensor]:
        [item] = self.__getitems__([key])
        return item

    def __getitems__(self, keys: Sequence[int | Draw]) -> list[tuple[Tensor, Tensor]]:
        """The items of a batch, as loaders ask for them: what is not the photograph costs more by
        calls than by numbers."""
        indices = [key.index if isinstance(key, Draw) else key for key in keys]
        matrices, mirrored = self._matrices(indices, [self._draws(key) for key in keys])
        targets = self._targets(indices, matrices, mirrored)
        origin = self.split.layout.origin
        crops = (
            read_crop(self.window(i), matrix, self.size, origin)
            for i, matrix in zip(indices, matrices, strict=True)
        )
        return list(zip(crops, targets, strict=True))

    def matrices(self) -> Tensor:
        """float64 [n, 2, 3]: from annotated numbers to the crops, which are not augmented."""
        self._check_still()
        return self._matrices(range(len(self)), [None] * len(self))[0]

    def targets(self) -> Tensor:
        """float32 [n, L, 4]: of all faces, which are not augmented, without their photographs."""
        indices = range(len(self))
        return self._targets(indices, self.matrices(), torch.zeros(len(self), dtype=torch.bool))

    def window(self, index: int) -> Window:
        """From the split's store, or cut from the photograph."""
        split = self.split
        if split.store is not None and split.store.serves(self.size, self.reach):
            return split.store[split.places[index]]
        image = split.load(index)
        height, width = image.shape[1:]
        return cut(image, find_place(split.faces[index], self.size, self.reach, width, height))

    def _check_still(self) -> None:
        if self.augment is not None:
            raise ValueError("augment: an augmented face is another each time, expected None")

    def _draws(self, key: int | Draw) -> Tensor | None:
        """[4] in [0, 1). Always four, so that what one setting draws does not depend on another."""
        if self.augment is None:
            return None
        own = torch.Generator().manual_seed(key.seed) if isinstance(key, Draw) else None
        return torch.rand(4, dtype=torch.float64, generator=own)

    def _matrices(
        self, indices: Sequence[int], draws: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """float64 [n, 2, 3], and bool [n]: which of them mirror."""
        indices = list(indices)
        centers, scales = self._centers[indices], self._scales[indices]
        rotation, mirrored = torch.zeros_like(scales), torch.zeros(len(indices), dtype=torch.bool)
        if self.jitter and indices:
            boxes = torch.stack([_box_draws(i) for i in indices]) * self.jitter
            centers = centers + boxes[:, :2] * (PIXELS_PER_SCALE * scales)[:, None]
            scales = scales * (1 + boxes[:, 2])
        if self.augment is not None and indices:
            how = self.augment
            mirror, turn, angle, larger = torch.stack(draws).unbind(1)
            if how.flip and self._flip is not None:
                mirrored = mirror < 0.5
            rotation = (2 * angle - 1) * how.rotation * (turn < how.rotation_prob)
            scales = scales * (1 + (2 * larger - 1) * how.scaling)
        return crop_matrix(centers, scales, rotation, self.size, MARGIN, mirrored), mirrored

    def _targets(self, indices: Sequence[int], matrices: Tensor, mirrored: Tensor) -> Tensor:
        points = transform_points(matrices, self._points[list(indices)]) / CELL
        if mirrored.any():
            points[mirrored] = points[mirrored][:, self._flip]
        cells = self.size // CELL
        inside = ((points >= 0) & (points < cells)).all(dim=2, keepdim=True)
        # A matrix is a similarity: a column's length is how many pixels a number becomes.
        unit = self._units[list(indices)] * matrices[:, :, 0].norm(dim=1) / CELL
        unit = unit[:, None, None].expand(-1, points.shape[1], 1)
        return torch.cat([points, inside.double(), unit], 2).float()


def _box_draws(index: int) -> Tensor:
    """[3] in [-1, 1): of a detector's box, the same for a face each time."""
    draw = torch.Generator().manual_seed(mix("box", index))
    return 2 * torch.rand(3, generator=draw, dtype=torch.float64) - 1
