"""Which samples of a global batch are a rank's own.

A global batch of B samples is cut into A micro-batches as one process cuts it: micro-batch j is the
samples ``B*j//A .. B*(j+1)//A - 1``. Of each, rank r of W has the r-th contiguous slice. So every
micro-batch holds the same samples on any number of ranks, in the ranks' order, and with it what is
computed of a whole one: batch statistics, the mean of the weights, who is asked how often.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def check_batch_size(size: int, ranks: int) -> None:
    """Raises ValueError unless a batch is as many samples for each of the ranks, at least one."""
    if size < 1 or size % ranks:
        raise ValueError(
            f"batch_size: expected a multiple of the {ranks} ranks, got {size}; take "
            f"{max(1, size // ranks) * ranks}, or another number of ranks"
        )


class Share(NamedTuple):
    """Of rank ``rank`` among ``ranks``, of batches in ``parts`` micro-batches."""

    rank: int = 0
    ranks: int = 1
    parts: int = 1

    def slices(self, size: int) -> list[slice]:
        """The rank's positions in a global batch of ``size``, for each micro-batch."""
        found = []
        for part in range(self.parts):
            first, last = size * part // self.parts, size * (part + 1) // self.parts
            own = last - first
            start, stop = (first + own * r // self.ranks for r in (self.rank, self.rank + 1))
            found.append(slice(start, stop))
        return found

    def positions(self, size: int) -> Tensor:
        """int64: all of them, in order; the rank's local batch."""
        return torch.cat([torch.arange(s.start, s.stop) for s in self.slices(size)])

    def bounds(self, size: int) -> list[tuple[int, int]]:
        """(start, stop) of each micro-batch within the rank's local batch."""
        found, start = [], 0
        for own in self.slices(size):
            stop = start + own.stop - own.start
            found.append((start, stop))
            start = stop
        return found
