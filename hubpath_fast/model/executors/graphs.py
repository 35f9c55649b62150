"""Experts as captured CUDA graphs: a replay is one launch where an expert has hundreds.

A graph is captured for an expert at a size once that pair was seen a few times, in training with
gradients; predictions, groups below ``min_group`` and everything else run eagerly. The least
recently used graph is dropped when all together outgrow the memory budget. An expert that cannot be
captured runs eagerly from then on, and the report says why.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...routing import Routing
from .base import Executor
from .capture import Backend, CapturedExpert, CudaBackend, Pool
from .eligible import bucket, is_row_wise, refusal, signature
from .groups import Group, call_expert, groups_of, join

MIN_SEEN = 3  # a capture costs several eager runs; rare sizes never earn it back


class GraphsExecutor(Executor):
    """backend: makes what captures for a device; budget: bytes for graphs, None: the backend's."""

    name = "graphs"

    def __init__(
        self,
        backend: Callable[[torch.device], Backend] = CudaBackend,
        budget: int | None = None,
    ):
        super().__init__()
        self._make_backend, self._budget = backend, budget
        self._backend: Backend | None = None
        self._graphs: OrderedDict[tuple[int, int], CapturedExpert] = OrderedDict()
        self._signatures: dict[int, tuple] = {}
        self._pools: dict[int, Pool] = {}
        self._seen: Counter[tuple[int, int]] = Counter()
        self._given_up = False

    def run(
        self, experts: Sequence[nn.Module], rows: Tensor, routing: Routing, min_group: int
    ) -> Tensor:
        if self._backend is None:
            self._backend = self._make_backend(rows.device)
            self._budget = self._backend.budget() if self._budget is None else self._budget
        groups = groups_of(routing)
        outputs = [self._run_group(experts, group, rows, min_group) for group in groups]
        return join(experts, groups, outputs)

    def _run_group(
        self, experts: Sequence[nn.Module], group: Group, rows: Tensor, min_group: int
    ) -> Tensor:
        expert = experts[group.index]
        own = rows[group.start : group.start + group.count]
        captured = None
        if torch.is_grad_enabled() and expert.training and group.count >= min_group:
            captured = self._captured(experts, group, own)
        if captured is None or captured.pool.busy:
            self.counters.misses += 1
            return call_expert(experts, group, rows, min_group)
        self.counters.hits += 1
        return captured(own)

    def _captured(
        self, experts: Sequence[nn.Module], group: Group, own: Tensor
    ) -> CapturedExpert | None:
        index, expert = group.index, experts[group.index]
        found = signature(expert, own)
        if self._signatures.get(index) != found:  # another expert, storage, mode or precision
            self._forget(index)
            self._signatures[index] = found
        if index in self.counters.eager:
            return None
        size = bucket(group.count) if is_row_wise(expert) else group.count
        key = (index, size)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        self._seen[key] += 1
        pool = self._pools.get(index)
        if self._given_up or self._seen[key] < MIN_SEEN or (pool is not None and pool.busy):
            return None
        return self._capture(expert, own, key)

    def _capture(
        self, expert: nn.Module, own: Tensor, key: tuple[int, int]
    ) -> CapturedExpert | None:
        index, size = key
        reason = refusal(expert)
        if reason is not None:
            self.counters.eager[index] = reason
            return None
        try:
            if index not in self._pools:
                self._pools[index] = Pool(self._backend.new_pool())
            captured = CapturedExpert(expert, own, size, self._pools[index], self._backend)
        except Exception as error:  # whatever an expert does that a capture does not allow
            if _out_of_memory(error):
                self.drop_all()
                self._given_up = True
                self.counters.notes = ("out of memory while capturing: all graphs were dropped",)
                return None
            first = (str(error).strip().splitlines() or [""])[0]
            self.counters.eager[index] = f"cannot be captured: {type(error).__name__}: {first}"
            self._remove([k for k in self._graphs if k[0] == index])
            return None
        self._graphs[key] = captured
        while len(self._graphs) > 1 and self._held() > self._budget:
            self._graphs.popitem(last=False)
        self._count()
        return captured

    def drop_all(self) -> None:
        """Frees every graph; a backward that is under way keeps its own until it is done."""
        self._remove(list(self._graphs))
        self._pools.clear()

    def _forget(self, index: int) -> None:
        """What was learned of an expert that has changed since."""
        self._remove([key for key in self._graphs if key[0] == index])
        self._pools.pop(index, None)
        self.counters.eager.pop(index, None)
        for key in [key for key in self._seen if key[0] == index]:
            del self._seen[key]

    def _remove(self, keys: list[tuple[int, int]]) -> None:
        for key in keys:
            del self._graphs[key]
        self._count()

    def _held(self) -> int:
        return sum(captured.memory for captured in self._graphs.values())

    def _count(self) -> None:
        self.counters.memory = self._held()
        self.counters.captured.clear()
        for index, size in sorted(self._graphs):
            self.counters.captured.setdefault(index, []).append(size)


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether it is, or came while handling one: a capture that is broken off raises once more."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None
