"""Batches of a training on a shelf: numbers of rows and their classes.

A number is ``view * n + image``. Letters: n images, V views, N of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

from ..data.order import SampleOrder, generator
from ..features import Shelf


class ShelfStream:
    """Endless training batches: numbers float64 [N], targets int64 [N].

    The order is a function of (seed, step) alone, and so is the view in which an image is seen.
    Float64 holds every number to 2^53, and a Hub-Pathway's rows are floats.
    """

    def __init__(self, shelf: Shelf, batch_size: int, seed: int):
        self.images, self.targets = shelf.splits["train"], shelf.targets
        self.views, self.count = shelf.record.views, shelf.record.num_images
        self.order, self.seed = SampleOrder(len(self.images), batch_size, seed), seed

    def batches(self, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for step in count(start_step):
            images = self.images[self.order.indices(step)]
            yield self.numbers(images, step).double(), self.targets[images]

    def numbers(self, images: Tensor, step: int) -> Tensor:
        """int64 [N] -> int64 [N]."""
        if self.views == 1:
            return images
        draw = generator(self.seed, "view", step)
        return images + self.count * torch.randint(self.views, images.shape, generator=draw)


class ShelfBatches:
    """Some images in their order, each once, as evaluation sees them (view 0): numbers float64 [N],
    targets int64 [N]. Iterable again and again.

    images: int64, their numbers.
    """

    def __init__(self, shelf: Shelf, images: Tensor, batch_size: int):
        self.images, self.targets, self.batch_size = images, shelf.targets, batch_size

    @property
    def num_samples(self) -> int:
        return len(self.images)

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images in self.images.split(self.batch_size) if len(self.images) else ():
            yield images.double(), self.targets[images]
