"""The batches of a run, from streams that may break because the run is being stopped.

A signal to a process group ends the processes that decode images as well. What a stream raises
while this process is asked to stop is therefore no error of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..parallel.ranks import Ranks
from .config import TrainerConfig
from .random_state import random_state, set_random_state


class Feed:
    """A run's training batches, from any step on.

    Args:
        stream: see ``Trainer``.
        config: of the trainer.
        asked: what asks this process to stop, or None.
        ranks: of the run: the batches are then this rank's share.
    """

    def __init__(
        self,
        stream: Any,
        config: TrainerConfig,
        asked: Callable[[], str | None],
        ranks: Ranks = Ranks(),
    ) -> None:
        self.stream, self.config, self.asked, self.ranks = stream, config, asked, ranks
        self._batches: Iterator | None = None

    @property
    def begun(self) -> bool:
        """Whether the stream was asked for a batch."""
        return self._batches is not None

    def next(self, step: int) -> tuple[Any, Any] | None:
        """The batch of a step, which follows the one before; None if this process is asked to stop
        and the stream broke.

        Raises:
            ValueError: the stream has ended, or a batch has fewer samples than micro-batches or is
                not the rank's share.
        """
        try:
            images, targets = self._first(step) if self._batches is None else next(self._batches)
        except StopIteration:
            raise ValueError(
                f"stream: ended at step {step} of {self.config.steps}; batches(start_step) must go "
                "on for as long as it is asked"
            ) from None
        except Exception:
            if self.asked() is not None:
                return None
            raise
        if not self.ranks.single:
            self._check_share(len(images), step)
        elif len(images) < self.config.accumulate:
            raise ValueError(
                f"accumulate: expected at most the samples of a batch, got "
                f"{self.config.accumulate} for the {len(images)} of step {step}; lower accumulate"
            )
        return images, targets

    def _check_share(self, found: int, step: int) -> None:
        size = self.config.batch_size
        own = len(self.ranks.share(self.config.accumulate).positions(size))
        if found != own:
            raise ValueError(
                f"stream: expected {own} of the {size} samples of a batch, this rank's share, got "
                f"{found} at step {step}; give the stream share=ranks.share(accumulate)"
            )

    def _first(self, step: int) -> tuple[Any, Any]:
        """Starting an iterator may draw random numbers; a run that resumes here must not be set off
        course by one more start."""
        device = torch.device(self.config.device)
        before = random_state(device)
        try:
            self._batches = iter(self.stream.batches(step))
            return next(self._batches)
        finally:
            set_random_state(before, device)

    def close(self) -> None:
        if hasattr(self._batches, "close"):
            self._batches.close()
        self._batches = None
