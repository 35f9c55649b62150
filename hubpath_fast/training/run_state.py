"""Where a run stands, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainResult:
    """What came of a run. Seconds are of the training steps (evaluations and checkpoints left out),
    over all sessions of a resumed run; history is the lines of its log."""

    steps: int
    best_metric: float | None
    best_step: int | None
    seconds: float
    images_per_second: float
    interrupted: bool
    stopped_early: bool
    history: list[dict[str, Any]] = field(repr=False)


@dataclass
class RunState:
    """Where a run stands, as its checkpoints keep it."""

    step: int = 0  # updates done
    reported: int = 0  # the last step whose log line and evaluation are done
    best: float | None = None
    best_step: int | None = None
    stale: int = 0  # evaluations since the best
    stopped_early: bool = False
    seconds: float = 0.0  # of training steps, without evaluations and checkpoints
    images: int = 0  # in those seconds

    def result(self, interrupted: bool, history: list[dict[str, Any]]) -> TrainResult:
        return TrainResult(
            steps=self.step,
            best_metric=self.best,
            best_step=self.best_step,
            seconds=self.seconds,
            images_per_second=self.images / self.seconds if self.seconds else 0.0,
            interrupted=interrupted,
            stopped_early=self.stopped_early,
            history=history,
        )


class Interval:
    """The training since the last line of the log: its images, its seconds, and of those the
    seconds that it waited for the stream. seconds: that have passed already, of a resumed run."""

    def __init__(self, images: int = 0, waited: float = 0.0, seconds: float = 0.0) -> None:
        self.images, self.waited, self._began = images, waited, time.perf_counter() - seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens within is waiting for the stream."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[tuple[int, float, float]]:
        """What happens within is no training. Gives what makes an equal interval."""
        began = time.perf_counter()
        yield self.images, self.waited, began - self._began
        self._began += time.perf_counter() - began

    def close(self, state: RunState) -> dict[str, float]:
        """Adds the interval to the run's totals; the rates for the log. seconds: the run's, without
        evaluations and checkpoints; data_wait: the share of waiting."""
        seconds = time.perf_counter() - self._began
        state.seconds += seconds
        state.images += self.images
        return {
            "seconds": state.seconds,
            "images_per_second": self.images / seconds,
            "data_wait": self.waited / seconds,
        }
