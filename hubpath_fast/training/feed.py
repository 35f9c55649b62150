"""The batches of a run, from streams that may break because the run is being stopped.

A signal to a process group ends the processes that decode images as well. What a stream raises
while the run is being stopped is therefore no error of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .config import TrainerConfig
from .random_state import random_state, set_random_state


class Stopped(Exception):
    """The run is being stopped: no more batches."""


class Feed:
    """A run's training batches, from any step on.

    Args:
        stream: see ``Trainer``.
        config: of the trainer.
        stopping: whether the run is being stopped.
    """

    def __init__(self, stream: Any, config: TrainerConfig, stopping: Callable[[], bool]) -> None:
        self.stream, self.config, self.stopping = stream, config, stopping
        self._batches: Iterator | None = None

    def next(self, step: int) -> tuple[Any, Any] | None:
        """The batch of a step, which follows the one before; None if the run is being stopped and
        the stream broke.

        Raises:
            ValueError: the stream has ended, or a batch has fewer samples than micro-batches.
        """
        try:
            images, targets = self._first(step) if self._batches is None else next(self._batches)
        except StopIteration:
            raise ValueError(
                f"stream: ended at step {step} of {self.config.steps}; batches(start_step) must go "
                "on for as long as it is asked"
            ) from None
        except Exception:
            if self.stopping():
                return None
            raise
        if len(images) < self.config.accumulate:
            raise ValueError(
                f"accumulate: expected at most the samples of a batch, got "
                f"{self.config.accumulate} for the {len(images)} of step {step}; lower accumulate"
            )
        return images, targets

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


def until_stopped(batches: Iterable, stopping: Callable[[], bool]) -> Iterator:
    """The batches; raises Stopped as soon as the run is being stopped."""
    iterator = iter(batches)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            if stopping():
                raise Stopped from error
            raise
        if stopping():
            raise Stopped
        yield batch
