"""The result of routing a batch: who speaks for which sample, how loudly, and in which row.

Shapes: N samples, M experts, K active experts per sample, R = N*K rows; fewer where slots were
dropped, for predictions alone.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Routing:
    """K experts per sample, their weights, and the plan that moves rows to experts and back.

    Attributes:
        weights: [N, K] float32 (float64 for float64 scores), largest first; differentiable.
        mean: [M], same dtype: the mean over the batch of the full softmax p; differentiable.
        experts: [N, K] int64, the expert of each slot.
        offsets: [M+1] int32; the rows of expert i are ``offsets[i]:offsets[i+1]``.
        rows: [R] int32; row r is the flat slot ``n*K + j``; ordered by expert, then by sample.
        positions: [N, K] int32, the inverse of ``rows``: slot -> row.

    A slot that ``keeping`` dropped has no row. It stands for its sample's first slot once more,
    with that one's expert and position, and the weight 0, so that whoever reads by slots adds 0.
    """

    weights: Tensor
    mean: Tensor
    experts: Tensor
    offsets: Tensor
    rows: Tensor
    positions: Tensor
    _counts: list[int] | None = field(default=None, repr=False)

    def counts(self) -> list[int]:
        """Rows per expert, a list of length M on the host.

        The one host read of a step: on a GPU the first call waits for the router; later calls
        return the kept list. Where every expert is active (K = M) each has N rows, and nothing is
        read.

        Raises:
            ValueError: under ``torch.jit.trace``, which would keep them for every later batch.
        """
        if torch.jit.is_tracing():
            raise ValueError(
                "counts: torch.jit.trace would keep the rows per expert of this batch and split "
                "every later one alike; trace the experts and the generator one by one"
            )
        if self._counts is None and takes_all(self):
            self._counts = [self.num_samples] * self.num_experts
        if self._counts is None:
            bounds = self.offsets.tolist()
            self._counts = [end - start for start, end in itertools.pairwise(bounds)]
        return self._counts

    def tell_counts(self, counts: list[int]) -> None:
        """Has ``counts`` give these, which were read along with something else."""
        self._counts = counts

    def keeping(self, keep: Tensor) -> Routing:
        """The routing with some slots alone: experts are not run for the others.

        Not differentiable: for predictions. Reads the counts, as ``counts`` does.

        Args:
            keep: bool [N, K]; the first slot of each sample is kept in any case.
        """
        keep = keep.clone()
        keep[:, 0] = True
        kept_row = keep.flatten().index_select(0, self.rows)
        before = torch.nn.functional.pad(kept_row.cumsum(0, dtype=torch.int32), (1, 0))
        offsets = before.index_select(0, self.offsets)
        bounds = offsets.tolist()  # the one host read; the number of rows is the last of them
        order = torch.sort(kept_row, descending=True, stable=True).indices[: bounds[-1]]
        positions = before[self.positions.long()]
        return Routing(
            self.weights.detach().where(keep, 0),
            self.mean.detach(),
            self.experts.where(keep, self.experts[:, :1]),
            offsets,
            self.rows.index_select(0, order),
            positions.where(keep, positions[:, :1]),
            [end - start for start, end in itertools.pairwise(bounds)],
        )

    @property
    def counts_known(self) -> bool:
        """Whether ``counts`` has nothing to read on a device: it was read, or K = M."""
        return self._counts is not None or takes_all(self)

    @property
    def num_samples(self) -> int:
        """N."""
        return self.experts.shape[0]

    @property
    def k(self) -> int:
        """K, the active experts of each sample."""
        return self.experts.shape[1]

    @property
    def num_experts(self) -> int:
        """M."""
        return self.mean.shape[0]


def takes_all(plan: Routing) -> bool:
    """Whether every expert is active for every sample, K = M: row ``i*N + n`` is then expert i's of
    sample n, whatever the scores, and nothing has to be sorted, counted or scattered."""
    return plan.k == plan.num_experts and is_full(plan)


def is_full(plan: Routing) -> bool:
    """Whether every slot has its row: R = N*K."""
    return plan.rows.numel() == plan.experts.numel()
