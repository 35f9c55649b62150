"""From a decoded image to the bytes that a hub takes: uint8 [3, S, S], not normalised.

The protocol of the paper's group: resize to 8/7 of the size (256 for 224), whatever the
proportions; then in training a random part of it, resized, and flipped half of the time, in
evaluation the centre.
"""

from __future__ import annotations

from torchvision.transforms import v2


def check_size(size: int) -> int:
    if size < 8:
        raise ValueError(f"size is {size}, but images must have at least 8 pixels a side")
    return size


def train_transform(size: int, flip: bool = True, min_area: float = 0.08) -> v2.Transform:
    """PIL image -> uint8 [3, size, size], augmented by draws from torch's global generator.

    flip: mirror half of the images; not for letters or digits, which then are others or none.
    min_area: the crop covers that share of the image at least, in (0, 1].
    """
    if not 0 < min_area <= 1:
        raise ValueError(f"min_area is {min_area}, but must be a share in (0, 1]")
    steps = [
        _resize(size),
        v2.RandomResizedCrop(size, scale=(min_area, 1.0), antialias=True),
        v2.RandomHorizontalFlip(0.5 if flip else 0.0),
        v2.PILToTensor(),
    ]
    return v2.Compose(steps)


def eval_transform(size: int) -> v2.Transform:
    """PIL image -> uint8 [3, size, size], always the same."""
    return v2.Compose([_resize(size), v2.CenterCrop(size), v2.PILToTensor()])


def _resize(size: int) -> v2.Transform:
    side = round(check_size(size) * 8 / 7)
    return v2.Resize((side, side), antialias=True)
