"""aggregate of maps on the CPU, row by row, so that nothing of the rows' size is made or kept.

    y[n] = sum_j w[n, j] * W_i outputs[r] + bias            i = experts[n, j], r = positions[n, j]

A row is a matrix [C, S], whose product with W_i [C_OUT, C] is added into the sample's map. Backward
makes two products of a row and the gradient of its sample's map, and keeps nothing for it:

    d_outputs[r] = w * W_i^T d_y[n]                         P = d_y[n] outputs[r]^T      [C_OUT, C]
    d_W_i = sum of w * P over the rows of i                 d_w[n, j] = <W_i, P>
    d_bias = sum_n d_y[n]

So beside outputs, y and their gradients there is nothing of the rows' size. Half precision, whose
sums are float32 and rounded once, and rows that are neither contiguous nor channels last are copied
a row at a time; under autocast, too, a row is cast where it is needed, never all of them.

Shapes: N samples, M experts, K active, R = N*K rows, C outputs, C_OUT of the aggregator, S trailing
positions of a map.
"""

# Products here are in place or write to what they are given: autocast, which may be on in backward
# too, looks at no others, and what is computed in has been decided.

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._torch_rows import accumulator, cpu_operation


def _forward(
    outputs: Tensor,
    weights: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    experts: Tensor,
    positions: Tensor,
) -> Tensor:
    """y [N, C_OUT, ...] of the matrix's dtype, in the layout of the outputs."""
    y = _forward_fake(outputs, weights, matrix, bias, experts, positions)
    dtype, compute = matrix.dtype, accumulator(matrix.dtype)
    rows, blocks = outputs.unbind(0), _blocks(matrix, outputs)
    for of_y, slots in zip(y.unbind(0), _slots(weights, experts, positions), strict=True):
        of_y = of_y.flatten(1)
        total = of_y if dtype == compute else torch.empty_like(of_y, dtype=compute)
        total.zero_() if bias is None else total.copy_(bias.unsqueeze(1))
        for row, expert, weight in slots:
            total.addmm_(blocks[expert], _operand(rows[row], dtype), alpha=weight)
        if total is not of_y:
            of_y.copy_(total)
    return y


def _forward_fake(outputs, weights, matrix, bias, experts, positions):
    return _empty(outputs, weights.shape[0], matrix.shape[0], matrix.dtype)


