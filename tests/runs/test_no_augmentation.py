"""``augment=none``: training sees images as evaluation does."""

from __future__ import annotations

import numpy as np
import torch

from hubpath_fast.data.splits import ArraySplit
from hubpath_fast.runs.build import eval_batches, train_stream
from hubpath_fast.runs.config import FitConfig

COUNT, SIZE = 6, 16


def config(augment):
    return FitConfig.from_dict(
        {
            "data": "nowhere", "hub": ["test_resnet"], "k": 1, "workers": 0, "augment": augment,
            "trainer": {"batch_size": COUNT, "steps": 1},
        }
    )  # fmt: skip


def test_a_training_batch_holds_the_crops_of_evaluation():
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 40, 30, 3), dtype=np.uint8)
    split = ArraySplit(pixels, list(range(COUNT)))

    def batch(augment):
        images, targets = next(train_stream(split, config(augment), SIZE, COUNT).batches())
        return images[targets.argsort()]

    [(expected, _)] = eval_batches(split, config("none"), SIZE)
    assert torch.equal(batch("none"), expected)
    assert not torch.equal(batch("host"), expected)
