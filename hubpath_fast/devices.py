"""What runs a model: batches on its device, in micro-batches; its precision, and its mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only


def read_device(name: str) -> torch.device:
    """The device that is meant, which may be another machine's; ValueError if none is."""
    try:
        return torch.device(name)
    except RuntimeError:  # with all that torch knows
        raise ValueError(f"device: expected cpu, cuda, cuda:0, ..., got {name!r}") from None


def check_device(name: str) -> torch.device:
    """The device, if torch sees it; else ValueError."""
    device, count = read_device(name), 0
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if present is not None and present.type == device.type:
        count = torch.accelerator.device_count()
    if device.type != "cpu" and (device.index or 0) >= count:
        kind = device.type
        seen = ", ".join(f"{kind}:{i}" for i in range(count)) or f"no {kind.upper()} device"
        raise ValueError(f"device: torch sees {seen}, got {name!r}; use one that is there, or cpu")
    return device


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
    """Move a tensor, or the tensors in tuples, lists and dicts, not waiting for the copy."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), value)


def micro_batch(value: Any, size: int, part: int, parts: int) -> Any:
    """The samples of one micro-batch, of a tensor or of tensors in tuples, lists and dicts."""
    samples = slice(size * part // parts, size * (part + 1) // parts)
    return tree_map(lambda tensor: tensor[samples], value)
