"""Mixup and CutMix: timm's to the bit, from (seed, step) alone, and nothing else moves."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup

from hubpath_fast.data import Mixing, TensorSet, TensorStream
from hubpath_fast.data.order import generator, mix

B, C = 8, 5
ALPHAS = {"mixup": (0.4, 0.0), "cutmix": (0.0, 1.0), "both": (0.4, 1.0)}


def batch(count=B):
    draw = generator(1)
    images = torch.randint(0, 256, (count, 3, 12, 10), dtype=torch.uint8, generator=draw)
    return images, torch.randint(C, (count,), generator=draw)


def test_images_that_are_floats_already_are_mixed_as_they_are():
    images, targets = batch()
    unit = images.float() / 255
    kept = unit.clone()
    found = Mixing(C, 0.4, seed=3)(unit, targets, 2)
    assert torch.equal(found[0], Mixing(C, 0.4, seed=3)(images, targets, 2)[0])
    assert torch.equal(unit, kept)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", ALPHAS)
def test_it_is_timms_on_the_images_as_a_model_reads_them(kind, mode):
    mixup, cutmix = ALPHAS[kind]
    images, targets = batch()
    kept = images.clone()
    mixing = Mixing(C, mixup, cutmix, prob=0.8, switch_prob=0.3, mode=mode, seed=3)
    theirs = Mixup(mixup, cutmix, None, 0.8, 0.3, mode, label_smoothing=0.0, num_classes=C)
    for step in range(6):
        found, probabilities = mixing(images, targets, step)
        np.random.seed(mix(3, "mixup", step) % 2**32)
        expected, wanted = theirs(images.float() / 255, targets)
        assert torch.equal(found, expected)
        assert torch.equal(probabilities, wanted)
        assert found.dtype == probabilities.dtype == torch.float32
    assert torch.equal(images, kept)


def test_images_are_mixed_by_the_share_that_their_targets_say():
    images, _ = batch(4)
    targets = torch.tensor([0, 1, 2, 3])
    mixed, probabilities = Mixing(C, 1.0, seed=1)(images, targets, 0)
    share = probabilities[0, 0].item()
    assert 0 < share < 1
    assert probabilities[0].tolist() == pytest.approx([share, 0, 0, 1 - share, 0])
    unit = images / 255
    expected = share * unit + (1 - share) * unit.flip(0)
    torch.testing.assert_close(mixed, expected, rtol=1e-6, atol=1e-6)  # float32, three roundings
    boxes, probabilities = Mixing(C, 0, 1.0, seed=1)(images, targets, 0)
    own = (boxes == unit).all(dim=1)[0].double().mean().item()  # of the first image's pixels
    assert 0 < own < 1
    assert probabilities[0].tolist() == pytest.approx([own, 0, 0, 1 - own, 0])


def test_where_nothing_is_mixed_images_and_classes_are_what_they_were():
    images, targets = batch()
    found, probabilities = Mixing(C, 0.2, 1.0, prob=0.0)(images, targets, 4)
    assert torch.equal(found, images.float() / 255)
    assert torch.equal(probabilities, F.one_hot(targets, C).float())


def test_a_step_is_a_function_of_seed_and_step_and_moves_no_generator():
    images, targets = batch()
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1:], torch.get_rng_state()
    found, _ = Mixing(C, 0.4, seed=3)(images, targets, 7)
    after = random.getstate(), np.random.get_state()[1:], torch.get_rng_state()
    assert before[0] == after[0]
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert torch.equal(before[2], after[2])
    np.random.seed(99)
    assert torch.equal(Mixing(C, 0.4, seed=3)(images, targets, 7)[0], found)
    for other in (Mixing(C, 0.4, seed=3)(images, targets, 8), Mixing(C, 0.4)(images, targets, 7)):
        assert not torch.equal(other[0], found)


def test_a_stream_in_memory_mixes_what_it_has_moved():
    images, targets = batch(20)
    data = TensorSet(images, targets, tuple("abcde"))
    plain, mixing = TensorStream(data, 6, seed=2), Mixing(C, 0.4, seed=2)
    mixed = TensorStream(data, 6, seed=2, mixing=mixing)
    for found, expected in zip(mixed.batch(3), mixing(*plain.batch(3), 3), strict=True):
        assert torch.equal(found, expected)


BAD = {
    "an odd batch": (
        lambda: Mixing(C, 0.2)(*batch(7), 0),
        "batch_size: expected an even number .* got 7; take 8 or 6",
    ),
    "one image": (lambda: Mixing(C, 0.2)(*batch(1), 0), "got 1; take 2 or 2"),
    "nothing to do": (lambda: Mixing(C), "mixup, cutmix: .* one of them above, got 0.0 and 0.0"),
    "an alpha without end": (lambda: Mixing(C, math.inf), "mixup, cutmix: .*, got inf and 0.0"),
    "an alpha of letters": (lambda: Mixing(C, 1.0, "1"), "mixup, cutmix: .*, got 1.0 and '1'"),
    "a probability above 1": (lambda: Mixing(C, 1.0, prob=2), "^prob: .* from 0 to 1, got 2"),
    "a probability of NaN": (
        lambda: Mixing(C, 1.0, 1.0, switch_prob=math.nan),
        "^switch_prob: .* from 0 to 1, got nan",
    ),
    "an unknown mode": (lambda: Mixing(C, 1.0, mode="half"), "mode: expected one of batch, pair"),
    "targets that are no classes": (
        lambda: Mixing(C, 0.2)(batch()[0], torch.rand(B, 2), 0),
        r"targets: .*int64 \[B\], got torch.float32 \[8, 2\]",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments_are_named(kind):
    call, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        call()
