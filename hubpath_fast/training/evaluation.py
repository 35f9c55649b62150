"""Evaluation of a model on a task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..devices import autocast, eval_mode, to_device
from ..model import HubPathway
from .routes import RouteMeter
from .task import Task


def evaluate(
    model: nn.Module,
    batches: Iterable,
    task: Task,
    device: str | torch.device | None = None,
    amp: str = "none",
) -> dict[str, Any]:
    """What a task says of a model's outputs on all batches, in evaluation mode.

    Args:
        model: images -> outputs [N, ...]; every module's mode is restored afterwards.
        batches: yields (images, targets).
        task: its meter does the counting, on the device.
        device: where to evaluate; None: where the model is.
        amp: "none" or "bf16".

    Returns:
        Means over all samples by name, the task's metric among them, and "n", the samples; of a
        Hub-Pathway also "routes", where samples were sent without noise: see ``RouteMeter``.

    Raises:
        ValueError: there is not a single sample.
    """
    device = next(model.parameters()).device if device is None else torch.device(device)
    meter, routes = task.meter(device), RouteMeter()
    routed = isinstance(model, HubPathway)
    with eval_mode(model), torch.no_grad():
        for images, targets in batches:
            images, targets = to_device((images, targets), device)
            with autocast(device, amp):
                if routed:  # what its forward does, with the routing in between
                    routing = model.route(images)
                    outputs = model(images, routing=routing)
                    routes.add(routing, targets)
                else:
                    outputs = model(images)
            meter.add(outputs, targets)
    return {**meter.result(), **({"routes": routes.result()} if routed else {})}
