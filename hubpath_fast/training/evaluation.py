"""Evaluation of a classifier, with noise off."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from ..devices import autocast, to_device


def evaluate(
    model: nn.Module, batches: Iterable, device: str | torch.device | None = None, amp="none"
) -> dict[str, float]:
    """Accuracy (0..1) and mean cross-entropy of a classifier over all of ``batches``, noise off.

    batches: yields (images, targets), targets [N] or [N, ...] of class indices. Every module's mode
    is restored afterwards. The totals stay on the device and are read once. Raises ValueError when
    there is not a single sample.
    """
    device = next(model.parameters()).device if device is None else torch.device(device)
    modes = {module: module.training for module in model.modules()}
    samples, labels, totals = 0, 0, torch.zeros(2, dtype=torch.float64, device=device)
    try:
        model.eval()
        with torch.no_grad():
            for images, targets in batches:
                images, targets = to_device((images, targets), device)
                with autocast(device, amp):
                    prediction = model(images)
                prediction = prediction if prediction.dtype == torch.float64 else prediction.float()
                loss = F.cross_entropy(prediction, targets, reduction="sum")
                correct = (prediction.argmax(1) == targets).sum()
                totals += torch.stack([correct.double(), loss.double()])
                samples, labels = samples + len(images), labels + targets.numel()
    finally:
        for module, training in modes.items():
            module.training = training
    if samples == 0:
        raise ValueError("batches yielded no sample to evaluate on; give it a list or a DataLoader")
    correct, loss = (totals / labels).tolist()
    return {"accuracy": correct, "loss": loss, "n": samples}
