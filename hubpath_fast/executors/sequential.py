"""One expert after another, on the current stream: right everywhere, and what others must equal."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .base import Executor
from .groups import call_expert, groups_of, join
from .rows import RowSource


class SequentialExecutor(Executor):
    name = "sequential"

    def run(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        rows = source.rows()
        groups = groups_of(source.routing)
        outputs = [
            call_expert(experts, group, rows, min_group, source.precision) for group in groups
        ]
        return join(experts, groups, outputs)
