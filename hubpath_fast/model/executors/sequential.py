"""One expert after another, on the current stream: right everywhere, and what others must equal."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ...routing import Routing
from .base import Executor
from .groups import call_expert, groups_of, join


class SequentialExecutor(Executor):
    name = "sequential"

    def run(
        self, experts: Sequence[nn.Module], rows: Tensor, routing: Routing, min_group: int
    ) -> Tensor:
        groups = groups_of(routing)
        outputs = [call_expert(experts, group, rows, min_group) for group in groups]
        return join(experts, groups, outputs)
