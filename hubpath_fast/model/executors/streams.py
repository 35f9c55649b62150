"""Experts side by side on a few CUDA streams: what one small group leaves idle, another uses.

Memory: PyTorch's allocator hands a freed block to whoever allocates next on the stream it was
allocated on. Three things make that safe here. The side streams read the rows, which belong to the
caller's stream, so the rows are marked (``record_stream``). The caller's stream reads the outputs,
which belong to the side streams, but those allocate nothing before they have waited for it again:
forward at the fork, backward for the gradient of the outputs. Autograd runs each backward operation
on the stream of its forward one, and waits where they meet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...routing import Routing
from .base import Executor
from .groups import Group, call_expert, groups_of, join

NUM_STREAMS = 4  # each costs a workspace for matrix products (32 MiB on Hopper)


def assign(groups: Sequence[Group], num_streams: int) -> list[list[Group]]:
    """Groups for each stream: the largest first, each to the stream with the fewest rows so far."""
    lanes: list[list[Group]] = [[] for _ in range(num_streams)]
    for group in sorted(groups, key=lambda group: -group.count):
        min(lanes, key=lambda lane: sum(g.count for g in lane)).append(group)
    return [lane for lane in lanes if lane]


class StreamsExecutor(Executor):
    name = "streams"

    def __init__(self):
        super().__init__()
        self._streams: dict[torch.device, list[torch.cuda.Stream]] = {}

    def run(
        self, experts: Sequence[nn.Module], rows: Tensor, routing: Routing, min_group: int
    ) -> Tensor:
        groups = groups_of(routing)
        lanes = assign(groups, NUM_STREAMS)
        streams = self._side_streams(rows.device)[: len(lanes)]
        current = torch.cuda.current_stream(rows.device)
        outputs: dict[int, Tensor] = {}
        try:
            for stream, lane in zip(streams, lanes, strict=True):
                stream.wait_stream(current)
                rows.record_stream(stream)
                with torch.cuda.stream(stream):
                    for group in lane:
                        outputs[group.index] = call_expert(experts, group, rows, min_group)
        finally:  # joined after an expert's exception too: what was queued may be freed then
            for stream in streams:
                current.wait_stream(stream)
        return join(experts, groups, [outputs[group.index] for group in groups])

    def _side_streams(self, device: torch.device) -> list[torch.cuda.Stream]:
        if device not in self._streams:
            self._streams[device] = [torch.cuda.Stream(device) for _ in range(NUM_STREAMS)]
        return self._streams[device]
