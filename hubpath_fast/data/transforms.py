"""From a decoded image to the bytes that a hub takes: uint8 [3, S, S], not normalised.

The protocol of the paper's group: resize to 8/7 of the size (256 for 224), whatever the
proportions; then in training a random part of it, resized, and flipped half of the time, in
evaluation the centre, or the corners too, mirrored or not.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from ..preprocessing import resized_side
from .later import v2

CROPS = (1, 5, 10)


def check_size(size: int) -> int:
    if size < 8:
        raise ValueError(f"size: expected at least 8 pixels a side, got {size}")
    return size


def check_min_area(min_area: float) -> float:
    if not 0 < min_area <= 1:
        raise ValueError(f"min_area: expected a share above 0 and of at most 1, got {min_area}")
    return min_area


def train_transform(size: int, flip: bool = True, min_area: float = 0.08) -> v2.Transform:
    """PIL image -> uint8 [3, size, size], augmented by draws from torch's global generator.

    flip: mirror half of the images; not for letters or digits, which then are others or none.
    min_area: the crop covers that share of the image at least, in (0, 1].
    """
    steps = [
        _resize(size),
        v2.RandomResizedCrop(size, scale=(check_min_area(min_area), 1.0), antialias=True),
        v2.RandomHorizontalFlip(0.5 if flip else 0.0),
        v2.PILToTensor(),
    ]
    return v2.Compose(steps)


def square_transform(size: int) -> v2.Transform:
    """PIL image -> uint8 [3, side, side], side = ``resized_side(size)``: what the random part of
    training is taken from, for ``RandomCrops`` on the device."""
    return v2.Compose([_resize(size), v2.PILToTensor()])


def eval_transform(size: int, crops: int = 1) -> v2.Transform:
    """PIL image -> uint8, always the same: the centre, [3, size, size], or several crops.

    crops: 1; 5, [5, 3, size, size]: the four corners and the centre; or 10: these and their mirror
    images, in this order (``SummedCrops`` adds up what a model says of them).
    """
    if crops not in CROPS:
        raise ValueError(f"crops: expected one of {', '.join(map(str, CROPS))}, got {crops}")
    if crops == 1:
        return v2.Compose([_resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    cut = v2.FiveCrop(size) if crops == 5 else v2.TenCrop(size)
    return v2.Compose([_resize(size), cut, _stack])


def resize(image: Image.Image, side: int) -> Image.Image:
    """The first step of all transforms here, to ``side`` x ``side``, by itself."""
    return v2.functional.resize(image, [side, side], antialias=True)


def _resize(size: int) -> v2.Transform:
    side = resized_side(check_size(size))
    return v2.Resize((side, side), antialias=True)


def _stack(crops: tuple[Image.Image, ...]) -> Tensor:
    return torch.stack([v2.functional.pil_to_tensor(crop) for crop in crops])
