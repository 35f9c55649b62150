"""BatchNorm over the first rows of a padded group, in vectorised PyTorch: no host read on a device.

Rows beyond the count are taken out before anything is computed of them and put back as zeros, so
that whatever they hold, NaN too, reaches neither a sum nor a gradient. Autograd differentiates it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._torch_rows import accumulator

ACTIVATIONS = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


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
    dtype, count = accumulator(x.dtype), count.reshape(()).clamp(0, len(x))
    per_channel = (1, -1, *[1] * (x.dim() - 2))
    over = (0, *range(2, x.dim()))
    rows = torch.arange(len(x), device=x.device).view(-1, *[1] * (x.dim() - 1))
    valid = rows < count
    kept = torch.where(valid, x, 0).to(dtype)

    values = (count * math.prod(x.shape[2:])).clamp(min=1).to(dtype)  # of a channel
    mean = kept.sum(over) / values
    var = torch.where(valid, kept - mean.view(per_channel), 0).square().sum(over) / values
    if running_mean is not None:
        several = count > 1
        mean = torch.where(several, mean, running_mean.to(dtype))
        var = torch.where(several, var, running_var.to(dtype))
    # What is kept moves after it was read, for a single row.
    _move(
        mean.detach(), var.detach(), count, values, running_mean, running_var,
        num_batches_tracked, momentum,
    )  # fmt: skip

    y = (kept - mean.view(per_channel)) * torch.rsqrt(var + eps).view(per_channel)
    if weight is not None:
        y = y * weight.to(dtype).view(per_channel)
    if bias is not None:
        y = y + bias.to(dtype).view(per_channel)
    if residual is not None:
        y = y + torch.where(valid, residual, 0).to(dtype)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return torch.where(valid, y, 0).to(x.dtype)


@torch.no_grad()
def _move(
    mean: Tensor, var: Tensor, count: Tensor, values: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, num_batches_tracked: Tensor | None, momentum: float | None,
) -> None:  # fmt: skip
    """The running statistics and the number of batches, in place; of less than two rows nothing."""
    several = count > 1
    if num_batches_tracked is not None:
        num_batches_tracked.add_(several)
    if running_mean is None:
        return
    if momentum is not None:
        share = momentum
    elif num_batches_tracked is None:
        share = 1.0
    else:  # all batches weigh alike
        share = 1 / num_batches_tracked.clamp(min=1).to(mean.dtype)
    unbiased = var * (values / (values - 1).clamp(min=1))
    for running, found in ((running_mean, mean), (running_var, unbiased)):
        before = running.to(found.dtype)
        running.copy_(torch.where(several, before + share * (found - before), before))
