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

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import PIXELS_PER_SCALE, box_mean, warp

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
    factor = max(1, int(side / size + 1e-9))
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
    pixels = image[:, top:bottom, left:right]
    down, across = bottom - top - pixels.shape[1], right - left - pixels.shape[2]
    if down or across:
        pixels = F.pad(pixels, (0, across, 0, down))
    if factor > 1:
        pixels = box_mean(pixels, factor, torch.float32).round_().to(torch.uint8)
    return Window(pixels.contiguous(), left, top, factor)


def read_crop(window: Window, matrix: Tensor, size: int, origin: int) -> Tensor:
    """uint8 [3, S, S]. matrix: float64 [2, 3], from annotated numbers of ``origin`` to the crop."""
    shift = (window.factor - 1) / 2 + origin
    to_annotated = torch.tensor([[window.left + shift], [window.top + shift]], dtype=torch.float64)
    linear, offset = matrix[:, :2], matrix[:, 2:]
    own = torch.cat([linear * window.factor, linear @ to_annotated + offset], 1)
    return warp(window.pixels[None], own[None], size)[0]
