"""In-memory sets: stateless batches, the affine augmentation, evaluation in order."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from hubpath_fast.data import TensorBatches, TensorSet, TensorStream
from hubpath_fast.data.order import generator
from hubpath_fast.data.tensors import affine


@pytest.fixture
def data():
    images = torch.randint(0, 256, (50, 3, 12, 16), dtype=torch.uint8, generator=generator(1))
    return TensorSet(images, torch.arange(50) % 4, ("a", "b", "c", "d"), torch.arange(50) % 5)


@pytest.mark.parametrize("augment", [False, True])
def test_a_resumed_stream_gives_the_same_batches(data, augment):
    whole = list(islice(TensorStream(data, 16, seed=5, augment=augment).batches(), 9))
    resumed = list(islice(TensorStream(data, 16, seed=5, augment=augment).batches(6), 3))
    for (images, targets), (same_images, same_targets) in zip(whole[6:], resumed, strict=True):
        assert images.shape == (16, 3, 12, 16)
        assert images.dtype == torch.uint8
        assert torch.equal(images, same_images)
        assert torch.equal(targets, same_targets)


def test_the_stream_neither_reads_nor_moves_the_global_random_state(data):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    images, _ = TensorStream(data, 16).batch(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(TensorStream(data, 16).batch(3)[0], images)


def test_images_keep_their_targets_which_may_have_any_shape(data):
    points = torch.rand(50, 4, 2)
    spread = TensorSet(data.images, points)
    stream = TensorStream(spread, 20, augment=False)
    images, targets = stream.batch(4)
    indices = stream.order.indices(4)
    assert torch.equal(images, data.images[indices])
    assert torch.equal(targets, points[indices])
    assert torch.equal(spread.subset(torch.tensor([3, 1])).targets, points[[3, 1]])


def test_affine_with_no_amounts_changes_nothing(data):
    moved = affine(data.images, generator(0), rotation=0, translation=0, scale=0)
    assert torch.equal(moved, data.images)


def test_affine_shifts_by_at_most_the_share_asked_for():
    # One bright column in a black image of 40 columns: its centre of mass gives the shift.
    images = torch.zeros(64, 1, 40, 40, dtype=torch.uint8)
    images[..., 18:22] = 200
    moved = affine(images, generator(2), rotation=0, translation=0.1, scale=0).float()
    columns = torch.arange(40.0)
    centre = (moved * columns).sum((1, 2, 3)) / moved.sum((1, 2, 3))
    shift = centre - 19.5
    assert shift.abs().max() <= 4.05  # 10 % of 40, and the rounding of grey levels
    assert shift.max() > 3  # 64 draws reach beyond three quarters of the range
    assert shift.min() < -3


def test_affine_turns_without_shearing_in_oblong_images():
    # A disc stays a disc (equal second moments), whatever the image's proportions.
    y, x = torch.meshgrid(torch.arange(60.0), torch.arange(120.0), indexing="ij")
    disc = (((y - 29.5) ** 2 + (x - 59.5) ** 2) < 15**2).to(torch.uint8) * 255
    moved = affine(disc.expand(8, 1, -1, -1), generator(0), rotation=45, translation=0, scale=0)
    weight = moved[:, 0].double() / moved[:, 0].double().sum((1, 2), keepdim=True)
    moments = [(weight * (c - m) ** 2).sum((1, 2)) for c, m in ((y, 29.5), (x, 59.5))]
    torch.testing.assert_close(moments[0], moments[1], rtol=0.01, atol=0)  # pixels are 1/15 radius


def test_each_image_gets_its_own_draw(data):
    same = data.images[:1].expand(8, -1, -1, -1)
    assert len(affine(same, generator(0)).flatten(1).unique(dim=0)) == 8


def test_evaluation_keeps_the_order_and_the_last_short_batch(data):
    batches = TensorBatches(data, batch_size=16)
    assert len(batches) == 4
    for _ in range(2):  # may be iterated again
        images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(images, data.images)
        assert torch.equal(targets, data.targets)


def test_subset_keeps_everything_together(data):
    part = data.subset(torch.tensor([3, 1]))
    assert torch.equal(part.images, data.images[[3, 1]])
    assert part.targets.tolist() == [3, 1]
    assert part.renderings.tolist() == [3, 1]
    assert part.num_classes == 4


def test_bad_tensors():
    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"images: .* got torch.float32 \[2, 3, 4, 4\]"):
        TensorSet(images, torch.zeros(2, dtype=torch.int64), ("a",))
    with pytest.raises(ValueError, match=r"targets: expected \[2, ...\], one an image, got \[3\]"):
        TensorSet(images.byte(), torch.zeros(3, dtype=torch.int64), ("a",))
