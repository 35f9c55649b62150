"""A model on several ranks: which rank has which expert, and what becomes of the others here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..devices import to_meta
from ..executors.groups import expert_name
from ..executors.parallel import ParallelExecutor
from ..executors.resident import ResidentExecutor
from ..executors.sharing import Sharing
from ..parallel.batch_norm import share_batch_norm
from ..parallel.ranks import Ranks
from .feature_generator import always_on

if TYPE_CHECKING:
    from .pathway import HubPathway


class Placement(NamedTuple):
    """owners: for each expert the rank of a replica (``Ranks.ep_rank``) that has it."""

    ranks: Ranks
    owners: tuple[int, ...]


class Distributing:
    """The calls of a ``HubPathway`` that give ranks its experts. ``placement`` says which rank has
    which; None of a model in one process."""

    def distribute(
        self: HubPathway, ranks: Ranks, owners: Sequence[int] | None = None
    ) -> HubPathway:
        """Leaves this rank its experts, in place; returns self.

        The experts of other ranks stay in ``experts`` by name and shape alone, on the meta device,
        without memory. Predictions and outputs are those of one process that gets the samples of
        all ranks, in the ranks' order, as one batch, the router's BatchNorm included; all ranks
        call the model the same number of times. Gradients: see ``parallel.Gradients``.

        Args:
            ranks: of ``parallel.start``. A single one changes nothing.
            owners: [M] for each expert the rank of a replica, 0..ep-1, that has it; None: in blocks
                of equal numbers.

        Raises:
            ValueError: owners that do not fit; experts on different ranks that share a module, a
                parameter or a buffer with each other; experts that share one with the router, or
                that it looks at; an expert with a SyncBatchNorm, or a router with a BatchNorm that
                is not torch's own; a model that is distributed or frozen.
        """
        if ranks.single:
            return self
        count = len(self.experts)
        owners = _in_blocks(count, ranks.ep) if owners is None else tuple(owners)
        self._check_distributable(ranks, owners)
        for part in (self.generator, self.aggregator):
            share_batch_norm(part, ranks)
        self.placement = Placement(ranks, owners)
        own = ranks.own(owners)
        to_meta([expert for i, expert in enumerate(self.experts) if i not in own])
        self._restart_executor()
        self.executor = ParallelExecutor(ranks, owners, self.executor)
        return self

    def _check_distributable(self: HubPathway, ranks: Ranks, owners: tuple[int, ...]) -> None:
        count = len(self.experts)
        if self.placement is not None or self.frozen is not None:
            state = "distributed already" if self.frozen is None else "frozen for inference"
            raise ValueError(f"model: is {state}; distribute a new one")
        if len(owners) != count or not all(0 <= owner < ranks.ep for owner in owners):
            raise ValueError(
                f"owners: expected a rank in 0..{ranks.ep - 1} for each of {count} experts, got "
                f"{list(owners)}"
            )
        for index, expert in enumerate(self.experts):
            if any(isinstance(m, nn.SyncBatchNorm) for m in expert.modules()):
                raise ValueError(
                    f"{expert_name(self.experts, index)}: has a SyncBatchNorm, which waits for "
                    "ranks that have no rows for this expert; use BatchNorm with --parallel ep, "
                    "where an expert sees its rows of all ranks"
                )
        if ranks.ep == 1:
            return
        if always_on(self.generator) is not None:
            raise ValueError(
                "generator: looks at an expert, which other ranks do not have; take a router that "
                "looks at the image or at a network of its own, or --parallel dp"
            )
        for index, first in enumerate(Sharing()(self.experts)):
            if owners[index] != owners[first]:
                raise ValueError(
                    f"owners: {expert_name(self.experts, index)} shares modules, parameters or "
                    f"buffers with experts[{first}], so both need one owner, got {owners[index]} "
                    f"and {owners[first]}; place them together, or take --parallel dp"
                )
        router = {id(t) for t in (*self.generator.parameters(), *self.aggregator.parameters())}
        for index, expert in enumerate(self.experts):
            if any(id(p) in router for p in expert.parameters()):
                raise ValueError(
                    f"{expert_name(self.experts, index)}: shares parameters with the router, which "
                    "every rank runs on its own samples; give the router a network of its own, or "
                    "take --parallel dp"
                )

    def _apply(self: HubPathway, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        """Experts of other ranks stay on the meta device, wherever the model is moved to, and those
        that come when they are used where they rest."""
        executor, experts = self.executor, list(self.experts)
        if isinstance(executor, ParallelExecutor):
            executor, experts = executor.inner, executor.own(experts)
        if isinstance(executor, ResidentExecutor):
            fn = executor.moving(experts, fn)

        def kept(tensor: Tensor) -> Tensor:
            if not tensor.is_meta or self.placement is None:
                return fn(tensor)
            try:
                changed = fn(tensor)
            except NotImplementedError:  # values that another device would need
                changed = None
            if changed is None or not changed.is_meta:
                dtype = _dtype_after(fn, tensor)
                changed = tensor if dtype == tensor.dtype else torch.empty_like(tensor, dtype=dtype)
            return changed

        return super()._apply(kept, recurse)


def _dtype_after(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> torch.dtype:
    """Of what a conversion makes of tensors like this one."""
    return fn(torch.empty(0, dtype=tensor.dtype)).dtype


def _in_blocks(count: int, ranks: int) -> tuple[int, ...]:
    return tuple(index * ranks // count for index in range(count))
