"""Every operation by one signature: (outputs, weights, matrix, bias, inputs) -> its results.

The first four are the leaves of a ``Case`` of output_cases.py; the rest comes from its ``Inputs``.
The router has no such leaves: its scores are made of the weights.
"""

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
    gather_into,
    masked_batch_norm,
    noisy_topk,
    router_loss,
    total_loss,
)
from torch.utils._python_dispatch import TorchDispatchMode

from hubpath_fast import _torch_ops, kernels

# The operations take the same arguments in both.
implementations = pytest.mark.parametrize("ops", [kernels, _torch_ops], ids=["triton", "torch"])


def spread(like: torch.Tensor) -> torch.Tensor:
    """Numbers from -1 to 1."""
    return torch.linspace(-1, 1, like.numel(), dtype=like.dtype, device=like.device).view_as(like)


def routed(outputs, weights, matrix, bias, i, eps=None, renormalize=False):
    scores = torch.cat([weights, weights.sin()], dim=1)
    return noisy_topk(scores, scores.cos(), eps, weights.shape[1], renormalize)[:2]


def routed_with_noise(outputs, weights, *rest):
    return routed(outputs, weights, *rest, spread(weights.repeat(1, 2)), renormalize=True)


def routed_with_a_draw(*arguments):
    return routed(*arguments, eps="draw")


def gathered(outputs, weights, matrix, bias, i):
    """To rows, and into static input buffers, which give no gradient."""
    x = outputs[: len(weights)]
    m = len(i.offsets) - 1
    scale, buffers = spread(x.new_empty(m, x.shape[1])), x.new_zeros(m * len(x), *x.shape[1:])
    gather_into(buffers, x.detach(), i, scale, None)
    return gather(x, i, scale, scale + 1, x.dtype, torch.contiguous_format), buffers


def combined(outputs, weights, matrix, bias, i):
    return (combine(outputs, weights, i),)


def aggregated(outputs, weights, matrix, bias, i):
    return (aggregate(outputs, weights, i, matrix, bias, grouped=True),)


def normalised(outputs, weights, matrix, bias, i):
    """Of all experts' rows but the last one's, with everything that may be given."""
    c, residual = outputs.shape[1], outputs.sin()
    mean, var, batches = (
        spread(matrix.new_empty(c)),
        matrix.new_ones(c),
        i.offsets.new_zeros(1).long(),
    )
    y = masked_batch_norm(
        outputs, i.offsets[-2], matrix[0, :c], matrix[-1, :c], mean, var, batches, None, 1e-5,
        "silu", residual,
    )  # fmt: skip
    return y, mean, var, batches


def exploited(outputs, weights, matrix, bias, i):
    return (exploit_loss(outputs, i, i.target),)


def combined_with_loss(outputs, weights, matrix, bias, i, smoothing=0.1):
    return combine_with_exploit_loss(outputs, weights, i, i.target, smoothing)


def aggregated_with_loss(outputs, weights, matrix, bias, i):
    return aggregate_with_exploit_loss(
        outputs, weights, i, matrix, bias, i.target, 0.1, grouped=True
    )


def supervised(outputs, weights, matrix, bias, i, temperature=0.5):
    return (router_loss(outputs, weights, i, i.target, temperature, 0.1),)


def combined_with_both(outputs, weights, matrix, bias, i):
    return combine_with_exploit_loss(outputs, weights, i, i.target, 0.1, temperature=0.5)


def aggregated_with_both(outputs, weights, matrix, bias, i):
    return aggregate_with_exploit_loss(
        outputs, weights, i, matrix, bias, i.target, 0.1, grouped=True, temperature=0.5
    )


def totalled(outputs, weights, matrix, bias, i):
    """Of plain predictions: a map's channels count as outputs."""
    x, y = outputs[: len(weights)].flatten(1), i.target[(slice(None), *[0] * (i.target.dim() - 1))]
    return total_loss(x, y, weights.mean(0), bias.sum(), 0.3, 0.1)


# With the router's loss, which takes the outputs as numbers: no derivative of it in them.
SUPERVISED = (supervised, aggregated_with_both, combined_with_both)
# What joins the experts' outputs.
JOINING = (aggregated_with_loss, combined_with_loss, aggregated, combined, exploited, totalled)
OPERATIONS = (routed, routed_with_noise, routed_with_a_draw, gathered, normalised, *JOINING)


class Calls(TorchDispatchMode):
    """Collects the calls of our operations with their arguments, as they were then."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hubpath_fast":
            copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
            self.seen.append((func, copies))
        return func(*args, **(kwargs or {}))
