"""What the torch implementation's operations share: where rows are from, what is computed in, and
how an operation of several calls is made one for compiled code. Letters as in ``functional``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .routing import Routing

_LIBRARY = torch.library.Library("hubpath_fast", "FRAGMENT")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What an operation computes in: float64 for float64, float32 for anything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sample_of_row(rows: Tensor, k: int) -> Tensor:
    """[R] the sample whose slot each row is."""
    return torch.div(rows, k, rounding_mode="floor").long()


def expert_of_row(plan: Routing) -> Tensor:
    """[R] the expert that each row is of."""
    row = torch.arange(plan.rows.numel(), device=plan.rows.device, dtype=torch.int32)
    return torch.searchsorted(plan.offsets[1:], row, right=True)


def weight_of_row(weights: Tensor, rows: Tensor) -> Tensor:
    """[R] of weights [N, K]."""
    return weights.flatten().index_select(0, rows)


def cpu_operation(schema: str, function: Callable, fake: Callable) -> Callable:
    """An operation of its own: compiled code calls it whole and does not look into its loop."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CPU")
    torch.library.register_fake(f"hubpath_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.hubpath_fast, name).default
