"""What the trainer minimises: a callable ``objective(model, images, targets) -> Losses``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .._checks import check_some


@dataclass
class Losses:
    """The losses of one (micro-)batch.

    total: scalar, what backward is called on: a mean over samples.
    parts: named scalars for the log; the same names at every step.
    routing: None, or what a Hub-Pathway routed (``counts()`` and ``mean`` are read for the log).
    expert_outputs: None, or the experts' rows [R, ...] in the routing's order, which lets an error
        name the expert that produced a non-finite value.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    routing: Any = None
    expert_outputs: Tensor | None = None


Objective = Callable[[nn.Module, Any, Any], Losses]


class PathwayObjective:
    """A Hub-Pathway's task, explore and exploit losses (equation 6), from ``HubPathwayLoss``; and
    the router's, where the criterion supervises it."""

    def __init__(self, criterion: Callable) -> None:
        self.criterion = criterion

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Losses:
        criterion = self.criterion
        supervised = bool(getattr(criterion, "router_supervision", 0))
        if getattr(criterion, "can_fuse", False):
            asked = {"router_temperature": criterion.router_temperature} if supervised else {}
            smoothing = criterion.label_smoothing
            output = model(images, target=targets, label_smoothing=smoothing, **asked)
        else:
            output = model(images)
        losses = criterion(output, targets)
        names = ("task", "explore", "exploit", *(["router"] if supervised else []))
        parts = {name: getattr(losses, name, None) for name in names}
        parts = {name: value for name, value in parts.items() if value is not None}
        return Losses(losses.total, parts, output.routing, output.expert_outputs)


class SingleObjective:
    """The mean of one loss of a model's outputs: ``loss(outputs, targets) -> [N]``, one value for
    each sample, such as ``task.loss``."""

    def __init__(self, loss: Callable[[Tensor, Any], Tensor]) -> None:
        self.loss = loss

    def __call__(self, model: nn.Module, images: Tensor, targets: Any) -> Losses:
        return Losses(batch_mean(self.loss(model(images), targets)))


def batch_mean(losses: Tensor) -> Tensor:
    """The mean of the losses [N] of samples. Raises ValueError without any: it would be NaN."""
    check_some("losses", losses)
    return losses.mean()
