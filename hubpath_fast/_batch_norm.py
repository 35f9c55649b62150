"""``functional.masked_batch_norm``: BatchNorm in training over the first rows of a padded group."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _backends
from ._checks import check_float, check_like
from ._torch_batch_norm import ACTIVATIONS


def masked_batch_norm(
    x: Tensor,
    count: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """BatchNorm in training mode over the first ``count`` rows, then a sum and an activation.

    ``y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)`` with mean and variance of
    each channel over the valid rows and all positions. So a group of rows can be padded to the size
    that a captured graph has: of a network whose rows meet in BatchNorm only, padded rows change no
    output, no gradient and no statistic. Ours; the paper does not pad.

    Args:
        x: [capacity, C, ...] of any float dtype, contiguous or channels last (anything else is
            copied first). Statistics are computed in float32 (float64 for float64).
        count: int32 scalar on x's device, read there: rows 0..count-1 are valid. With 0 the result
            is all zeros. With 1 the row is normalised by the running statistics, which stay as
            they are, and where none are kept by its own.
        weight, bias: [C], or None for ones and zeros.
        running_mean, running_var: [C], moved in place as torch.nn.BatchNorm2d does by a batch of
            ``count`` rows; None: not kept.
        momentum: the weight of this batch in the running statistics; None: the mean over all
            batches so far, counted by num_batches_tracked (which this one then is the first of,
            where that is not given).
        eps: added to the variance.
        activation: None, "relu", "relu6", "silu" or "hardswish".
        residual: like x, added before the activation.
        backend: None, "triton" or "torch".
        num_batches_tracked: int64 scalar, one is added in place with every batch of two or more.

    Returns:
        Like x: rows beyond the count are zeros, and neither give nor get a gradient, whatever they
        hold. Differentiable in x, weight, bias and residual. Bit-identical from run to run.

    Raises:
        ValueError: a wrong shape, dtype, device, activation or backend; on a CPU a count outside
            0..capacity (on CUDA that is a device-side assertion where those are on, and a count
            above the capacity is taken as the capacity).
    """
    check_float("x", x)
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(
            f"x: expected rows [capacity, C, ...] of at least one element, got {list(x.shape)}"
        )
    _check_count(count, x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        _check_per_channel(name, tensor, x)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean, running_var: expected both or neither; give None for both")
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        _check_per_channel(name, tensor, x)
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name}: requires a gradient, but it is moved in place; detach it")
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected a contiguous vector, since it is moved in place, got strides "
                f"{tensor.stride()}; give a contiguous copy and copy it back"
            )
    if num_batches_tracked is not None and (
        num_batches_tracked.numel() != 1
        or num_batches_tracked.dtype != torch.int64
        or num_batches_tracked.device != x.device
    ):
        raise ValueError(
            f"num_batches_tracked: expected an int64 scalar on {x.device}, got "
            f"{num_batches_tracked.dtype} {list(num_batches_tracked.shape)} on "
            f"{num_batches_tracked.device}"
        )
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum: expected a number in [0, 1] or None, got {momentum}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: expected a finite number above 0, got {eps}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected None or one of {', '.join(ACTIVATIONS)}, got {activation!r}; "
            "leave it out and apply your own to the result"
        )
    if residual is not None:
        check_like("residual", residual, "x", x)
    ops = _backends.choose(backend, x)
    return ops.masked_batch_norm(
        x, count, weight, bias, running_mean, running_var, num_batches_tracked,
        momentum, eps, activation, residual,
    )  # fmt: skip


def _check_count(count: Tensor, x: Tensor) -> None:
    hint = "take torch.tensor(n, dtype=torch.int32, device=x.device)"
    if not isinstance(count, Tensor):
        raise ValueError(f"count: expected an int32 scalar tensor, got {count!r}; {hint}")
    if count.numel() != 1 or count.dtype != torch.int32 or count.device != x.device:
        raise ValueError(
            f"count: expected an int32 scalar on {x.device}, got {count.dtype} "
            f"{list(count.shape)} on {count.device}; {hint}"
        )
    if torch.compiler.is_compiling():
        return
    if count.untyped_storage().device.type == "cpu":  # a fake tensor says so of itself only
        rows = int(count)
        if not 0 <= rows <= len(x):
            raise ValueError(
                f"count: expected 0..{len(x)} valid rows, since x has so many, got {rows}; "
                "give a larger buffer"
            )


def _check_per_channel(name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is None:
        return
    if list(tensor.shape) != [x.shape[1]] or tensor.device != x.device:
        raise ValueError(
            f"{name}: expected [C] = [{x.shape[1]}] on {x.device}, got {list(tensor.shape)} on "
            f"{tensor.device}"
        )
    check_float(name, tensor)
