"""What of a photograph the crops of one face are read from.

A window is a rectangle of whole source pixels that holds every crop that training may draw of the
face, reduced by a whole factor f, the mean of f x f pixels, where the face's own crop shrinks f
times or more, f >= 2. It depends on the face, the crop's size and the reach alone, so that a crop
is the same to the bit whether its window was cut just now or is read from a cache.

Letters: S pixels a side of a crop, h x w of a window, H x W of a photograph.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .geometry import PIXELS_PER_SCALE, warp

if TYPE_CHECKING:
    from .faces import Face

MARGIN = 1.25  # crops are this much larger than the box of the points
BORDER = 6  # pixels of a window, beyond what crops cover, that means and interpolation touch


class Place(NamedTuple):
    """Where a window is cut: source pixels left .. right - 1, top .. bottom - 1, both whole blocks
    of ``factor``; the last block may lie partly outside the photograph."""

    left: int
    top: int
    right: int
    bottom: int
    factor: int

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w)."""
        return (self.bottom - self.top) // self.factor, (self.right - self.left) // self.factor


class Window(NamedTuple):
    """pixels: uint8 [3, h, w]. left, top: source pixel of its first block. factor: its side."""

    pixels: Tensor
    left: int
    top: int
    factor: int


def find_place(face: Face, size: int, reach: float, width: int, height: int) -> Place:
    """reach: what crops cover, in halves of the evaluation crop's side, to each side of its centre.
    width, height: of the photograph."""
    side = PIXELS_PER_SCALE * MARGIN * face.scale
    # A block is no larger than the photograph, whatever a list says of a box.
    factor = max(1, min(int(side / size + 1e-9), width, height))
    half = reach * side / 2 + BORDER * factor

    def ends(centre: float, length: int) -> tuple[int, int]:
        first = max(math.floor((centre - half) / factor), 0) * factor
        last = min(math.ceil((centre + half) / factor), math.ceil(length / factor)) * factor
        return first, max(last, first + factor)  # of a box outside: a block of zeros

    left, right = ends(face.center[0] - face.origin, width)
    top, bottom = ends(face.center[1] - face.origin, height)
    return Place(left, top, right, bottom, factor)


def cut(image: Tensor, place: Place) -> Window:
    """The window of a photograph, uint8 [3, H, W]; zeros outside of it."""
    left, top, right, bottom, factor = place
    pixels = image.permute(1, 2, 0)[top:bottom, left:right]  # as decoders leave them in memory
    height, width = pixels.shape[:2]
    if (height, width) != (bottom - top, right - left):
        whole = pixels.new_zeros(bottom - top, right - left, 3)
        whole[:height, :width] = pixels
        pixels = whole
    if factor > 1:
        pixels = torch.from_numpy(_means(pixels.contiguous().numpy(), factor))
    else:
        pixels = pixels.permute(2, 0, 1).contiguous()
    return Window(pixels, left, top, factor)


def _means(pixels: np.ndarray, factor: int) -> np.ndarray:
    """uint8 [h * factor, w * factor, 3] -> [3, h, w]: means over blocks, rounded to the nearest.

    Rows first, as they lie in memory: a quarter of what a pooling layer takes. Pillow's ``reduce``
    is as fast, but cuts off where it multiplies by 1 / factor^2.
    """
    height, width = (length // factor for length in pixels.shape[:2])
    total = np.uint16 if 255 * factor < 2**16 else np.uint32
    rows = np.add.reduce(pixels.reshape(height, factor, -1), axis=1, dtype=total)
    rows = np.ascontiguousarray(rows.reshape(height, width * factor, 3).transpose(2, 0, 1))
    sums = rows[..., ::factor].astype(np.float32)  # exact up to 2^24, far beyond any photograph
    for column in range(1, factor):
        sums += rows[..., column::factor]
    sums /= factor**2
    sums += 0.5
    return sums.astype(np.uint8)


def read_crop(window: Window, matrix: Tensor, size: int, origin: int) -> Tensor:
    """uint8 [3, S, S]. matrix: float64 [2, 3], from annotated numbers of ``origin`` to the crop."""
    factor = window.factor
    shift = (factor - 1) / 2 + origin
    x, y = window.left + shift, window.top + shift
    rows = [[a * factor, b * factor, a * x + b * y + c] for a, b, c in matrix.tolist()]
    own = torch.tensor([rows], dtype=torch.float64)
    return warp(window.pixels[None], own, size)[0]
