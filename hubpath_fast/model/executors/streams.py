"""Experts side by side on a few CUDA streams: what one small group leaves idle, another uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Executor
from .groups import Group, call_expert, groups_of, join
from .lanes import Lanes
from .rows import RowSource

NUM_STREAMS = 4


def assign(groups: Sequence[Group], num_streams: int) -> list[int]:
    """A stream for each group: the largest choose first, each the one with the fewest rows."""
    rows, chosen = [0] * num_streams, {}
    for group in sorted(groups, key=lambda group: -group.count):
        chosen[group.index] = rows.index(min(rows))
        rows[chosen[group.index]] += group.count
    return [chosen[group.index] for group in groups]


class StreamsExecutor(Executor):
    name = "streams"

    def __init__(self):
        super().__init__()
        self._lanes: dict[torch.device, Lanes] = {}

    def run(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        rows = source.rows()
        groups = groups_of(source.routing)
        if rows.device not in self._lanes:
            self._lanes[rows.device] = Lanes(rows.device, NUM_STREAMS)
        lanes = self._lanes[rows.device]
        assigned, outputs = assign(groups, NUM_STREAMS), []
        with lanes.forked(assigned, rows):
            # In the experts' order, so that each draws the random numbers it draws sequentially.
            for group, lane in zip(groups, assigned, strict=True):
                with lanes.lane(lane):
                    outputs.append(call_expert(experts, group, rows, min_group))
        return join(experts, groups, outputs)
