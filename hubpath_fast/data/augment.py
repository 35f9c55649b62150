"""Random crops and flips of a whole batch at once, on the device that the batch is on.

The same distribution as ``train_transform``'s: a box that covers a share of the image drawn
uniformly from [min_area, 1], of a proportion (width over height) drawn log-uniformly from [3/4,
4/3], at a uniform place, resized by antialiased bilinear interpolation within the box, and mirrored
half of the time. The draws are made on the CPU from (seed, step) alone, so that every device draws
the same, and a resumed run what an uninterrupted one would have drawn.

Shapes: B images a batch, C channels, H x W pixels, S pixels a side of what comes out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .order import Places, generator
from .transforms import check_min_area, check_size

PROPORTIONS = (3 / 4, 4 / 3)
TRIES = 10  # boxes drawn for an image; where none lies within it, the largest allowed is taken


class RandomCrops:
    """Images uint8 [B, C, H, W] of a step -> uint8 [B, C, S, S], cropped, resized and flipped at
    random; the targets stay as they are, as a class does.

    ``crops(images, targets, step)`` is a function of these and the seed; with ``places``, where the
    images stand in the batch, they get what they get in the whole of it. size: S. flip: mirror half
    of the images. min_area: the least share of an image that a crop covers, in (0, 1].
    """

    def __init__(self, size: int, flip: bool = True, min_area: float = 0.08, seed: int = 0):
        self.size, self.flip, self.seed = check_size(size), flip, seed
        self.min_area = check_min_area(min_area)

    def __call__(
        self, images: Tensor, targets: Tensor, step: int, places: Places | None = None
    ) -> tuple[Tensor, Tensor]:
        draw = generator(self.seed, "crop", step)
        count = len(images) if places is None else places.size
        boxes = draw_boxes(count, images.shape[-2:], self.min_area, draw)
        flipped = torch.rand(count, generator=draw) < (0.5 if self.flip else 0)
        if places is not None:
            boxes, flipped = boxes[places.held], flipped[places.held]
        return crop_and_resize(images, boxes, flipped, self.size), targets


def draw_boxes(
    count: int, image_size: tuple[int, int], min_area: float, generator: torch.Generator
) -> Tensor:
    """Boxes int64 [count, 4]: top, left, height, width in pixels of an image of (H, W)."""
    height, width = image_size
    area, proportion, top, left = torch.rand(
        4, count, TRIES, generator=generator, dtype=torch.float64
    )
    low, high = (math.log(p) for p in PROPORTIONS)
    pixels = height * width * (min_area + (1 - min_area) * area)
    proportion = (low + (high - low) * proportion).exp()
    widths, heights = (pixels * proportion).sqrt().round(), (pixels / proportion).sqrt().round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.int().argmax(dim=1, keepdim=True)  # 0 where none fits
    largest = _largest_box(height, width)
    found = fits.any(dim=1)
    heights = heights.gather(1, first)[:, 0].where(found, heights.new_tensor(largest[0]))
    widths = widths.gather(1, first)[:, 0].where(found, widths.new_tensor(largest[1]))
    tops = (top.gather(1, first)[:, 0] * (height - heights + 1)).floor()
    lefts = (left.gather(1, first)[:, 0] * (width - widths + 1)).floor()
    tops = tops.where(found, ((height - heights) / 2).floor())  # the centre
    lefts = lefts.where(found, ((width - widths) / 2).floor())
    return torch.stack([tops, lefts, heights, widths], dim=1).long()


def crop_and_resize(images: Tensor, boxes: Tensor, flipped: Tensor, size: int) -> Tensor:
    """A box of each image, resized to ``size`` x ``size``, as uint8 [B, C, size, size].

    images: uint8 [B, C, H, W] on any device. boxes: int64 [B, 4], top, left, height and width,
    within the images. flipped: bool [B], the images to mirror. Antialiased bilinear interpolation
    of the box by itself (nothing beyond its border enters), as two batched products in float32,
    rounded once. PIL rounds between the two as well, and so may differ by one grey level.
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(
            "images: expected torch.uint8 [B, channels, height, width], got "
            f"{images.dtype} {list(images.shape)}"
        )
    height, width = images.shape[2:]
    packed = torch.cat([boxes, flipped[:, None]], dim=1).to(images.device, non_blocking=True)
    top, left, box_height, box_width, mirror = packed.unbind(1)
    rows = _interpolation(top, box_height, height, size)  # [B, S, H]
    columns = _interpolation(left, box_width, width, size)
    columns = columns.flip(1).where(mirror[:, None, None] > 0, columns)
    narrow = images.float().flatten(1, 2) @ columns.transpose(1, 2)  # [B, C*H, S]
    out = rows[:, None] @ narrow.unflatten(1, (-1, height))
    return out.round_().clamp_(0, 255).to(torch.uint8)


def _interpolation(start: Tensor, length: Tensor, full: int, size: int) -> Tensor:
    """Weights [B, size, full] that resize the pixels start .. start + length of ``full`` to
    ``size``: a triangle about each new pixel's centre, one old pixel wide to either side, or one
    new pixel where those are larger; cut off at the box, and of sum one."""
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    scale = length / size  # old pixels that a new one covers
    centre = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(full, device=start.device) + 0.5
    weights = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights.where((pixel > start) & (pixel < start + length), 0)
    return weights / weights.sum(dim=2, keepdim=True)


def _largest_box(height: int, width: int) -> tuple[int, int]:
    """(height, width) of the largest box in an image whose proportion is allowed."""
    low, high = PROPORTIONS
    if width < low * height:
        return round(width / low), width
    if width > high * height:
        return height, round(height * high)
    return height, width
