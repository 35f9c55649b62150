"""A batch's rows to the ranks that have their experts, and the outputs back.

An expert gets its rows of all ranks' samples in one group, in the ranks' order and then in the
samples', as it would from the whole batch in one process. Images travel as they are, before they
are normalised, and nothing of them comes back; outputs do, and their gradients the other way.

Letters: M experts, K active ones of a sample, R rows of this rank's samples, S rows of its experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .._torch_rows import expert_of_row, sample_of_row
from ..routing import Routing
from .collectives import exchange_rows, gather_numbers
from .ranks import Ranks


class Exchange:
    """The way of one batch's rows. Making it exchanges the counts, the step's one host read.

    Args:
        routing: of this rank's samples; it is told the counts.
        owners: for each expert the rank of a replica (``Ranks.ep_rank``) that has it.
        ranks: of the run.

    Attributes:
        own: the experts that this rank has, in order.
        samples: of all ranks of the replica.
        counts: rows of each own expert, in order.
    """

    def __init__(self, routing: Routing, owners: Sequence[int], ranks: Ranks):
        self.routing, self.ranks = routing, ranks
        self.own = ranks.own(owners)
        device = routing.offsets.device
        gathered = gather_numbers(routing.offsets.diff(), ranks, "counts")
        table = gathered.tolist()  # [ep][M]
        mine = table[ranks.ep_rank]
        routing.tell_counts(mine)
        self._send = [0] * ranks.ep
        for expert, owner in enumerate(owners):
            self._send[owner] += mine[expert]
        self._receive = [sum(row[i] for i in self.own) for row in table]
        self.counts = [sum(row[i] for row in table) for i in self.own]
        self.samples = sum(map(sum, table)) // routing.k
        self._order, self._place = self._by_owner(owners)
        own = torch.tensor(self.own, dtype=torch.long, device=device)
        self._expert, self._sorted, self._back = self._by_expert(gathered.index_select(1, own))

    @property
    def num_received(self) -> int:
        """S."""
        return sum(self._receive)

    def to_owners(self, x: Tensor) -> Tensor:
        """Samples x [N, ...] of this rank -> [S, ...], the rows of its experts, by sender."""
        sample = sample_of_row(self.routing.rows, self.routing.k)
        if self._order is not None:
            sample = sample.index_select(0, self._order)
        rows = x.detach().index_select(0, sample)
        return exchange_rows(rows, self._send, self._receive, self.ranks, "rows")

    def plan(self) -> Routing:
        """How what ``to_owners`` gives becomes groups of the own experts: its K is 1."""
        device, total = self._sorted.device, self.num_received
        bounds = torch.tensor([0, *accumulate(self.counts)], dtype=torch.int32)
        return Routing(
            weights=torch.ones(total, 1, device=device),
            mean=torch.zeros(len(self.own), device=device),
            experts=self._expert.unsqueeze(1),
            offsets=bounds.to(device, non_blocking=True),
            rows=self._sorted.int(),
            positions=self._back.int().unsqueeze(1),
            _counts=list(self.counts),
        )

    def to_samples(self, outputs: Tensor) -> Tensor:
        """Outputs [S, C, ...] of the own experts, in order -> [R, C, ...] of this rank's rows.

        In backward the gradients go to the owners, divided by the ranks of the replica: each rank's
        loss is a mean over its own samples, and an expert's gradient that of the mean over all.
        """
        return _ToSamples.apply(outputs, self)

    def _forward(self, outputs: Tensor) -> Tensor:
        by_sender = outputs.index_select(0, self._back)
        got = exchange_rows(by_sender, self._receive, self._send, self.ranks, "outputs")
        return got if self._place is None else got.index_select(0, self._place)

    def _backward(self, grad: Tensor) -> Tensor:
        by_owner = grad if self._order is None else grad.index_select(0, self._order)
        got = exchange_rows(by_owner, self._send, self._receive, self.ranks, "gradients")
        return got.index_select(0, self._sorted) / self.ranks.ep

    def _by_owner(self, owners: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """(rows by owner and then by expert, the inverse); None where they are in that order."""
        if all(a <= b for a, b in pairwise(owners)):
            return None, None
        table = torch.tensor(owners, device=self.routing.offsets.device)
        order = torch.argsort(table[expert_of_row(self.routing)], stable=True)
        return order, torch.argsort(order)

    def _by_expert(self, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """counts [ep, m], received rows of the m own experts by sender. (the expert of each [S];
        where the rows of each expert in turn were received, [S]; the inverse)."""
        expert = torch.arange(counts.shape[1], device=counts.device).repeat(len(counts))
        expert = expert.repeat_interleave(counts.flatten(), output_size=self.num_received)
        order = torch.argsort(expert, stable=True)
        return expert, order, torch.argsort(order)


class _ToSamples(torch.autograd.Function):
    @staticmethod
    def forward(ctx, outputs: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._forward(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.exchange._backward(grad), None
