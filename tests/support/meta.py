"""Whether something has no memory here."""

from __future__ import annotations

from torch import Tensor, nn


def on_meta(value: Tensor | nn.Module) -> bool:
    """Whether a tensor, or any parameter or buffer of a module, is on the meta device."""
    if isinstance(value, Tensor):
        return value.is_meta
    return any(tensor.is_meta for tensor in (*value.parameters(), *value.buffers()))
