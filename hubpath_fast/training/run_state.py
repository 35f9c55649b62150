"""Where a run stands, and what came of it."""

from __future__ import annotations

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
