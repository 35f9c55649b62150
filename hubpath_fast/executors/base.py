"""What an executor is: it takes a batch and its routing and gives the experts' outputs [R, C, ...].

Every expert is called once, on its own rows only. One without rows is not called: its parameters
get no gradient and its buffers do not move. What is run for frozen parts keeps nothing for the
backward pass: where no parameter that was met requires a gradient, autograd records nothing. The
generator, whose scores come first, is run by the executor, too.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .report import Counters
from .rows import RowSource


class Executor(ABC):
    """``executor(experts, source, min_group)``. A copy of one starts with nothing."""

    name: str
    needs: str | None = None  # the type of device it runs on; None: any

    def __init__(self, *arguments: object):
        self.counters, self.host_reads = Counters(), 0  # reads of the counts
        self._arguments = arguments  # that make another one like it

    def __call__(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        self.host_reads += not getattr(source.routing, "counts_known", False)
        self.counters.steps += 1
        return self.run(experts, source, min_group)

    def scores(self, generator: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the generator says of a batch x [N, ...]: clean [N, M] and noise [N, M]."""
        return generator(x)

    def settle(self, experts: Sequence[nn.Module]) -> None:  # noqa: B027
        """Has experts be where this executor wants them between steps, before anything else is made
        for their parameters. Most leave them where they are."""

    @contextlib.contextmanager
    def updating(
        self, experts: Sequence[nn.Module], optimizer: torch.optim.Optimizer
    ) -> Iterator[None]:
        """Within, steps of an optimizer that follow a backward pass each, with nothing between that
        looks at gradients, and with fixed betas: an executor that keeps experts' parameters in a
        form of its own may make the updates of them. To other eyes they are the optimizer's."""
        yield

    @abstractmethod
    def run(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        """Outputs [R, C, ...] in row order. ``routing.counts()`` is the only host read allowed."""

    def warm_up(self, step: Callable[[], object], device: torch.device) -> None:  # noqa: B027
        """Gets ready for steps like this one, of which it runs some, as if none had been run: no
        parameter, buffer, gradient or random state changes. Most executors have nothing to do."""

    def __reduce__(self):
        # Streams, graphs and counts belong to one model in one process.
        return type(self), self._arguments
