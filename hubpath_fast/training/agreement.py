"""What the ranks of a run decide together: whether to stop, and that all fail where one does.

Ranks take part in every collective or in none, so one that a signal asks to stop, or that cannot
read its batch, must not leave the others waiting. They meet once for each batch, with the host's
numbers alone. In one process a request to stop counts at once, and an error is simply raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..parallel.collectives import sum_over
from ..parallel.ranks import Ranks
from .config import TrainerConfig


class Stopped(Exception):
    """The run is being stopped: no more batches."""


class Agreement:
    """Args:
    ranks: of the run.
    asked: what asks this rank to stop, such as SIGTERM, or None.
    """

    def __init__(self, ranks: Ranks, asked: Callable[[], str | None]) -> None:
        self.ranks, self.asked = ranks, asked
        self._reasons: list[str | None] = []  # of each rank, once they agreed to stop

    @property
    def stopping(self) -> bool:
        """Whether the run is being stopped: the same on all ranks between two meetings."""
        return self.asked() is not None if self.ranks.single else bool(self._reasons)

    @property
    def reason(self) -> str:
        """What asked to stop."""
        reasons = [self.asked()] if self.ranks.single else self._reasons
        first = next(rank for rank, reason in enumerate(reasons) if reason is not None)
        everywhere = all(reason is not None for reason in reasons)
        return f"{reasons[first]}" if everywhere else f"{reasons[first]} to rank {first}"

    def forget(self) -> None:
        """Before a run begins or goes on."""
        self._reasons = []

    def meet(self, doing: str, error: Exception | None = None, patient: bool = False) -> bool:
        """Whether to stop; raises an error of any rank on all of them. Collective.

        doing: what every rank is at, for the others' messages. patient: whether some may be long in
        coming, as where processes that decode images are started.
        """
        if patient:
            self.ranks.barrier()
        if not self.ranks.single:
            flags = torch.tensor([self.asked() is not None, error is not None], dtype=torch.int64)
            asked, failed = sum_over(flags, self.ranks, "agreement").tolist()
            if failed:
                self.ranks.raise_together(error, doing)
            if asked and not self._reasons:
                self._reasons = self.ranks.gather(self.asked())
        elif error is not None:
            raise error
        return self.stopping

    def until_stopped(self, batches: Iterable) -> Iterator[Any]:
        """The batches; raises Stopped as soon as the run is being stopped. All ranks have as many.

        What a stream raises while this process is asked to stop is no error of its own.
        """
        iterator, doing, patient = iter(batches), "reading the batches of an evaluation", True
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                if self.asked() is None:
                    self.meet(doing, error, patient)
                batch = None
            if self.meet(doing, patient=patient):
                raise Stopped
            patient = False
            yield batch


def check_ranks(ranks: Ranks, config: TrainerConfig, model: nn.Module) -> None:
    """Raises ValueError unless each rank has a share of every micro-batch, and the model its ranks'
    experts."""
    if ranks.single:
        return
    size, world = config.batch_size, ranks.world
    if size % world:
        raise ValueError(
            f"batch_size: expected a multiple of {world}, the number of ranks, got {size}; take "
            f"{size // world * world or world} or {(size // world + 1) * world}"
        )
    if config.accumulate > size // world:
        raise ValueError(
            f"accumulate: expected an integer in 1..{size // world} (batch_size {size} on {world} "
            f"ranks), so that each has a sample in every micro-batch, got {config.accumulate}"
        )
    placement = getattr(model, "placement", None)
    if hasattr(model, "experts") and (placement is None or placement.ranks != ranks):
        raise ValueError(
            f"model: expected one that is distributed over the {world} ranks; call "
            "model.distribute(ranks) first"
        )
