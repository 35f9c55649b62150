"""aggregate on the CPU, one product per expert: of its rows with its block of the matrix.

    y[n] = sum_j w[n, j] * W_i outputs[positions[n, j]] + bias      i = experts[n, j]

The forward keeps the products [R, S, C_OUT], from which d_weights comes. Large maps, whose products
are the memory of a step, have a form of their own (_torch_maps.py).

Shapes: N samples, M experts, K active, R = N*K rows, C outputs, C_OUT of the aggregator, S trailing
positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._torch_rows import accumulator, cpu_operation, sample_of_row, weight_of_row


def _products(items: Tensor, matrix: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """[R, S, C_OUT] times the block [C_OUT, C] of each row's expert -> [R, S, C]; transposed:
    [R, S, C] times the transposed block -> [R, S, C_OUT]."""
    products = _products_fake(items, matrix, offsets, transposed)
    for begin, end, block in _blocks(offsets, matrix):
        block = block.t() if transposed else block
        torch.mm(_flat(items, begin, end), block, out=_flat(products, begin, end))
    return products


def _products_fake(items: Tensor, matrix: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    channels = matrix.shape[0] if transposed else matrix.shape[1] // (offsets.numel() - 1)
    return items.new_empty(*items.shape[:2], channels)


def _matrix_gradient(d_products: Tensor, items: Tensor, offsets: Tensor) -> Tensor:
    """[C_OUT, M*C]: an expert's rows, multiplied. One without rows gets zeros."""
    d_matrix = _matrix_gradient_fake(d_products, items, offsets)
    for begin, end, d_block in _blocks(offsets, d_matrix):
        torch.mm(_flat(d_products, begin, end).t(), _flat(items, begin, end), out=d_block)
    return d_matrix


def _matrix_gradient_fake(d_products: Tensor, items: Tensor, offsets: Tensor) -> Tensor:
    return items.new_empty(d_products.shape[2], (offsets.numel() - 1) * items.shape[2])


def _blocks(offsets: Tensor, matrix: Tensor):
    """(begin, end, block [C_OUT, C] of the matrix) of each expert, in turn."""
    bounds = offsets.tolist()
    blocks = matrix.unflatten(1, (len(bounds) - 1, -1)).unbind(1)
    return zip(bounds[:-1], bounds[1:], blocks, strict=True)


def _flat(items: Tensor, begin: int, end: int) -> Tensor:
    return items[begin:end].view(-1, items.shape[2])


_grouped_products = cpu_operation(
    "cpu_grouped_products(Tensor items, Tensor matrix, Tensor offsets, bool transposed) -> Tensor",
    _products,
    _products_fake,
)
_grouped_matrix_gradient = cpu_operation(
    "cpu_grouped_matrix_gradient(Tensor d_products, Tensor items, Tensor offsets) -> Tensor",
    _matrix_gradient,
    _matrix_gradient_fake,
)


class GroupedAggregate(torch.autograd.Function):
    """One product per expert, on the CPU, where a call costs microseconds and counts are at hand.

    Each writes its slice of the result in place: of the gradient of the matrix, which is most of
    the memory, nothing is written twice and nothing is transposed.
    """

    @staticmethod
    def forward(ctx, outputs, weights, matrix, bias, rows, positions, offsets):
        matrix, compute = matrix.contiguous(), accumulator(outputs.dtype)
        # Weighted afterwards: the weights' gradient needs the products as they are.
        products = _grouped_products(_items(outputs), matrix, offsets, True)
        per_slot = products.index_select(0, positions.flatten()).unflatten(0, positions.shape)
        y = (per_slot * weights.to(compute)[:, :, None, None]).sum(dim=1)
        y = y if bias is None else y + bias.to(compute)
        ctx.save_for_backward(outputs, weights, matrix, bias, rows, offsets, products)
        return _maps(y.to(outputs.dtype), outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        outputs, weights, matrix, bias, rows, offsets, products = ctx.saved_tensors
        needs_outputs, needs_weights, needs_matrix, needs_bias = ctx.needs_input_grad[:4]
        (n, k), dtype = weights.shape, accumulator(outputs.dtype)
        d_y = _items(d_y)
        d_outputs = d_weights = d_matrix = d_bias = None
        d_rows = d_y.index_select(0, sample_of_row(rows, k)).to(dtype)  # [R, S, C_OUT]
        if needs_weights:
            by_row = (d_rows * products).sum(dim=(1, 2)).to(weights.dtype)
            d_weights = torch.empty_like(by_row).index_copy_(0, rows.long(), by_row).view(n, k)
        if needs_outputs or needs_matrix:
            d_rows = d_rows * weight_of_row(weights, rows).to(dtype).view(-1, 1, 1)
            d_rows = d_rows.to(outputs.dtype)
        if needs_outputs:
            d_outputs = _maps(_grouped_products(d_rows, matrix, offsets, False), outputs)
        if needs_matrix:
            d_matrix = _grouped_matrix_gradient(d_rows, _items(outputs), offsets)
        if needs_bias:
            d_bias = d_y.sum(dim=(0, 1), dtype=dtype).to(bias.dtype)
        return d_outputs, d_weights, d_matrix, d_bias, None, None, None


def _items(x: Tensor) -> Tensor:
    """[R, C, ...] as contiguous [R, S, C]: S trailing positions, 1 where there are none."""
    return x.flatten(2).transpose(1, 2).contiguous() if x.dim() > 2 else x.contiguous().unsqueeze(1)


def _maps(items: Tensor, like: Tensor) -> Tensor:
    """[n, S, C] as [n, C, ...] with the trailing positions of ``like``."""
    return items.transpose(1, 2).unflatten(2, like.shape[2:]) if like.dim() > 2 else items[:, 0]
