"""What each form of aggregate is held to: the loop over experts in float64, with derived bounds."""

from __future__ import annotations

import torch

from .output_cases import ROUNDING, aggregate_reference, assert_within, double, leaves

NAMES = ("d_outputs", "d_weights", "d_matrix", "d_bias")


def check(inputs, product=None, autocast=False, *, form) -> None:
    """Values and gradients of ``form(leaves, inputs)``; ``product`` is the dtype of products, if
    not the outputs'."""
    dtype = inputs.outputs.dtype
    product = product or dtype
    compute = ROUNDING[torch.float64 if product == torch.float64 else torch.float32]
    tensors = leaves(*inputs.sources)
    with torch.autocast(inputs.outputs.device.type, dtype=product, enabled=autocast):
        y = form(tensors, inputs)
    gradients = torch.autograd.grad(y, tensors, inputs.d_y.to(y.dtype))
    assert y.dtype == product

    exact, absolute = double(*tensors), double(*tensors, absolute=True)
    expected = aggregate_reference(*exact, inputs)
    wanted = torch.autograd.grad(expected, exact, inputs.d_y.double())
    terms = aggregate_reference(*absolute, inputs)
    absolute_d_y = inputs.d_y.double().abs()
    gradient_terms = torch.autograd.grad(terms, absolute, absolute_d_y)

    # Each result is a sum of products, so an error is at most (number of roundings) x sum |terms|:
    # the longest chain of additions, then two operands' roundings where they are cast to the
    # product's dtype; weight x d_y in the matrix's gradient is always rounded to it.
    length = max(*inputs.outputs[0].shape, *inputs.matrix.shape, inputs.d_y[0].numel())
    length = max(length, inputs.outputs.numel() // inputs.outputs.shape[1]) + 8
    cast = [2 * ROUNDING[product] if product != t.dtype else 0.0 for t in tensors]
    operands = max(cast[0], cast[2])
    relative = length * compute + operands
    assert_within(y, expected, relative * terms + ROUNDING[product] * expected.abs(), "y")
    for i, (name, gradient) in enumerate(zip(NAMES, gradients, strict=True)):
        assert gradient.dtype == tensors[i].dtype, name
        extra = 2 * ROUNDING[product] if name == "d_matrix" else 0.0
        extra += ROUNDING[product] if product != dtype else 0.0  # d_y arrives in that dtype
        bound = (relative + extra) * gradient_terms[i] + ROUNDING[gradient.dtype] * wanted[i].abs()
        assert_within(gradient, wanted[i], bound, name)