def _backward(
    d_y: Tensor,
    outputs: Tensor,
    weights: Tensor,
    matrix: Tensor,
    experts: Tensor,
    positions: Tensor,
    for_outputs: bool,
    for_matrix: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_outputs, d_weights, d_matrix and d_bias; empty where not asked for. ``for_matrix``: the
    weights' as well, which comes along."""
    dtype, compute = matrix.dtype, accumulator(matrix.dtype)
    d_outputs, d_weights, d_matrix, d_bias = _backward_fake(
        d_y, outputs, weights, matrix, experts, positions, for_outputs, for_matrix, for_bias
    )
    rows, blocks = outputs.unbind(0), _blocks(matrix, outputs)
    d_rows = d_outputs.unbind(0) if for_outputs else ()
    sums = d_matrix if dtype == compute else torch.empty_like(d_matrix, dtype=compute)
    d_blocks = _blocks(sums.zero_(), outputs) if for_matrix else ()
    product = torch.empty_like(blocks[0])
    bias_sum, dots = torch.zeros(matrix.shape[0], dtype=compute), []
    for d_map, slots in zip(d_y.unbind(0), _slots(weights, experts, positions), strict=True):
        d_map = _operand(d_map, dtype)
        if 1 not in d_map.stride():  # expanded, as of a sum: each product would copy it anew
            d_map = d_map.contiguous()
        if for_bias:
            bias_sum += d_map.sum(dim=1)
        for row, expert, weight in slots:
            if for_outputs:
                _set_product(d_rows[row].flatten(1), blocks[expert].t(), d_map, weight)
            if for_matrix:
                torch.mm(d_map, _operand(rows[row], dtype).t(), out=product)
                d_blocks[expert].add_(product, alpha=weight)
                dots.append(product.mul_(blocks[expert]).sum())
    if for_matrix:
        if sums is not d_matrix:
            d_matrix.copy_(sums)
        d_weights.copy_(torch.stack(dots).view(weights.shape))
    if for_bias:
        d_bias.copy_(bias_sum)
    return d_outputs, d_weights, d_matrix, d_bias


def _backward_fake(
    d_y, outputs, weights, matrix, experts, positions, for_outputs, for_matrix, for_bias
):
    return (
        _empty(outputs, *outputs.shape[:2], outputs.dtype) if for_outputs else outputs.new_empty(0),
        torch.empty_like(weights) if for_matrix else weights.new_empty(0),
        torch.empty_like(matrix) if for_matrix else matrix.new_empty(0),
        matrix.new_empty(matrix.shape[0] if for_bias else 0),
    )


def _slots(weights: Tensor, experts: Tensor, positions: Tensor) -> Iterator[list[tuple]]:
    """(row, expert, weight) of a sample's K slots, sample by sample."""
    tables = positions.tolist(), experts.tolist(), weights.tolist()
    for found in zip(*tables, strict=True):
        yield list(zip(*found, strict=True))


def _blocks(matrix: Tensor, outputs: Tensor) -> tuple[Tensor, ...]:
    """[C_OUT, C] of each expert, in what is computed in."""
    return matrix.to(accumulator(matrix.dtype)).split(outputs.shape[1], dim=1)


def _operand(row: Tensor, dtype: torch.dtype) -> Tensor:
    """[C, ...] as [C, S], rounded to ``dtype`` and in what is computed in; itself if it is so."""
    return row.flatten(1).to(dtype).to(accumulator(dtype))


def _empty(like: Tensor, samples: int, channels: int, dtype: torch.dtype) -> Tensor:
    """[samples, channels, ...], channels last where ``like`` is, else contiguous."""
    trailing = like.shape[2:]
    if not like.is_contiguous() and like.movedim(1, -1).is_contiguous():
        return like.new_empty((samples, *trailing, channels), dtype=dtype).movedim(-1, 1)
    return like.new_empty((samples, channels, *trailing), dtype=dtype)


def _set_product(out: Tensor, left: Tensor, right: Tensor, weight: float) -> None:
    """out = weight * left @ right."""
    into = out if out.dtype == left.dtype else torch.empty_like(out, dtype=left.dtype)
    into.addmm_(left, right, beta=0, alpha=weight)
    if into is not out:
        out.copy_(into)


map_forward = cpu_operation(
    "cpu_map_aggregate(Tensor outputs, Tensor weights, Tensor matrix, Tensor? bias,"
    " Tensor experts, Tensor positions) -> Tensor",
    _forward,
    _forward_fake,
)
map_backward = cpu_operation(
    "cpu_map_aggregate_backward(Tensor d_y, Tensor outputs, Tensor weights, Tensor matrix,"
    " Tensor experts, Tensor positions, bool for_outputs, bool for_matrix, bool for_bias)"
    " -> (Tensor d_outputs, Tensor d_weights, Tensor d_matrix, Tensor d_bias)",
    _backward,
    _backward_fake,
)


class MapAggregate(torch.autograd.Function):
    """The products are of the matrix's dtype, autocast's where it is on."""

    @staticmethod
    def forward(ctx, outputs, weights, matrix, bias, experts, positions):
        ctx.save_for_backward(outputs, weights, matrix, experts, positions)
        return map_forward(outputs, weights, matrix, bias, experts, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        needs_outputs, needs_weights, needs_matrix, needs_bias = ctx.needs_input_grad[:4]
        asked = needs_outputs, needs_weights or needs_matrix, needs_bias
        found = map_backward(d_y, *ctx.saved_tensors, *asked)
        pairs = zip(found, ctx.needs_input_grad, strict=False)
        return *(gradient if needed else None for gradient, needed in pairs), None, None
