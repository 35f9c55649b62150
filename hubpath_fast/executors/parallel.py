"""Experts on several ranks: an executor around those that run a rank's own.

Every rank gives its samples' rows to the ranks that have the experts, runs its own experts on the
rows of all, and gets its outputs back (see ``parallel.exchange``). The inner executor sees a batch
as any other. With all experts on each rank (ep = 1) nothing travels, and what is left is that ranks
fail together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import functional as HF
from ..parallel.collectives import largest_over
from ..parallel.exchange import Exchange
from ..parallel.failure import RankFailure
from ..parallel.ranks import Ranks
from .base import Executor
from .of_model import ModelExecutors
from .report import Counters
from .rows import RowSource


class ParallelExecutor(Executor):
    """Runs what ``owners`` says on this rank, by the executor called ``inner``.

    All ranks call it the same number of times, each with at least one sample. An exception of one
    rank's experts is raised on all ranks.

    Args:
        ranks: of the run.
        owners: for each expert the rank of a replica (``Ranks.ep_rank``) that has it.
        inner: one of ``EXECUTORS``, or an ``Executor``, for this rank's experts.
    """

    name = "parallel"

    def __init__(self, ranks: Ranks, owners: Sequence[int], inner: str | Executor = "auto"):
        super().__init__(ranks, tuple(owners), inner)
        self.ranks, self.owners, self.inner = ranks, tuple(owners), inner
        self._executors = ModelExecutors()
        self._own: list[nn.Module] = []
        self._running: Executor | None = None  # what ran the last batch
        self._forms: dict[tuple, tuple] = {}  # of a row's output, by the kind of batch

    @property
    def counters(self) -> Counters:
        """The inner executor's, with what this rank is."""
        inner = Counters() if self._running is None else self._running.counters
        ranks = self.ranks
        own = ranks.own(self.owners)
        about = (
            f"rank {ranks.rank} of {ranks.world} ({ranks.dp} x {ranks.ep}): experts "
            f"{', '.join(map(str, own)) or 'none'}",
            *([] if self._running is None else [f"inside: {self._running.name}"]),
        )
        return replace(inner, steps=self._steps.steps, notes=(*about, *inner.notes))

    @counters.setter
    def counters(self, counters: Counters) -> None:
        self._steps = counters

    def __call__(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        self.host_reads += 1
        self._steps.steps += 1
        return self.run(experts, source, min_group)

    def settle(self, experts: Sequence[nn.Module]) -> None:
        if isinstance(self.inner, Executor):
            self._own = self.own(experts)
            self.inner.settle(self._own)

    def own(self, experts: Sequence[nn.Module]) -> list[nn.Module]:
        """Of the model's experts those that this rank has."""
        return [experts[index] for index in self.ranks.own(self.owners)]

    def scores(self, generator: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._inner(self._own, x).scores(generator, x)

    def run(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        if source.requires_grad:
            raise ValueError(
                "x: requires a gradient, which experts on other ranks do not send back; detach it"
            )
        if self.ranks.ep == 1:
            return self._together(source, lambda: self._run_all(experts, source, min_group))
        exchange = Exchange(source.routing, self.owners, self.ranks)
        received = exchange.to_owners(source.x)
        self._own = own = self.own(experts)

        def run() -> Tensor | None:
            if not len(received):
                return None
            rows = self._rows(own, source, received, exchange)
            return self._inner(own, source.x).run(own, rows, min_group)

        return exchange.to_samples(self._together(source, run))

    def _together(self, source: RowSource, run: Callable[[], Tensor | None]) -> Tensor:
        """The outputs [S, C, ...] of ``run``, which gives None where there is no row; an exception
        on any rank is raised on all."""
        outputs, error = None, None
        kind = (source.x.shape[1:], source.dtype, HF.autocast_dtype(source.x.device.type))
        form = self._forms.get(kind)
        try:
            outputs = run()
            if outputs is not None and form not in (None, _form(outputs)):
                raise ValueError(
                    f"experts: expected outputs of shape {list(form[0])} a row as before, got "
                    f"{list(outputs.shape[1:])}; ranks without rows cannot know of another"
                )
        except RankFailure:
            raise
        except Exception as raised:
            error = raised
        failed = torch.tensor([error is not None], dtype=torch.int32)
        if largest_over(failed, self.ranks, "agreement").item():
            self.ranks.raise_together(error, "running its experts")
        if form is None:
            form = self._forms[kind] = self._agreed_form(outputs)
        if outputs is None:
            shape, dtype = form
            outputs = torch.empty(0, *shape, dtype=dtype, device=source.x.device)
        if torch.is_grad_enabled() and not outputs.requires_grad:
            # All ranks take part in backward, those too whose experts have nothing to learn.
            outputs = outputs.detach().requires_grad_()
        return outputs

    def _agreed_form(self, outputs: Tensor | None) -> tuple[torch.Size, torch.dtype]:
        """Of a row's output: ranks without rows learn it from the others."""
        found = self.ranks.gather(None if outputs is None else _form(outputs))
        forms = {form: rank for rank, form in enumerate(found) if form is not None}
        if len(forms) == 1:
            return next(iter(forms))
        told = " and ".join(f"{list(f[0])} {f[1]} on rank {rank}" for f, rank in forms.items())
        error = ValueError(
            f"experts: expected outputs of one shape and dtype a row on all ranks, got {told}; all "
            "experts need the same C (and map size): replace their heads for the task"
        )
        error.agreed = True
        raise error

    def _run_all(self, experts: Sequence[nn.Module], source: RowSource, min_group: int) -> Tensor:
        self._own = list(experts)
        return self._inner(experts, source.x).run(experts, source, min_group)

    def _inner(self, own: Sequence[nn.Module], x: Tensor) -> Executor:
        self._running = self._executors(self.inner, own, 1, x)
        return self._running

    def _rows(
        self, own: Sequence[nn.Module], source: RowSource, received: Tensor, exchange: Exchange
    ) -> RowSource:
        """What the inner executor is given: the received samples, one row of each."""
        index = torch.tensor(exchange.own, device=received.device)
        scale, shift = (
            None if each is None else each.index_select(0, index)
            for each in (source.scale, source.shift)
        )
        return replace(
            source,
            x=received,
            routing=exchange.plan(),
            scale=scale,
            shift=shift,
            dtype=source.precision.rows_dtype(own, received, source.dtype),
            most_rows=exchange.samples,
        )


def _form(outputs: Tensor) -> tuple[torch.Size, torch.dtype]:
    return outputs.shape[1:], outputs.dtype
