"""Which sample stands where, at every step of training, as a function of (seed, step) alone.

The samples of all epochs form one endless line: epoch e is the permutation that (seed, e) draws,
and the batch of step s is positions ``s*B .. (s+1)*B - 1`` of the line. A batch may span two
epochs, so every batch is full, no sample is dropped, and a data set may be smaller than a batch.
Nothing is carried from step to step: a resumed run asks for step s and gets what the first run
would have got.

Where several ranks train together, the batch is that of all of them: what is drawn for it is drawn
whole, and each rank takes its own part, so that samples are the same for any number of ranks.

Sizes: n samples in the set, B samples a batch, H of them held by a process.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..parallel.share import Share


def mix(*values: int | str) -> int:
    """A 63-bit seed from integers and words, the same on every platform and in every process."""
    plain = [value if isinstance(value, str) else int(value) for value in values]
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*values: int | str) -> torch.Generator:
    """A fresh CPU generator seeded by ``mix(*values)``."""
    return torch.Generator().manual_seed(mix(*values))


class Draw(NamedTuple):
    """One place in a batch: which sample, and the seed of its augmentation."""

    index: int
    seed: int


class Places(NamedTuple):
    """The part of a batch that a process has at hand.

    size: B, of the whole batch. held: int64 [H], the places of the samples at hand, ascending.
    kept: which of these are the process's own, int64 indices into ``held``; the others are there to
    be mixed with them.
    """

    size: int
    held: Tensor
    kept: Tensor

    @classmethod
    def of(cls, share: Share, batch_size: int, pairs: bool = False) -> Places | None:
        """A rank's; None where it has the whole batch.

        pairs: the first sample of a batch is mixed with the last, the second with the last but one,
        and so on: held are then the partners of the rank's own samples as well.

        Raises ValueError unless every rank has a sample in every micro-batch.
        """
        if share.ranks == 1:
            return None
        least = share.ranks * share.parts
        if batch_size < least:
            raise ValueError(
                f"batch_size: expected at least {least} ({share.ranks} ranks, accumulate "
                f"{share.parts}), so that each rank has a sample in every micro-batch, got "
                f"{batch_size}; take larger batches, fewer ranks or a lower accumulate"
            )
        own = share.positions(batch_size)
        held = torch.cat([own, batch_size - 1 - own]).unique() if pairs else own
        return cls(batch_size, held, torch.searchsorted(held, own))

    def own(self, values: Tensor) -> Tensor:
        """Of values [H, ...] of the samples at hand those of the process's own."""
        if len(self.kept) == len(self.held):
            return values
        return values.index_select(0, self.kept.to(values.device))


def shared_batches(
    num_samples: int, batch_size: int, share: Share = Share()
) -> list[tuple[range, int]]:
    """A rank's part of the batches of an evaluation, which takes the samples in order: for each
    batch the samples to load, and how many of them count.

    All ranks have as many batches, since they call a model together: one that has no sample of its
    own in the last batch loads another's, which does not count.
    """
    found = []
    for start in range(0, num_samples, batch_size):
        size = min(batch_size, num_samples - start)
        (own,) = share._replace(parts=1).slices(size)
        part = range(start + own.start, start + own.stop)
        found.append((part or range(start, start + 1), len(part)))
    return found


class SampleOrder:
    """The order of samples of an endless training run.

    num_samples: n, at least 1. batch_size: B, at least 1. seed: any integer.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int = 0):
        if num_samples < 1:
            raise ValueError(
                f"num_samples: expected at least 1, got {num_samples}; the set is empty"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size: expected an integer of at least 1, got {batch_size}")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        # A batch touches two epochs as a rule, so keeping a few permutations is enough.
        self._permutation = lru_cache(maxsize=4)(self.permutation)

    def permutation(self, epoch: int) -> Tensor:
        """int64 [n]: the order of the samples in one epoch."""
        return torch.randperm(self.num_samples, generator=generator(self.seed, "epoch", epoch))

    def epochs(self, step: int) -> Tensor:
        """int64 [B]: the epoch that each place of the batch of ``step`` belongs to."""
        return self._line(step) // self.num_samples

    def indices(self, step: int) -> Tensor:
        """int64 [B]: the samples of the batch of ``step``."""
        line = self._line(step)
        epochs = line // self.num_samples
        parts = [
            self._permutation(epoch)[line[epochs == epoch] % self.num_samples]
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return torch.cat(parts)

    def draws(self, step: int, places: Places | None = None) -> list[Draw]:
        """The samples of the batch of ``step``, each with its seed from (seed, epoch, index).

        places: of those that are wanted; None: all."""
        indices, epochs = self.indices(step), self.epochs(step)
        if places is not None:
            indices, epochs = indices[places.held], epochs[places.held]
        pairs = zip(indices.tolist(), epochs.tolist(), strict=True)
        return [Draw(index, mix(self.seed, "draw", epoch, index)) for index, epoch in pairs]

    def _line(self, step: int) -> Tensor:
        if step < 0:
            raise ValueError(f"step: expected an integer of at least 0, got {step}")
        return torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
