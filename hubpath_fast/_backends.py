"""Which implementation of an operation a call gets: Triton's kernels, or vectorised torch."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

from torch import Tensor

from . import _torch_ops

BACKENDS = ("triton", "torch")
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # here: torch.compile cannot trace it


@functools.cache
def triton_ops() -> ModuleType | None:
    if not _HAS_TRITON:
        return None
    from . import kernels

    return kernels


def choose(name: str | None, x: Tensor) -> ModuleType:
    """The module of that name, or the one for x. Raises ValueError where it cannot be had."""
    if name is None:
        ops = triton_ops() if x.is_cuda else None
        return ops or _torch_ops
    if name == "torch":
        return _torch_ops
    if name != "triton":
        raise ValueError(f"backend: expected None or one of {BACKENDS}, got {name!r}")
    ops = triton_ops()
    if ops is None:
        raise ValueError('backend: "triton" needs the triton package; install it or use "torch"')
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'backend: "triton" needs CUDA tensors, got {x.device}; move the tensors, use "torch", '
            "or set TRITON_INTERPRET=1 before Triton is imported to interpret the kernels"
        )
    return ops
