"""Views of a shelf's images: the crop of evaluation to the bit, and random ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hubpath_fast.data import eval_transform
from hubpath_fast.data.augment import crop_and_resize
from hubpath_fast.data.cache import squares
from hubpath_fast.data.transforms import resized_side
from hubpath_fast.features.pixels import Views

COUNT = 7


def squares_of(size: int) -> tuple[list[Image.Image], torch.Tensor]:
    """Images, and their squares [n, Q, Q, 3]."""
    draw = np.random.default_rng(0)
    images = [
        Image.fromarray(draw.integers(0, 256, (60 + i, 55, 3), dtype=np.uint8))
        for i in range(COUNT)
    ]
    [pixels] = squares(images, resized_side(size), load=lambda image: image)
    return images, torch.from_numpy(pixels)


@pytest.mark.parametrize("size", [8, 9, 31, 32, 47])
def test_the_first_view_is_the_crop_of_evaluation_to_the_bit(size):
    images, pixels = squares_of(size)
    transform = eval_transform(size)
    found = Views(3, COUNT).cut(pixels, 0, 0, size)
    assert torch.equal(found, torch.stack([transform(image) for image in images]))


def test_a_random_view_does_not_depend_on_the_batch_it_is_cut_in():
    _, pixels = squares_of(32)
    views = Views(3, COUNT, seed=1)
    for view in (1, 2):
        whole = views.cut(pixels, 0, view, 32)
        parts = [views.cut(pixels[i : i + 2], i, view, 32) for i in range(0, COUNT, 2)]
        assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(views.cut(pixels, 0, 1, 32), views.cut(pixels, 0, 2, 32))
    other = Views(3, COUNT, seed=2).cut(pixels, 0, 1, 32)
    assert not torch.equal(views.cut(pixels, 0, 1, 32), other)


def test_random_views_are_mirrored_only_where_flips_are_on():
    _, pixels = squares_of(32)
    flipped = Views(2, COUNT, flip=True).cut(pixels, 0, 1, 32)
    plain = Views(2, COUNT, flip=False).cut(pixels, 0, 1, 32)
    for one, other in zip(flipped, plain, strict=True):
        # Weights are mirrored, not pixels: sums in another order may round to another level.
        mirrored = (one.int() - other.flip(2).int()).abs().max() <= 1
        assert torch.equal(one, other) or mirrored
    assert not torch.equal(flipped, plain)


def test_a_router_sees_the_same_crops_smaller():
    _, pixels = squares_of(40)
    views, side = Views(2, COUNT), resized_side(40)
    small = views.cut_and_resize(pixels, 0, 0, 40, 20)
    first = (side - 40) // 2
    boxes = torch.tensor([[first, first, 40, 40]]).expand(COUNT, 4)
    none = torch.zeros(COUNT, dtype=torch.bool)
    assert torch.equal(small, crop_and_resize(pixels.permute(0, 3, 1, 2), boxes, none, 20))
    random = views.cut_and_resize(pixels, 0, 1, 40, 40)
    assert torch.equal(random, views.cut(pixels, 0, 1, 40))
