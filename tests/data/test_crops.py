"""Several crops of each image, and the logits summed over them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hubpath_fast.data import SummedCrops, eval_transform
from hubpath_fast.data.transforms import resize, resized_side


@pytest.fixture
def picture():
    pixels = np.random.RandomState(0).randint(0, 256, (50, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("crops", [5, 10])
def test_crops_are_corners_and_centre_and_their_mirror_images(picture, crops):
    size, side = 56, 64
    assert resized_side(size) == side
    whole = torch.from_numpy(np.array(resize(picture, side))).permute(2, 0, 1)
    far, middle = side - size, (side - size) // 2
    starts = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    expected = [whole[:, y : y + size, x : x + size] for y, x in starts]
    if crops == 10:
        flipped = whole.flip(2)
        expected += [flipped[:, y : y + size, x : x + size] for y, x in starts]
    out = eval_transform(size, crops)(picture)
    assert out.dtype == torch.uint8
    assert torch.equal(out, torch.stack(expected))
    assert torch.equal(out[4], eval_transform(size)(picture))


def test_logits_are_summed_over_crops():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    images = torch.randn(4, 10, 3, 2, 2, dtype=torch.float64)
    total = sum(model(images[:, i]) for i in range(10))
    out = SummedCrops(model)(images)
    # Eleven roundings of values of order 1, and one of the division.
    torch.testing.assert_close(10 * out, total, rtol=0, atol=1e-14)
    assert torch.equal(out.argmax(1), total.argmax(1))


def test_other_numbers_are_refused():
    with pytest.raises(ValueError, match="crops: expected one of 1, 5, 10, got 3"):
        eval_transform(32, 3)
