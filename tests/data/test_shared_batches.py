"""Batches of several ranks: each rank has its part of what one process has, to the bit."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest
import torch

from hubpath_fast.data import (
    EvalBatches,
    ImageDataset,
    Mixing,
    RandomCrops,
    TensorBatches,
    TensorSet,
    TensorStream,
    TrainStream,
    open_images,
    square_transform,
    train_transform,
)
from hubpath_fast.data.order import Places, SampleOrder, shared_batches
from hubpath_fast.parallel import Share
from hubpath_fast.tasks.landmarks.digits import InkStream, LandmarkDigits

# Ranks that share a batch of 24, and its micro-batches: some do not divide it (5 ranks, 5 parts).
CASES = [(ranks, parts) for ranks in (1, 2, 3, 4, 5) for parts in (1, 3, 5) if ranks * parts <= 24]
B, STEPS = 24, 3


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]} ranks, {case[1]} parts")
def shares(request):
    ranks, parts = request.param
    return [Share(rank, ranks, parts) for rank in range(ranks)]


def tensor_set(n, size=(12, 10)):
    draw = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=draw)
    return TensorSet(images, torch.arange(n) % 5, tuple("abcde"))


def taken(stream, start=2):
    return list(islice(stream.batches(start), STEPS))


def assert_parts_of_one_process(make, shares):
    """make: share -> stream."""
    whole = taken(make(Share()))
    for share in shares:
        own = share.positions(B)
        for (images, targets), (found, theirs) in zip(whole, taken(make(share)), strict=True):
            assert torch.equal(found, images[own])
            assert torch.equal(theirs, targets[own])


def mixing(mode):
    return Mixing(5, 0.4, 1.0, prob=0.8, switch_prob=0.4, mode=mode, seed=3)


@pytest.mark.parametrize("mode", [None, "batch", "pair", "elem"])
def test_of_images_in_memory(shares, mode):
    data = tensor_set(37)
    mixed = None if mode is None else mixing(mode)
    assert_parts_of_one_process(
        lambda share: TensorStream(data, B, 4, mixing=mixed, share=share), shares
    )


@pytest.mark.parametrize("mode", [None, "batch", "pair", "elem"])
def test_of_files_that_are_cropped_and_mixed_as_batches(animals, shares, mode):
    dataset = ImageDataset(open_images(animals).train, square_transform(16))
    crops = RandomCrops(16, seed=4)
    mixed = None if mode is None else mixing(mode)

    def augment(images, targets, step, *places):
        images, targets = crops(images, targets, step, *places)
        return (images, targets) if mixed is None else mixed(images, targets, step, *places)

    assert_parts_of_one_process(
        lambda share: TrainStream(
            dataset, B, 4, augment=augment, share=share, pairs=mode is not None
        ),
        shares,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_of_files_that_are_augmented_one_by_one(animals, workers):
    dataset = ImageDataset(open_images(animals).train, train_transform(16))
    shares = [Share(rank, 3, 2) for rank in range(3)]
    assert_parts_of_one_process(
        lambda share: TrainStream(dataset, B, 4, workers, share=share), shares
    )


def test_of_digits_that_are_drawn_at_every_step(shares):
    ink = LandmarkDigits().ink
    assert_parts_of_one_process(lambda share: InkStream(ink, B, 4, share=share), shares)


def test_every_sample_is_one_ranks_and_micro_batches_are_those_of_one_process(shares):
    parts = shares[0].parts
    by_part = [[] for _ in range(parts)]
    for share in shares:
        own = share.positions(B)
        for part, (start, stop) in enumerate(share.bounds(B)):
            assert stop > start
            by_part[part] += own[start:stop].tolist()
    bounds = [B * part // parts for part in range(parts + 1)]
    assert by_part == [list(range(*pair)) for pair in pairwise(bounds)]


def test_a_rank_decodes_its_own_images_alone(animals):
    read = []

    class Read(ImageDataset):
        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

    dataset = Read(open_images(animals).train, square_transform(16))
    next(TrainStream(dataset, B, 4, share=Share(1, 4)).batches(5))
    drawn = [key for key in read if not isinstance(key, int)]
    assert drawn == SampleOrder(len(dataset), B, 4).draws(5)[6:12]
    read.clear()
    list(EvalBatches(dataset, 8, share=Share(1, 4)))
    assert read == [i for i in range(len(dataset)) if i % 8 in (2, 3)]


def test_mixed_images_come_with_their_partners_which_are_not_kept():
    places = Places.of(Share(0, 4), 16, pairs=True)
    assert places.held.tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert places.own(places.held).tolist() == [0, 1, 2, 3]
    places = Places.of(Share(1, 3), 18, pairs=True)  # the middle is its own mirror image
    assert places.held.tolist() == list(range(6, 12)) == places.own(places.held).tolist()


def test_a_batch_too_small_for_the_ranks_is_refused():
    with pytest.raises(ValueError, match=r"at least 12 \(4 ranks, accumulate 3\).*got 11"):
        TensorStream(tensor_set(37), 11, share=Share(0, 4, 3))
    TensorStream(tensor_set(37), 12, share=Share(0, 4, 3))


@pytest.mark.parametrize("n", [1, 3, 16, 17, 19, 23])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_an_evaluation_has_every_sample_once_and_as_many_batches_on_all_ranks(n, ranks):
    parts = [shared_batches(n, 8, Share(rank, ranks)) for rank in range(ranks)]
    assert {len(each) for each in parts} == {-(-n // 8)}
    assert all(len(loaded) for each in parts for loaded, _ in each)
    in_order = [
        i
        for batch in zip(*parts, strict=True)
        for loaded, counted in batch
        for i in list(loaded)[:counted]
    ]
    assert in_order == list(range(n))
    assert all(counted in (0, len(loaded)) for each in parts for loaded, counted in each)


@pytest.mark.parametrize("n", [1, 17, 23])
def test_evaluation_of_a_share(n):
    data = tensor_set(n)
    for rank in range(3):
        share = Share(rank, 3)
        batches = TensorBatches(data, 8, share=share)
        found = list(batches)
        assert len(found) == len(batches) == -(-n // 8)
        for (images, targets), (loaded, counted) in zip(
            found, shared_batches(n, 8, share), strict=True
        ):
            assert torch.equal(images, data.images[list(loaded)])
            assert torch.equal(targets, data.targets[list(loaded)[:counted]])


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_of_files_in_a_share_again_and_again(animals, workers):
    dataset = ImageDataset(open_images(animals).train, square_transform(16))
    n = len(dataset)
    whole, size = list(EvalBatches(dataset, n)), n - 1  # the last batch has one image
    for rank in range(2):
        batches = EvalBatches(dataset, size, workers, share=Share(rank, 2))
        for _ in range(2):
            (first, targets), (last, its) = batches
            own = slice(0, size // 2) if rank == 0 else slice(size // 2, size)
            assert torch.equal(first, whole[0][0][own])
            assert torch.equal(targets, whole[0][1][own])
            assert torch.equal(last, whole[0][0][-1:])
            assert torch.equal(its, whole[0][1][-1:] if rank == 1 else its[:0])
            assert len(its) == rank
