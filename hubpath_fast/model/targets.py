"""What a loss compares with: one tensor, or a tuple or a dict of tensors, all along the samples.

A policy's target is two things, the action that was taken and the distribution of its return; a
detector's are boxes and labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

Targets: TypeAlias = Tensor | tuple | Mapping


def of_samples(y: Targets, index: Tensor) -> Targets:
    """The targets of some samples: index [R] int64 along dimension 0 of each tensor."""
    if isinstance(y, Mapping):
        return {key: of_samples(part, index) for key, part in y.items()}
    if isinstance(y, tuple):
        parts = [of_samples(part, index) for part in y]
        return type(y)(*parts) if hasattr(y, "_fields") else tuple(parts)
    return y.index_select(0, index)


def check_lengths(y: Targets, num_samples: int, name: str = "y") -> None:
    """Raises ValueError, naming the part, unless each has one target for each of the samples."""
    if isinstance(y, Mapping | tuple):
        if not y:
            raise ValueError(f"{name}: expected targets, got an empty {type(y).__name__}")
        for key, part in y.items() if isinstance(y, Mapping) else enumerate(y):
            check_lengths(part, num_samples, f"{name}[{key!r}]")
        return
    if hasattr(y, "shape"):
        found = list(y.shape)
    else:
        found = [len(y)] if hasattr(y, "__len__") else type(y).__name__
    if found[:1] != [num_samples]:
        raise ValueError(f"{name}: expected {num_samples} targets as predictions, got {found}")
