"""BatchNorm in training over the first rows of a padded group, with what follows it.

    y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

mean and var of each channel are over the valid rows, the first ``count``, which is read on the
device: so one captured graph of ``capacity`` rows serves every group that is not larger. Rows
beyond are written as zeros, forward and backward, and never read: convolutions over them add
nothing to the gradient of any weight.

Passes over memory: forward two reads of x and one write of y (and a read of the residual), where
layer, sum and activation by themselves take up to eight; backward two reads of x and d_y and one
write of d_x. With a residual, the first pass of backward leaves the gradient behind the activation,
which is the residual's, and the second reads that.

    g = d_y * act'(z)      d_bias = sum g      d_weight = sum g * (x - mean) * scale
    d_x = scale * weight * (g - mean(g) - (x - mean) * scale^2 * mean(g * (x - mean)))

scale = 1 / sqrt(var + eps). A single row is normalised by the running statistics, which are
constants: the means in d_x fall away. Sums are joined in a fixed order, without atomics.

Shapes: x [capacity, C, ...], contiguous or channels last, S trailing positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activation import ACTIVATIONS, FROM_RESULT, activate
from ._batch_norm_backward import batch_norm_backward
from ._batch_statistics import batch_statistics
from ._common import TRITON_DTYPE
from ._launch import Launch, Plan, apply, once_differentiable, register
from ._layout import dense, is_channels_last, settle
from ._norm_tiles import (
    SIZES,
    TILE,
    addresses,
    by_channel,
    by_item,
    factor_and_bias,
    programs_of_tiles,
    tile_arguments,
    valid_rows,
)


@triton.jit(do_not_specialize=SIZES)
def _batch_norm_kernel(
    # inputs
    x_ptr,  # [capacity, C, S], or [capacity, S, C] if MINOR
    residual_ptr,  # like x, or None
    count_ptr,  # [] int32
    mean_ptr,  # [C]
    scale_ptr,  # [C]
    weight_ptr,  # [C], or None
    bias_ptr,  # [C], or None
    # outputs
    y_ptr,  # like x
    # sizes
    capacity, channel_units, trailing_units, tiles,
    VEC_C: tl.constexpr, VEC_S: tl.constexpr, MINOR: tl.constexpr, ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    # tunables
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (C / BLOCK_C * T / BLOCK_T / tiles,). A program owns ``tiles`` tiles of its channels."""
    channels, trailing = channel_units * VEC_C, trailing_units * VEC_S
    blocks = tl.cdiv(channels, BLOCK_C)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(0) // blocks * tiles * BLOCK_T
    mask_c = channel < channels
    valid, items = valid_rows(count_ptr, capacity) * trailing, capacity * trailing
    mean = by_channel(tl.load(mean_ptr + channel, mask_c, other=0.0), MINOR)
    factor, bias = factor_and_bias(scale_ptr, weight_ptr, bias_ptr, channel, mask_c, MINOR, COMPUTE)
    for start in range(first, tl.minimum(first + tiles * BLOCK_T, items), BLOCK_T):
        item = start + tl.arange(0, BLOCK_T)
        own = by_item(item < items, MINOR) & by_channel(mask_c, MINOR)
        mask = by_item(item < valid, MINOR) & by_channel(mask_c, MINOR)
        offsets = addresses(item, channel, channels, trailing, MINOR)
        z = (tl.load(x_ptr + offsets, mask, other=0.0).to(COMPUTE) - mean) * factor + bias
        if residual_ptr is not None:
            z += tl.load(residual_ptr + offsets, mask, other=0.0).to(COMPUTE)
        y = tl.where(mask, activate(z, ACTIVATION), 0.0)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), own)


def plan_forward(x, count, residual, mean, scale, weight, bias, activation) -> Plan:
    y = torch.empty_like(x)
    tiles, programs = programs_of_tiles(x, TILE)
    launch = Launch(
        _batch_norm_kernel, programs, x_ptr=x, residual_ptr=residual, count_ptr=count,
        mean_ptr=mean, scale_ptr=scale, weight_ptr=weight, bias_ptr=bias, y_ptr=y, tiles=tiles,
        ACTIVATION=activation, COMPUTE=TRITON_DTYPE[mean.dtype], **tile_arguments(x, TILE),
    )  # fmt: skip
    return Plan(y, [launch])


_forward = register(
    "batch_norm(Tensor x, Tensor count, Tensor? residual, Tensor mean, Tensor scale,"
    " Tensor? weight, Tensor? bias, int activation) -> Tensor",
    plan_forward,
    lambda x, *_: torch.empty_like(x),
)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count, weight, bias, residual, mean, scale, activation, kept):
        y = _forward(x, count, residual, mean, scale, weight, bias, activation)
        gate = None
        if residual is not None and activation > 0:
            gate = y if activation in FROM_RESULT else residual
        ctx.save_for_backward(x, gate, count, mean, scale, weight, bias)
        ctx.options = activation, residual is not None, kept
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        if d_y is None:
            return (None,) * 9
        needs_d_x, _, needs_d_weight, needs_d_bias, needs_residual, *_ = ctx.needs_input_grad
        d_x, d_weight, d_bias, g = batch_norm_backward(
            d_y, *ctx.saved_tensors, *ctx.options, needs_d_x
        )
        return (
            d_x if needs_d_x else None,
            None,
            d_weight if needs_d_weight else None,
            d_bias if needs_d_bias else None,
            g if needs_residual else None,
            *[None] * 4,
        )


def masked_batch_norm(
    x: Tensor,
    count: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """BatchNorm over the rows 0..count-1 of x, see ``functional.masked_batch_norm``.

    x: [capacity, C, ...] of any float dtype, contiguous or channels last (else it is copied); the
    residual is brought to x's layout. running_mean, running_var: contiguous. Three launches
    forward, three backward. Differentiable: x, weight, bias, residual.
    """
    x = settle(x)
    if residual is not None:
        residual = dense(residual, is_channels_last(x))
    weight, bias = (None if v is None else v.contiguous() for v in (weight, bias))
    mean, scale = batch_statistics(
        x.detach(), count, running_mean, running_var, num_batches_tracked, momentum, eps
    )
    return apply(
        _BatchNorm, x, count, weight, bias, residual, mean, scale, ACTIVATIONS[activation],
        running_mean is not None,
    )  # fmt: skip
