"""Evaluation of a model on a task.

Several ranks each evaluate their share of every batch, and what they counted is merged in the
ranks' order, so that all of them find the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from ..devices import autocast, eval_mode, to_device
from ..model import HubPathway, answers
from ..parallel.ranks import Ranks
from .routes import RouteMeter
from .task import Meter, Task

M = TypeVar("M", Meter, RouteMeter)


def evaluate(
    model: nn.Module,
    batches: Iterable,
    task: Task,
    device: str | torch.device | None = None,
    amp: str = "none",
    ranks: Ranks = Ranks(),
    expert_major: bool = False,
) -> dict[str, Any]:
    """What a task says of a model's outputs on all batches, in evaluation mode.

    Args:
        model: images -> outputs [N, ...]; every module's mode is restored afterwards.
        batches: yields (images, targets). Of several ranks, this one's share (``EvalBatches``): as
            many on every rank, where images without targets are run and not counted.
        task: its meter does the counting, on the device.
        device: where to evaluate; None: where the model is.
        amp: "none" or "bf16".
        ranks: that evaluate together; the result is that of all of them, on each.
        expert_major: of a Hub-Pathway: expert by expert over many batches, not batch by batch; see
            ``HubPathway.predict_expert_major``. Batches should come on the host.

    Returns:
        Means over all samples by name, the task's metric among them, and "n", the samples; of a
        Hub-Pathway also "routes", where samples were sent without noise: see ``RouteMeter``.

    Raises:
        ValueError: there is not a single sample.
    """
    if device is None:  # experts of other ranks are on none
        device = next(p.device for p in model.parameters() if not p.is_meta)
    device = torch.device(device)
    meter, routes = task.meter(device), RouteMeter()
    routed = isinstance(model, HubPathway)
    with eval_mode(model), torch.no_grad():
        if routed:
            for outputs, routing, targets in answers(model, batches, device, amp, expert_major):
                if ranks.single or len(targets):
                    targets = to_device(targets, device)
                    routes.add(routing, targets)
                    meter.add(outputs, targets)
        else:
            for images, targets in batches:
                images, targets = to_device((images, targets), device)
                with autocast(device, amp):
                    outputs = model(images)
                if ranks.single or len(targets):
                    meter.add(outputs, targets)
    meter, routes = _of_all(meter, ranks), _of_all(routes, ranks)
    return {**meter.result(), **({"routes": routes.result()} if routed else {})}


def _of_all(meter: M, ranks: Ranks) -> M:
    """With what those of the other ranks have counted."""
    if ranks.single:
        return meter
    first, *others = ranks.gather(meter.cpu())
    for other in others:
        first.merge(other)
    return first
