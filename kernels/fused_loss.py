"""The exploit loss together with combine or aggregate: one backward for both.

In training a row's output feeds the prediction and the exploit loss. Separately, each would write
a gradient of the row and autograd would add the two: three passes more over memory, two launches
more. Here a row is read once and its gradient written once:

    d_outputs[r] = w * d_concat[n, i*C:(i+1)*C] + d_loss/N * (softmax(outputs[r]) - smoothed onehot)

Forward, aggregate's last launch also adds up the loss, which saves another.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import RowPlan
from ._launch import apply
from ._layout import settle
from .aggregate import (
    aggregate_forward,
    choose_grouped,
    gradients,
    linear,
    product_dtype,
)
from .combine import combine_backward, combine_forward
from .exploit_loss import exploit_loss_forward


class _CombineWithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, outputs, weights, experts, rows, positions, num_experts, target, *smoothing):
        outputs, weights = settle(outputs), weights.contiguous()
        concat = combine_forward(outputs, weights, experts, positions, num_experts)
        partials, logsumexp = exploit_loss_forward(
            outputs, rows, target, experts.shape[1], *smoothing
        )
        ctx.save_for_backward(outputs, weights, experts, positions, logsumexp, target)
        ctx.num_experts, ctx.smoothing = num_experts, smoothing
        return concat, partials.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_concat, d_loss):
        *combined, logsumexp, target = ctx.saved_tensors
        d_outputs, d_weights = combine_backward(
            d_concat, *combined, ctx.num_experts, d_loss, logsumexp, target, *ctx.smoothing
        )
        return d_outputs, d_weights, None, None, None, None, None, None, None


class _AggregateWithLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, outputs, weights, matrix, bias, rows, positions, offsets, dtype, target, *smoothing
    ):
        outputs, weights, matrix = settle(outputs), weights.contiguous(), matrix.contiguous()
        partials, logsumexp = exploit_loss_forward(
            outputs, rows, target, weights.shape[1], *smoothing
        )
        y, loss = aggregate_forward(
            outputs, weights, positions, offsets, matrix, bias, dtype, partials
        )
        ctx.save_for_backward(outputs, weights, matrix, bias, rows, offsets, logsumexp, target)
        ctx.dtype, ctx.smoothing = dtype, smoothing
        return y, loss

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_loss):
        *saved, logsumexp, target = ctx.saved_tensors
        loss = (d_loss, logsumexp, target, *ctx.smoothing)
        found = gradients(d_y, saved, ctx.dtype, ctx.needs_input_grad, loss)
        return *found, None, None, None, None, None, None, None


def combine_with_exploit_loss(
    outputs: Tensor,
    weights: Tensor,
    plan: RowPlan,
    target: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """``(combine(...), exploit_loss(...))`` as one node: three launches forward, one backward.

    Arguments, results and errors are those of ``combine`` and ``exploit_loss``.
    """
    return apply(
        _CombineWithLoss,
        outputs,
        weights,
        plan.experts.contiguous(),
        plan.rows.contiguous(),
        plan.positions.contiguous(),
        plan.offsets.numel() - 1,
        target.contiguous(),
        float(label_smoothing),
        ignore_index,
    )


def aggregate_with_exploit_loss(
    outputs: Tensor,
    weights: Tensor,
    plan: RowPlan,
    matrix: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    grouped: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """``(aggregate(...), exploit_loss(...))``: three launches forward, two backward if grouped.

    Arguments, results and errors are those of ``aggregate`` and ``exploit_loss``; ``grouped``
    forces the grouped form or the dense one, None takes whichever ``prefer_grouped`` says.
    """
    if not (choose_grouped(outputs, weights, plan, matrix) if grouped is None else grouped):
        concat, loss = combine_with_exploit_loss(
            outputs, weights, plan, target, label_smoothing, ignore_index
        )
        return linear(concat, matrix, bias), loss
    return apply(
        _AggregateWithLoss,
        outputs,
        weights,
        matrix,
        bias,
        plan.rows.contiguous(),
        plan.positions.contiguous(),
        plan.offsets.contiguous(),
        product_dtype(outputs),
        target.contiguous(),
        float(label_smoothing),
        ignore_index,
    )
