"""What ranks know of the samples of shared batches, brought together in the samples' order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from .ranks import Ranks

T = TypeVar("T")


def gather_batches(parts: Sequence[T], ranks: Ranks) -> list[T]:
    """The parts of all ranks, batch by batch, and of each batch in the ranks' order, which is that
    of the samples; the same list on every rank.

    parts: what this rank has of each batch (see ``data.order.shared_batches``), on the host; as
    many on every rank.
    """
    return [part for batch in zip(*ranks.gather(list(parts)), strict=True) for part in batch]
