"""Crops and flips of whole batches: against one image at a time, and as the host draws them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from hubpath_fast.data import RandomCrops
from hubpath_fast.data.augment import crop_and_resize, draw_boxes
from hubpath_fast.data.order import generator


def pictures(count=6, height=40, width=40, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=random)


def one_by_one(images, boxes, flipped, size):
    """The definition, an image at a time, in float64 and not rounded."""
    out = []
    for image, (top, left, height, width), mirror in zip(images, boxes, flipped, strict=True):
        box = image[None, :, top : top + height, left : left + width].double()
        box = F.interpolate(box, (size, size), mode="bilinear", antialias=True)
        out.append(box.flip(3) if mirror else box)
    return torch.cat(out)


# Enlarged, shrunk (antialiased), the whole image, a single pixel, touching each border.
BOXES = torch.tensor(
    [
        [3, 5, 9, 12],
        [0, 0, 40, 38],
        [0, 0, 40, 40],
        [39, 0, 1, 1],
        [20, 10, 20, 30],
        [0, 17, 31, 23],
    ]
)
FLIPPED = torch.tensor([False, True, False, True, True, False])


@pytest.mark.parametrize("size", [8, 24, 40])
def test_a_batch_is_what_each_image_would_be_alone(size):
    out = crop_and_resize(pictures(), BOXES, FLIPPED, size)
    assert out.dtype == torch.uint8
    expected = one_by_one(pictures(), BOXES, FLIPPED, size)
    # Half a level by rounding; float32 sums of numbers up to 255 are off by 1e-4 at most.
    assert (out.double() - expected).abs().max() <= 0.5 + 1e-3
    assert torch.equal(out[2], pictures()[2]) == (size == 40)


def test_it_is_what_the_host_makes_of_the_same_boxes():
    images = pictures(6, 64, 64)
    out = crop_and_resize(images, BOXES, FLIPPED, 56)
    for i, (top, left, height, width) in enumerate(BOXES.tolist()):
        image = v2.functional.to_pil_image(images[i])
        host = v2.functional.resized_crop(image, top, left, height, width, [56, 56])
        host = v2.functional.horizontal_flip(host) if FLIPPED[i] else host
        host = v2.functional.pil_to_tensor(host).int()
        # PIL rounds after each direction: 0.5 + 0.5 levels, and 0.5 here, so whole levels up to 1.
        assert (out[i].int() - host).abs().max() <= 1


@pytest.mark.parametrize("image_size", [(64, 64), (64, 48)], ids=["square", "oblong"])
def test_boxes_are_distributed_as_the_hosts(image_size):
    """Mean and spread of area, proportion and place, against torchvision's own draws."""
    height, width = image_size
    ours = draw_boxes(4000, image_size, 0.3, generator(0)).double()
    torch.manual_seed(0)
    host = v2.RandomResizedCrop(8, scale=(0.3, 1.0))
    image = torch.zeros(3, height, width)
    theirs = [host.make_params([image]) for _ in range(4000)]
    theirs = torch.tensor([[p[n] for n in ("top", "left", "height", "width")] for p in theirs])
    for boxes in (ours, theirs):
        top, left, h, w = boxes.unbind(1)
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + h <= height).all()
        assert (left + w <= width).all()

    def figures(boxes):
        top, left, h, w = boxes.double().unbind(1)
        area, proportion = h * w / (height * width), (w / h).log()
        places = (top[h < height] / (height - h)[h < height], left / (width - w).clamp(min=1))
        return [area, proportion, *places]

    for mine, host in zip(figures(ours), figures(theirs), strict=True):
        # Two means of about 4,000 draws differ by 1.4 * 1.6 % of the spread; four times that.
        assert (mine.mean() - host.mean()).abs() < 0.09 * host.std()
        assert mine.std() == pytest.approx(host.std().item(), rel=0.06)
    area = figures(ours)[0]
    assert 0.3 * 0.97 < area.min() < 0.33
    assert 0.95 < area.max() <= 1


def test_an_image_that_no_box_fits_gives_its_centre():
    # Six times as wide as high: at min_area 1 no box of an allowed proportion has that area.
    boxes = draw_boxes(3, (12, 72), 1.0, generator(0))
    assert boxes.tolist() == [[0, 28, 12, 16]] * 3
    assert draw_boxes(1, (72, 12), 1.0, generator(0)).tolist() == [[28, 0, 16, 12]]


def test_a_step_is_a_function_of_seed_and_step():
    images, crops = pictures(), RandomCrops(16, seed=3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    out, _ = crops(images, None, 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(out, RandomCrops(16, seed=3)(images, None, 7)[0])
    for other, _ in (crops(images, None, 8), RandomCrops(16, seed=4)(images, None, 7)):
        assert (out != other).flatten(1).any(dim=1).all()


def test_flip_is_optional():
    ramp = torch.arange(0, 240, 6, dtype=torch.uint8).expand(64, 3, 40, 40)

    def mirrored(flip):
        out = RandomCrops(16, flip, min_area=0.5)(ramp, None, 0)[0].float()
        return (out[..., -1].mean((1, 2)) < out[..., 0].mean((1, 2))).sum().item()

    assert mirrored(False) == 0
    assert 16 < mirrored(True) < 48  # four standard deviations about 32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomCrops(4), "size: expected at least 8 pixels a side, got 4"),
        (
            lambda: RandomCrops(32, min_area=0),
            "min_area: expected a share above 0 and of at most 1, got 0",
        ),
        (lambda: RandomCrops(16)(torch.zeros(2, 3, 9, 9), None, 0), r"got torch.float32 \[2, 3"),
        (
            lambda: RandomCrops(16)(torch.zeros(3, 9, 9).byte(), None, 0),
            "images: expected torch.uint8",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
def test_a_gpu_draws_and_makes_the_same():
    images, crops = pictures(), RandomCrops(24)
    here, there = crops(images, None, 5)[0], crops(images.cuda(), None, 5)[0].cpu()
    # The same boxes; a sum in another order may round half a level the other way.
    assert (here.int() - there.int()).abs().max() <= 1
