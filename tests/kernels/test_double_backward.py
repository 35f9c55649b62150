"""No operation has a second derivative: asked for one, each says so instead of giving none."""

from __future__ import annotations

import pytest
import torch
from hubpath_fast.kernels import (
    aggregate,
    aggregate_with_exploit_loss,
    combine,
    combine_with_exploit_loss,
    exploit_loss,
    gather,
    noisy_topk,
)
from support.output_cases import SMALL, leaves, make

K = SMALL.k


def routed(outputs, weights, matrix, bias, i):
    weights, mean, *_ = noisy_topk(weights.repeat(1, 2), weights.repeat(1, 2), None, K, False)
    return weights.sum() + mean.square().sum()


def gathered(outputs, weights, matrix, bias, i):
    return gather(outputs[: len(weights)], i, None, None, outputs.dtype, torch.contiguous_format)


def combined(outputs, weights, matrix, bias, i):
    return combine(outputs, weights, i)


def aggregated(outputs, weights, matrix, bias, i):
    return aggregate(outputs, weights, i, matrix, bias, grouped=True)


def exploited(outputs, weights, matrix, bias, i):
    return exploit_loss(outputs, i, i.target)


def combined_with_loss(outputs, weights, matrix, bias, i):
    concat, loss = combine_with_exploit_loss(outputs, weights, i, i.target)
    return concat + loss


def aggregated_with_loss(outputs, weights, matrix, bias, i):
    y, loss = aggregate_with_exploit_loss(outputs, weights, i, matrix, bias, i.target, grouped=True)
    return y + loss


@pytest.mark.parametrize(
    "operation",
    [
        routed,
        gathered,
        combined,
        aggregated,
        exploited,
        combined_with_loss,
        aggregated_with_loss,
    ],
)
def test_a_second_derivative_is_refused(operation, device):
    inputs = make(SMALL, torch.float32, device)
    tensors = leaves(inputs.outputs, inputs.weights, inputs.matrix, inputs.bias)
    result = operation(*tensors, inputs)
    gradients = torch.autograd.grad(
        result.square().sum(), tensors, create_graph=True, allow_unused=True
    )
    squares = sum(gradient.square().sum() for gradient in gradients if gradient is not None)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        squares.backward()
