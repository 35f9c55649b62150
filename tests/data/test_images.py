"""Streams of image files: stateless whatever the workers, and what the transforms do."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from hubpath_fast.data import (
    EvalBatches,
    ImageDataset,
    ImageSplit,
    TrainStream,
    eval_transform,
    load_image,
    open_images,
    square_transform,
    train_transform,
)


@pytest.fixture
def splits(animals):
    return open_images(animals, validation=0.25)


@pytest.fixture
def dataset(splits):
    return ImageDataset(splits.train, train_transform(16))


def take(stream, start, count):
    batches = stream.batches(start)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def assert_same(a, b):
    for (images, targets), (same_images, same_targets) in zip(a, b, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(targets, same_targets)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_resumed_stream_gives_the_same_batches_with_any_workers(dataset, workers):
    whole = take(TrainStream(dataset, 6, seed=4), 0, 7)
    assert whole[0][0].shape == (6, 3, 16, 16)
    assert whole[0][0].dtype == torch.uint8
    assert whole[0][1].dtype == torch.int64
    assert_same(whole[3:], take(TrainStream(dataset, 6, seed=4, workers=workers), 3, 4))


def test_an_image_is_augmented_by_its_own_seed_whatever_the_batch(dataset):
    n = len(dataset)
    small = torch.cat([images for images, _ in take(TrainStream(dataset, 5, seed=4), 0, n // 5)])
    large = torch.cat([images for images, _ in take(TrainStream(dataset, n, seed=4), 0, 1)])
    assert torch.equal(small, large[: len(small)])


def test_epochs_and_seeds_augment_differently(dataset):
    n = len(dataset)
    stream = TrainStream(dataset, n, seed=4)
    epochs = [
        batch[0][stream.order.indices(e).argsort()] for e, batch in enumerate(take(stream, 0, 2))
    ]
    other = TrainStream(dataset, n, seed=5)
    epochs.append(take(other, 0, 1)[0][0][other.order.indices(0).argsort()])
    for i, a in enumerate(epochs):
        for b in epochs[:i]:
            assert (a != b).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_targets_may_be_tensors_that_move_with_their_images(splits, workers):
    """Points of each image, halved by an augmentation that halves the images."""
    count = len(splits.train)
    points = torch.arange(count * 4.0).reshape(count, 2, 2)
    split = ImageSplit(splits.train.paths, tuple(points)).subset(range(count - 1))

    def halve(images, targets, step):
        return images[..., ::2, ::2], targets / 2 + step

    dataset = ImageDataset(split, eval_transform(16))
    stream = TrainStream(dataset, 4, workers=workers, augment=halve)
    for step, (images, targets) in enumerate(take(stream, 2, 3), start=2):
        indices = stream.order.indices(step)
        assert torch.equal(targets, points[indices] / 2 + step)
        whole = torch.stack([dataset[i][0] for i in indices.tolist()])
        assert torch.equal(images, whole[..., ::2, ::2])
    assert torch.equal(torch.cat([targets for _, targets in EvalBatches(dataset)]), points[:-1])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_stream_neither_reads_nor_moves_the_global_random_state(dataset, workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = take(TrainStream(dataset, 4, workers=workers), 0, 2)
    for _ in EvalBatches(dataset, 50, workers=0):
        break  # a training transform may draw; the loader itself must not
    torch.set_rng_state(before)
    again = take(TrainStream(dataset, 4, workers=workers), 0, 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert_same(first, again)
    assert_same(first, take(TrainStream(dataset, 4, workers=workers), 0, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_keeps_the_order(splits, workers):
    dataset = ImageDataset(splits.test, eval_transform(16))
    batches = EvalBatches(dataset, batch_size=4, workers=workers)
    assert (len(batches), batches.num_samples) == (2, 6)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in range(2):
        images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert targets.tolist() == list(splits.test.targets)
        expected = [eval_transform(16)(load_image(path)) for path in splits.test.paths]
        assert torch.equal(images, torch.stack(expected))
    assert torch.equal(torch.get_rng_state(), before)


def test_eval_transform_is_the_centre_of_the_resized_image():
    pixels = np.random.RandomState(0).randint(0, 256, (50, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    out = eval_transform(56)(image)
    resized = np.array(image.resize((64, 64), Image.Resampling.BILINEAR))
    whole = torch.from_numpy(resized).permute(2, 0, 1)
    assert torch.equal(out, whole[:, 4:60, 4:60])
    assert torch.equal(square_transform(56)(image), whole)


def test_train_crops_cover_the_area_asked_for():
    """The colours are coordinates, so what a crop shows tells where it was taken from."""
    ramp = np.linspace(0, 255, 320).round().astype(np.uint8)
    pixels = np.zeros((320, 320, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = ramp, ramp[:, None]
    image = Image.fromarray(pixels)

    def areas(min_area):
        torch.manual_seed(0)
        crops = [train_transform(280, False, min_area)(image).float() / 255 for _ in range(30)]
        assert {crop.shape for crop in crops} == {(3, 280, 280)}
        widths = torch.stack([crop[0].max() - crop[0].min() for crop in crops])
        heights = torch.stack([crop[1].max() - crop[1].min() for crop in crops])
        return widths * heights

    # Bytes tell sides to 1/255 and resizing blurs a pixel of 280 on both ends: 2 % a side.
    large, small = areas(0.6), areas(0.08)
    assert large.min() > 0.6 * 0.96
    assert 0.08 * 0.8 < small.min() < 0.3
    assert small.max() <= 1


def test_flip_is_optional():
    """A ramp from dark to bright stays one unless it is mirrored."""
    ramp = Image.fromarray(np.tile(np.arange(0, 250, 5, dtype=np.uint8), (50, 1))).convert("RGB")

    def directions(transform):
        torch.manual_seed(0)
        outs = [transform(ramp).float() for _ in range(40)]
        return {bool(out[..., -1].mean() > out[..., 0].mean()) for out in outs}

    assert directions(train_transform(16, flip=False)) == {True}
    assert directions(train_transform(16)) == {True, False}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: train_transform(4), "size: .* got 4"),
        (lambda d: train_transform(32, min_area=0), "min_area: .* got 0"),
        (lambda d: EvalBatches(d, 0), "batch_size: .* got 0"),
        (lambda d: TrainStream(d, 0), "batch_size: .* got 0"),
        (lambda d: TrainStream(d, 4, workers=-1), "workers: .* got -1"),
    ],
)
def test_bad_arguments(dataset, call, message):
    with pytest.raises(ValueError, match=message):
        call(dataset)
