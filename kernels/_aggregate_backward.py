"""Backward of aggregate (whose formulas are in aggregate.py) as one operation of two launches.

The first writes the rows' gradients and parts of the weights', the second the matrix's and the
bias's and the sum of those parts. What nobody asked for is not made.
"""

from __future__ import annotations

from functools import partial

import torch

from ._aggregate_matrix import plan_backward_matrix
from ._aggregate_rows import has_dots, plan_backward_rows
from ._grouped import tf32_is_allowed
from ._launch import Plan, register
from ._layout import settle_gradient


def plan_backward(
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
) -> Plan:
    shared = (d_y, outputs, weights, rows, offsets, matrix, dtype)
    d_outputs, d_weights, d_matrix = (x.new_empty(0) for x in (outputs, weights, matrix))
    d_bias = matrix.new_empty(0, dtype=bias_dtype or matrix.dtype)
    launches, dots, are_shares = [], None, False
    if for_rows:
        to_rows = plan_backward_rows(*shared, *loss)
        launches += to_rows.launches
        d_outputs, d_weights = to_rows.results
        dots = d_weights if has_dots(outputs) else None
    if for_matrix:
        to_matrix = plan_backward_matrix(*shared, bias_dtype, dots)
        launches += to_matrix.launches
        *found, summed = to_matrix.results
        are_shares = len(found[1]) > 0
        d_matrix = found[are_shares]
        d_bias = d_bias if bias_dtype is None else found[2 + are_shares]
        d_weights = d_weights if dots is None else summed
    results = (d_outputs, d_weights, d_matrix, d_bias)
    left = partial(
        _add_up,
        weights.dtype if dots is not None and not for_matrix else None,
        matrix.dtype if are_shares else None,
        bias_dtype if are_shares else None,
    )
    return Plan(results, launches, left if any(left.args) else None)


def _add_up(dots, matrix_shares, bias_shares, d_outputs, d_weights, d_matrix, d_bias) -> tuple:
    """What no launch has added up; the first three are the dtypes of the sums, None for nothing."""
    if dots is not None:
        d_weights = d_weights.sum((2, 3)).to(dots)
    if matrix_shares is not None:
        d_matrix = d_matrix.sum(0).to(matrix_shares)
    if bias_shares is not None:
        d_bias = d_bias.sum(0).to(bias_shares)
    return d_outputs, d_weights, d_matrix, d_bias


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
    plan_backward,
    _fake,
    settle_gradient,
    tf32_is_allowed,
)
