"""Backward of aggregate (whose formulas are in aggregate.py) as one operation of two launches.

The first writes the rows' gradients and parts of the weights', the second the matrix's and the
bias's and the sum of those parts. What nobody asked for is not made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._aggregate_matrix import plan_backward_matrix
from ._aggregate_rows import has_dots, plan_backward_rows
from ._common import register
from ._outputs import dense, is_channels_last


def _backward(
    d_y,
    outputs,
    weights,
    rows,
    offsets,
    matrix,
    dtype,
    bias_dtype,
    for_rows,
    for_matrix,
    *loss,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_y = dense(d_y, is_channels_last(outputs))
    shared = (d_y, outputs, weights, rows, offsets, matrix, dtype)
    d_outputs, d_weights, d_matrix = (x.new_empty(0) for x in (outputs, weights, matrix))
    d_bias = matrix.new_empty(0, dtype=bias_dtype or matrix.dtype)
    dots = None
    if for_rows:
        (d_outputs, dots), launch = plan_backward_rows(*shared, *loss)
        launch()
        if not has_dots(outputs):
            d_weights, dots = dots.view_as(weights), None
        elif not for_matrix:
            d_weights = dots.sum((2, 3)).to(weights.dtype)
    if for_matrix:
        found, launch = plan_backward_matrix(*shared, bias_dtype, dots)
        launch()
        d_matrix = _whole(*found[0])
        d_bias = d_bias if bias_dtype is None else _whole(*found[1])
        d_weights = d_weights if dots is None else found[2]
    return d_outputs, d_weights, d_matrix, d_bias


def _whole(gradient: Tensor, shares: Tensor) -> Tensor:
    return gradient if len(shares) == 0 else shares.sum(0).to(gradient.dtype)


def _fake(
    d_y, outputs, weights, rows, offsets, matrix, dtype, bias_dtype, for_rows, for_matrix, *loss
):
    c_out = matrix.shape[0] if for_matrix and bias_dtype is not None else 0
    return (
        torch.empty_like(outputs) if for_rows else outputs.new_empty(0),
        torch.empty_like(weights) if for_rows else weights.new_empty(0),
        torch.empty_like(matrix) if for_matrix else matrix.new_empty(0),
        matrix.new_empty(c_out, dtype=bias_dtype or matrix.dtype),
    )


aggregate_backward = register(
    "aggregate_backward(Tensor d_y, Tensor outputs, Tensor weights, Tensor rows, Tensor offsets,"
    " Tensor matrix, ScalarType dtype, ScalarType? bias_dtype, bool for_rows, bool for_matrix,"
    " Tensor? d_loss, Tensor? logsumexp, Tensor? target, float label_smoothing, int ignore_index)"
    " -> (Tensor d_outputs, Tensor d_weights, Tensor d_matrix, Tensor d_bias)",
    _backward,
    _fake,
)
