"""What is asked of torch by names that it keeps to itself, since no public one tells.

tests/executors/test_torch_private.py checks that each does, so that a torch without one of them, or
with another meaning, is found by a test and not in a training run.
"""

from __future__ import annotations

import torch
from torch import nn


def has_modes() -> bool:
    """Whether a mode of this thread intercepts torch's functions or operations."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


def has_function_transforms() -> bool:
    """Whether a transform of ``torch.func`` is active in this thread."""
    return torch._C._are_functorch_transforms_active()


def has_saved_tensors_hooks() -> bool:
    """Whether ``saved_tensors_hooks`` are active in this thread."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def in_backward() -> bool:
    """Whether this thread is within a backward pass."""
    return torch._C._current_graph_task_id() != -1


def backward_retains_graph() -> bool:
    """Within a backward pass: whether it was asked to retain its graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return module._compiled_call_impl is not None
