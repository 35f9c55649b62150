"""One expert after another, on the current stream: right everywhere, and what others must equal."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .base import Executor
from .groups import Group, call_expert, groups_of, join
from .rows import RowSource


class SequentialExecutor(Executor):
    name = "sequential"

    def run(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        if source.is_batch and all(getattr(expert, "keeps_input", False) for expert in experts):
            rows, count = source.x, len(source.x)
            groups = [Group(index, 0, count) for index in range(len(experts))]
        else:
            rows, groups = source.rows(), groups_of(source.routing)
        outputs = [
            call_expert(experts, group, rows, min_group, source.precision) for group in groups
        ]
        return join(experts, groups, outputs)
