"""The rows of some of the experts, as an executor takes those of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..groups import Group
from ..rows import RowSource


class Counts:
    """Of a routing, what executors ask once the rows are gathered."""

    counts_known = True

    def __init__(self, counts: list[int], num_samples: int):
        self._counts, self.num_samples, self.num_experts = counts, num_samples, len(counts)

    def counts(self) -> list[int]:
        return self._counts


class SomeRows:
    """Like a ``RowSource`` whose other experts have no rows. rows: [R, ...] of all experts."""

    is_batch = False

    def __init__(self, source: RowSource, rows: Tensor, groups: Sequence[Group]):
        counts = [0] * source.routing.num_experts
        for group in groups:
            counts[group.index] = group.count
        self.routing = Counts(counts, source.routing.num_samples)
        self.x, self.precision, self.requires_grad = rows, source.precision, source.requires_grad
        parts = [rows[g.start : g.start + g.count] for g in groups]
        self._rows = parts[0] if len(parts) == 1 else torch.cat(parts)

    def rows(self) -> Tensor:
        return self._rows
