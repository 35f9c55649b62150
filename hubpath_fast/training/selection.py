"""Evaluations during training: which step is the best, and when to stop for lack of a better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..measure import Measure
from .agreement import Agreement, Stopped
from .config import TrainerConfig
from .evaluation import evaluate
from .random_state import random_state, set_random_state
from .run_state import RunState
from .task import Task


class Selection:
    """Evaluates a model and keeps count of its best step.

    Args:
        task: what is learned; it evaluates.
        validation: see ``Trainer``; None: there are no evaluations.
        config: of the trainer.
        agreement: whether the run is being stopped; its ranks evaluate together.

    Raises:
        ValueError: patience without validation, or a metric of which it is not known which way is
            better.
    """

    def __init__(
        self,
        task: Task,
        validation: Iterable | Callable[[], Iterable] | None,
        config: TrainerConfig,
        agreement: Agreement,
    ) -> None:
        if config.patience is not None and validation is None:
            raise ValueError(
                f"patience: expected None without validation batches, got {config.patience}; give "
                "validation, which the metric comes from"
            )
        self.task, self.validation = task, validation
        self.config, self.agreement = config, agreement
        self.metric = _metric(task, config)

    def due(self, step: int) -> bool:
        every = self.config.eval_every
        return self.validation is not None and (
            step >= self.config.steps or (every > 0 and step % every == 0)
        )

    def evaluate(
        self, model: nn.Module, state: RunState, save: Callable[[str], None]
    ) -> dict[str, Any] | None:
        """Evaluates the model; for the log the task's "validation", the "best" metric so far, and
        of a Hub-Pathway the "routes".

        ``state`` takes note of a best step, which is saved as "best", and of whether to stop. None,
        and the random generators as before, if the run is being stopped meanwhile.
        """
        device = torch.device(self.config.device)
        before = random_state(device)
        batches = self.validation() if callable(self.validation) else self.validation
        try:
            scores = evaluate(
                model,
                self.agreement.until_stopped(batches),
                self.task,
                device,
                self.config.amp,
                self.agreement.ranks,
            )
        except Stopped:
            set_random_state(before, device)
            return None
        routes = {"routes": scores.pop("routes")} if "routes" in scores else {}
        if routes:
            routes["routes"].pop("class_share", None)  # too much for a line of the log
        if self.metric.name not in scores:
            raise ValueError(
                f"metric: expected one of {', '.join(scores)}, got {self.metric.name!r}; name a "
                "result of the evaluation, or None for the task's own metric"
            )
        value = scores[self.metric.name]
        better = state.best is None or self.metric.is_better(value, than=state.best)
        if better and math.isfinite(value):
            state.best, state.best_step, state.stale = value, state.step, 0
            save("best")
        else:
            state.stale += 1
            patience = self.config.patience
            state.stopped_early = patience is not None and state.stale >= patience
        return {"validation": scores, "best": state.best, **routes}


def _metric(task: Task, config: TrainerConfig) -> Measure:
    """The task's own, or another result of evaluations that the settings name."""
    name, better = config.metric or task.metric.name, config.metric_mode
    if better is None and name != task.metric.name:
        raise ValueError(
            f"metric_mode: expected max or min with metric={name!r}, got None; only of the task's "
            f"own metric, {task.metric.name}, is it known which is better"
        )
    return Measure(name, better or task.metric.better)
