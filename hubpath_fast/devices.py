"""What runs a model: batches on its device, in micro-batches; its precision, and its mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The precision context of ``TrainerConfig.amp``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp == "bf16")


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode; after it each module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def to_device(value: Any, device: torch.device) -> Any:
    """Move a tensor, or a tuple, list (made a tuple) or dict of them, not waiting for the copy."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(to_device(item, device) for item in value)
    return value


def micro_batch(value: Any, size: int, part: int, parts: int) -> Any:
    """The samples of one micro-batch, of a tensor or a tuple or dict of tensors."""
    if isinstance(value, dict):
        return {key: micro_batch(item, size, part, parts) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(micro_batch(item, size, part, parts) for item in value)
    return value[size * part // parts : size * (part + 1) // parts]
