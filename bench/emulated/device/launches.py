"""Triton's launches on the emulated device: interpreted on the device's memory as it lies.

Triton's interpreter would copy every storage to the host and back, which waits for the device and
cannot be captured. What a launch wrote is what it changed: memory that it left as it was counts as
read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import bindings

_turn = threading.RLock()  # Triton's interpreter, and the emulator, run one launch at a time


def install(interpreter: ModuleType) -> None:
    """Has ``triton.runtime.interpreter`` run launches with tensors of the device in place."""
    given = interpreter.GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        run(executor.fn.__name__, lambda *a, **k: given(executor, *a, **k), args, kwargs)

    interpreter.GridExecutor.__call__ = launch


def run(name: str, function: Callable[..., Any], args: tuple, kwargs: dict) -> None:
    """``function`` on tensors of the CPU in place of the device's, as one launch of the current
    stream."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if not any(tensor.is_cuda for tensor in tensors):
        _in_turn(function, *args, **kwargs)
        return
    for tensor in tensors:
        if not tensor.is_cuda:
            raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")
    ops = bindings.ops()
    with torch.no_grad():
        ops.begin_launch(tensors)
        args = tuple(_on_cpu(value) for value in args)
        kwargs = {key: _on_cpu(value) for key, value in kwargs.items()}
        here = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        before = [_bytes(tensor).clone() for tensor in here]
        _in_turn(function, *args, **kwargs)
        changed = [not torch.equal(_bytes(t), old) for t, old in zip(here, before, strict=True)]
    graph = bindings.capturing()
    number = -1 if graph is None else graph.keep_launch(lambda: _in_turn(function, *args, **kwargs))
    reads = [t for t, written in zip(tensors, changed, strict=True) if not written]
    writes = [t for t, written in zip(tensors, changed, strict=True) if written]
    ops.end_launch(name, reads, writes, number)


def _in_turn(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with _turn:
        function(*args, **kwargs)


def _on_cpu(value: Any) -> Any:
    return bindings.ops().on_cpu(value) if isinstance(value, Tensor) else value


def _bytes(tensor: Tensor) -> Tensor:
    """All of a CPU tensor's storage."""
    flat = torch.empty(0, dtype=torch.uint8)
    return flat.set_(tensor.untyped_storage())
