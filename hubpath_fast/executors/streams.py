"""Experts concurrent on a few CUDA streams: what one small group leaves idle, another uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Executor
from .groups import Group, call_expert, groups_of, join
from .rows import RowSource
from .sharing import Sharing
from .stream_pool import StreamPool

NUM_STREAMS = 4


def assign(groups: Sequence[Group], num_streams: int, first: Sequence[int]) -> list[int]:
    """A stream for each group: the largest choose first, each the one with the fewest rows.

    first: of each expert, the first one that it shares modules with: these go together.
    """
    together = Counter()
    for group in groups:
        together[first[group.index]] += group.count
    rows, chosen = [0] * num_streams, {}
    for index, count in together.most_common():
        chosen[index] = rows.index(min(rows))
        rows[chosen[index]] += count
    return [chosen[first[group.index]] for group in groups]


class StreamsExecutor(Executor):
    name, needs = "streams", "cuda"

    def __init__(self):
        super().__init__()
        self._pools: dict[torch.device, StreamPool] = {}
        self._sharing = Sharing()

    def run(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        rows = source.rows()
        groups = groups_of(source.routing)
        if rows.device not in self._pools:
            self._pools[rows.device] = StreamPool(rows.device, NUM_STREAMS)
        pool = self._pools[rows.device]
        assigned, outputs = assign(groups, NUM_STREAMS, self._sharing(experts)), []
        with pool.forked(assigned, rows):
            # In the experts' order, so that each draws the random numbers it draws sequentially.
            for group, stream in zip(groups, assigned, strict=True):
                with pool.on(stream):
                    outputs.append(call_expert(experts, group, rows, min_group, source.precision))
        return join(experts, groups, outputs)
