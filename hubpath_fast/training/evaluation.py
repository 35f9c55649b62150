"""Evaluation of a model on a task."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..devices import autocast, eval_mode, to_device
from .task import Task


def evaluate(
    model: nn.Module,
    batches: Iterable,
    task: Task,
    device: str | torch.device | None = None,
    amp: str = "none",
) -> dict[str, float]:
    """What a task says of a model's outputs on all batches, in evaluation mode.

    Args:
        model: images -> outputs [N, ...]; every module's mode is restored afterwards.
        batches: yields (images, targets).
        task: its meter does the counting, on the device.
        device: where to evaluate; None: where the model is.
        amp: "none" or "bf16".

    Returns:
        Means over all samples by name, the task's metric among them, and "n", the samples.

    Raises:
        ValueError: there is not a single sample.
    """
    device = next(model.parameters()).device if device is None else torch.device(device)
    meter = task.meter(device)
    with eval_mode(model), torch.no_grad():
        for images, targets in batches:
            images, targets = to_device((images, targets), device)
            with autocast(device, amp):
                outputs = model(images)
            meter.add(outputs, targets)
    return meter.result()
