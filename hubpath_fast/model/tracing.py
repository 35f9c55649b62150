"""Recorders that would keep the route of one batch for ever, and what is said to them.

How many rows each expert gets is read on the host, from the values of the batch. A recorder of
operations (``torch.jit.trace``, ``torch.export``, ONNX, ``torch.fx``) keeps those numbers, or even
the rows, as constants; what it gives back splits every later batch as the example was split.
``torch.compile`` is none of them: it breaks its graph where the host reads, and reads again.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

RECORDERS = "torch.jit, torch.export, torch.onnx and torch.fx"
REFUSAL = (
    f"HubPathway cannot be recorded as a fixed graph ({RECORDERS}), alone or inside a larger "
    "model: which samples go to which expert is decided anew for each batch, and the graph would "
    "repeat the route of the example for every later one; save model.state_dict() and load it into "
    "the model that hp.create_model or HubPathway makes again, speed it up by torch.compile, or "
    "record model.generator or one of model.experts by itself"
)


def refuse_recording(x: Any) -> None:
    """Raises ValueError where a call with input x is being recorded."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or isinstance(x, torch.fx.Proxy):
        raise ValueError(REFUSAL)
    if not torch.compiler.is_compiling() and _in_make_fx():
        raise ValueError(REFUSAL)


def _in_make_fx() -> bool:
    # Whoever records so has imported it; to import it here would cost everyone a second.
    proxy_tensor = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return proxy_tensor is not None and proxy_tensor.get_proxy_mode() is not None
