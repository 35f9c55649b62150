"""What the kernel files share: registering operations, the device guard, compile-only cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# FRAGMENT: every kernel file adds its own operations to the one namespace.
_LIBRARY = torch.library.Library("hubpath_fast", "FRAGMENT")


def register(schema: str, launch: Callable, fake: Callable) -> Any:
    """Define ``hubpath_fast::<schema>``, run by ``launch`` and traced through ``fake``.

    Derivatives come from a ``torch.autograd.Function`` around the operation: this costs about
    half of what ``torch.library.custom_op`` with ``register_autograd`` does per call, and still
    passes ``opcheck`` and compiles without a graph break. Returns the callable operation.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hubpath_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.hubpath_fast, name).default


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensor's own, if it is another."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one representative size, to be compiled for a GPU that need not be there.

    All pointers count as 16-byte aligned, as torch's allocator and Triton's launcher make them.
    """

    name: str
    fn: Any  # the @triton.jit function
    signature: Mapping[str, str]  # run-time argument -> Triton type, such as "*fp32" or "i32"
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    wide: bool = False  # the bulk loads and stores must be 128 bits
    aligned: tuple[str, ...] = field(default=())  # integer arguments that are multiples of 16
    note: str = ""
