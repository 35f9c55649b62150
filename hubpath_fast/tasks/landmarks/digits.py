"""scikit-learn's digits as a task of landmarks: real handwriting, no download, on which routing can
pay.

The split is that of the classification (see ``data.digits``): 300 digits to learn from, 797 to test
on, 700 more for the experts, which know one of five renderings each. A digit is drawn at 64 x 64,
turned, scaled and shifted as ink, before it is rendered, so that backgrounds stay whole.

Its five landmarks are the centre of its ink and four soft extremes, in the scan's own frame: with
grey levels w_i at the pixels x_i of the 8 x 8 scan and a direction d, up, down, left or right,

    p_d = sum_i w_i e^(beta d.x_i) x_i / sum_i w_i e^(beta d.x_i),      beta = 2 per pixel.

The topmost pixel itself, beta = infinity, would jump across a digit under noise of one grey level.
Errors are divided by the diagonal of the ink's box (grey above 4 of 16), scaled along.

Letters: n digits, L = 5 landmarks, S = 64 pixels a side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count

import numpy as np
import torch
from torch import Tensor

from ...data.digits import (
    MARGINS,
    RENDERINGS,
    DigitsTask,
    enlarged_scans,
    load_scans,
    rendered_in,
)
from ...data.order import Places, SampleOrder, generator
from ...data.tensors import TensorSet
from ...parallel.share import Share
from .geometry import crop_matrix, transform_points, warp
from .layouts import LandmarkLayout

SIZE = 64  # pixels a side: networks of stride 32 leave 2 x 2, from which a head makes 16 x 16
STRIDE = 4  # pixels a side of a cell of the maps
BETA = 2.0  # per pixel of the scan
INK = 4  # grey levels above it are ink
ROTATION, ROTATION_PROB = 30.0, 0.6  # degrees at most, and how often
SCALING, SHIFT = 0.25, 0.06  # at most: of a digit's size, and of a picture's side
TURNED = list(RENDERINGS).index("turned")

DIGITS_LAYOUT = LandmarkLayout(
    name="digits",
    num_points=5,
    sigma=1.0,
    names=("centre", "up", "down", "left", "right"),
    unit="ink",  # which only the scans tell, not the points
)
DIRECTIONS = ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))  # x, y of each landmark's d; y goes down


def soft_landmarks(scans: np.ndarray, beta: float = BETA) -> np.ndarray:
    """The five landmarks of each digit.

    scans: grey levels [n, h, w]. Returns float64 [n, 5, 2], x and y in pixels, the first pixel's
    centre at (0, 0).
    """
    height, width = scans.shape[1:]
    y, x = np.mgrid[:height, :width].astype(np.float64)
    places = np.stack([x, y], axis=-1).reshape(-1, 2)  # [pixels, 2]
    pull = np.exp(beta * places @ np.array(DIRECTIONS, dtype=np.float64).T)  # [pixels, 5]
    weights = scans.reshape(len(scans), -1, 1) * pull
    return np.einsum("npl,pc->nlc", weights, places) / weights.sum(axis=1)[..., None]


def ink_diagonals(scans: np.ndarray) -> np.ndarray:
    """float64 [n]: of the box around each digit's ink, whole pixels."""
    ink = scans > INK
    sides = []
    for axis in (1, 2):
        there = ink.any(axis=axis)
        last = there.shape[1] - there[:, ::-1].argmax(axis=1)
        sides.append(last - there.argmax(axis=1))
    return np.hypot(*np.array(sides, dtype=np.float64))


@lru_cache(maxsize=1)
def _facts() -> tuple[Tensor, Tensor, Tensor]:
    """Of all digits: pictures uint8 [n, S, S]; landmarks [n, 5, 2] and units [n], float64, both in
    pixels of the pictures, the first pixel's centre at (0, 0)."""
    scans, _ = load_scans()
    margin = SIZE // MARGINS
    step = (SIZE - 2 * margin) / scans.shape[-1]  # a pixel of the scan
    points = margin + step * (soft_landmarks(scans) + 0.5) - 0.5
    facts = enlarged_scans(SIZE), points, step * ink_diagonals(scans)
    return tuple(map(torch.from_numpy, facts))


