"""Streams of random images, and the check that a training on them can be resumed."""

from __future__ import annotations

from itertools import count

import torch


class RandomImages:
    """Endless batches of bytes and classes; a batch is a function of its step alone."""

    def __init__(self, size=6, side=32, classes=4):
        self.shape, self.classes = (size, 3, side, side), classes

    def batch(self, step):
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(256, self.shape, dtype=torch.uint8, generator=generator)
        return images, torch.randint(self.classes, self.shape[:1], generator=generator)

    def batches(self, start_step=0):
        for step in count(start_step):
            yield self.batch(step)


def check_resuming(make, tmp_path, stop):
    """A run that is stopped after ``stop`` steps and resumed ends with the weights of one that is
    not.

    make: (folder, resume) -> a trainer. Returns the uninterrupted one, and its result.
    """
    whole, cut = make(tmp_path / "whole", False), make(tmp_path / "cut", False)
    result = whole.fit()
    step = cut._step
    cut._step = lambda *batch: (step(*batch), cut.stop() if cut.state.step == stop else None)
    assert cut.fit().interrupted
    resumed = make(tmp_path / "cut", True)
    assert resumed.state.step == stop
    assert resumed.fit().steps == result.steps
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    return whole, result