@dataclass(frozen=True, eq=False)
class Ink:
    """Digits that can be drawn in any pose.

    indices: int64 [n], which. renderings: int64 [n], in which: positions in RENDERINGS.
    """

    indices: Tensor
    renderings: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def subset(self, positions: Tensor) -> Ink:
        return Ink(self.indices[positions], self.renderings[positions])

    def draw(self, draws: torch.Generator | None = None, places: Places | None = None) -> TensorSet:
        """All of them as pictures uint8 [n, 3, S, S].

        draws: where their turns, scales and shifts come from; None: they stay as they were scanned.
        places: where they stand in a batch, if they are a part of one.

        targets: float32 [n, 5, 4], as ``Landmarks`` takes them: x and y in cells of the maps, the
        weight (0 where the point's cell is outside), the unit in cells.
        """
        pictures, points, units = (facts[self.indices] for facts in _facts())
        factor, angle, shift = _poses(len(self), draws, places)
        # Scaled and turned about the middle: 200 pixels a side are a scale of 1.
        middle = torch.full_like(shift, (SIZE - 1) / 2)
        matrix = crop_matrix(middle, SIZE / (200 * factor), angle, SIZE, margin=1.0)
        matrix[:, :, 2] += shift
        if draws is not None:
            pictures = warp(pictures[:, None], matrix, SIZE)[:, 0]
        places = transform_points(matrix, points)
        turned = (self.renderings == TURNED)[:, None, None]
        # A quarter turn counter-clockwise: the upper right corner becomes the upper left one.
        places = torch.where(
            turned, torch.stack([places[..., 1], SIZE - places[..., 0]], -1), places
        )
        return TensorSet(
            images=rendered_in(pictures.numpy(), self.renderings.numpy()),
            targets=_targets(places / STRIDE, factor * units / STRIDE),
            renderings=self.renderings,
            rendering_names=tuple(RENDERINGS),
        )


def _poses(
    n: int, draws: torch.Generator | None, places: Places | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors [n], angles in degrees [n] and shifts in pixels [n, 2], float64."""
    if draws is None:
        zeros = torch.zeros(n, 4, dtype=torch.float64)
        return zeros[:, 0] + 1, zeros[:, 1], zeros[:, 2:]
    count = n if places is None else places.size
    drawn = torch.rand(count, 5, generator=draws, dtype=torch.float64)
    if places is not None:
        drawn = drawn[places.held]
    wide = 2 * drawn - 1  # in [-1, 1)
    angle = torch.where(drawn[:, 0] < ROTATION_PROB, ROTATION * wide[:, 1], 0.0)
    return 1 + SCALING * wide[:, 2], angle, SHIFT * SIZE * wide[:, 3:]


def _targets(points: Tensor, units: Tensor) -> Tensor:
    """points [n, L, 2] and units [n], in cells -> [n, L, 4]."""
    cells = points.floor()
    inside = ((cells >= 0) & (cells < SIZE // STRIDE)).all(dim=-1, keepdim=True)
    units = units[:, None, None].expand(*points.shape[:2], 1)
    return torch.cat([points, inside.to(points), units], dim=-1).float()


class LandmarkDigits:
    """One draw of the task; the split and the renderings are those of ``DigitsTask``.

    seed, num_validation: see there.

    layout: of the five landmarks.
    ink: the digits to learn from, drawn anew at every step; see ``InkStream``.
    target: the same as they were scanned. validation, test: in poses that the seed draws, once.
    All are TensorSets with targets [n, 5, 4], see ``Ink.draw``.
    classes: ``DigitsTask`` at this size, for the experts that are pre-trained as classifiers.
    """

    layout = DIGITS_LAYOUT

    def __init__(self, seed: int = 0, num_validation: int = 0):
        self.seed = seed
        self.classes = DigitsTask(seed, num_validation, SIZE)
        self.ink = self._ink("target")

    def _ink(self, part: str) -> Ink:
        split = self.classes.indices[part], self.classes.renderings[part]
        return Ink(*(torch.from_numpy(numbers.astype(np.int64)) for numbers in split))

    @cached_property
    def target(self) -> TensorSet:
        return self.ink.draw()

    @cached_property
    def validation(self) -> TensorSet:
        return self._ink("validation").draw(generator(self.seed, "landmarks", "validation"))

    @cached_property
    def test(self) -> TensorSet:
        return self._ink("test").draw(generator(self.seed, "landmarks", "test"))

    def mean_shape(self) -> Tensor:
        """float32 [5, 2]: the landmarks of the digits to learn from, as scanned, on average; in
        cells."""
        upright = Ink(self.ink.indices, torch.zeros_like(self.ink.renderings))
        return upright.draw().targets[..., :2].mean(dim=0)


class InkStream:
    """Endless, stateless training batches: the batch of step s, its digits and their poses, is a
    function of (seed, s) alone.

    ink: what is drawn. batch_size: B. seed: any integer. device: where the batches go. share: of a
    batch what is drawn and yielded.
    """

    def __init__(
        self,
        ink: Ink,
        batch_size: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        share: Share = Share(),
    ):
        self.order = SampleOrder(len(ink), batch_size, seed)
        self.places = Places.of(share, batch_size)
        self.ink, self.seed, self.device = ink, seed, torch.device(device)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """images uint8 [B, 3, S, S] and targets float32 [B, 5, 4] of one step; of a share its own
        of these B."""
        indices, places = self.order.indices(step), self.places
        chosen = self.ink.subset(indices if places is None else indices[places.held])
        drawn = chosen.draw(generator(self.seed, "landmarks", "step", step), places)
        return drawn.images.to(self.device), drawn.targets.to(self.device)

    def batches(self, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of steps start_step, start_step + 1, ... without end."""
        for step in count(start_step):
            yield self.batch(step)
