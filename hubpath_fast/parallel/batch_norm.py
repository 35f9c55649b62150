"""BatchNorm over the samples of all ranks, for what every rank runs on its own: the router.

With each rank's own statistics a router would differ from that of one process, and its copies would
drift apart in their running statistics, which predictions use. So ranks exchange the mean and the
sum of squared deviations of their samples, and in backward two sums for each channel.

Experts need none: on several ranks an expert sees its rows of all of them. ``nn.SyncBatchNorm`` has
no CPU implementation.

The formulas, of n samples and positions for each of C channels in all: with m_r, s_r and n_r of
rank r, m = sum n_r m_r / n and n v = sum s_r + sum n_r (m_r - m)^2 (Chan, Golub and LeVeque, 1983);
and backward dx = w / sqrt(v + eps) (dy - mean(dy) - z mean(dy z)), where z is x normalised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .collectives import gather_numbers, sum_over
from .ranks import Ranks


def share_batch_norm(module: nn.Module, ranks: Ranks) -> None:
    """Has the BatchNorm layers within use the batch statistics of all ranks, in place; those that
    are frozen in evaluation mode stay as they are.

    Raises ValueError for layers of other classes than torch's own.
    """
    for name, part in module.named_modules():
        learns = part.training or any(p.requires_grad for p in part.parameters(recurse=False))
        if not isinstance(part, _BatchNorm) or not learns:
            continue
        if type(part) not in _SHARED:
            raise ValueError(
                f"{name}: expected torch's BatchNorm in what every rank runs, got "
                f"{type(part).__name__}, whose statistics ranks cannot share; take nn.BatchNorm2d, "
                "LayerNorm or GroupNorm, or freeze it in evaluation mode"
            )
        part.__class__, part.ranks = _SHARED[type(part)], ranks
        module.not_captured = "its batch statistics are those of all ranks"


class _Shared:
    ranks: Ranks

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        out, mean, var = _Normalise.apply(x, self.weight, self.bias, self.eps, self.ranks)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            momentum = self.momentum
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(var.to(self.running_var.dtype), momentum)
        return out


class SharedBatchNorm1d(_Shared, nn.BatchNorm1d):
    """Over all ranks."""


class SharedBatchNorm2d(_Shared, nn.BatchNorm2d):
    """Over all ranks."""


class SharedBatchNorm3d(_Shared, nn.BatchNorm3d):
    """Over all ranks."""


_SHARED = {
    nn.BatchNorm1d: SharedBatchNorm1d,
    nn.BatchNorm2d: SharedBatchNorm2d,
    nn.BatchNorm3d: SharedBatchNorm3d,
}


class _Normalise(torch.autograd.Function):
    """x [N, C, ...] -> normalised; and mean [C] and unbiased variance [C] of all ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, weight, bias, eps: float, ranks: Ranks):
        wide = torch.promote_types(x.dtype, torch.float32)
        var, mean = torch.var_mean(x.to(wide), _others(x), correction=0)
        own = mean.new_full((1,), x.numel() // x.shape[1])
        table = gather_numbers(torch.cat([own, mean, var]), ranks, "router statistics", "world")
        counts, means, variances = table.split([1, len(mean), len(mean)], dim=1)
        share = counts / counts.sum()
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean) ** 2)).sum(0)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps))
        ctx.ranks, ctx.count, ctx.bias = ranks, counts.sum(), bias is not None
        out = F.batch_norm(x, mean, var, weight, bias, eps=eps)
        found = mean.clone(), var * (ctx.count / (ctx.count - 1))
        ctx.mark_non_differentiable(*found)
        return out, *found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, *_):
        x, weight, mean, scale = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide, grad_wide = x.to(mean.dtype), grad.to(mean.dtype)
        normalised = (wide - mean.view(shape)) * scale.view(shape)
        own = torch.cat([grad_wide.sum(_others(x)), (grad_wide * normalised).sum(_others(x))])
        of_bias, of_weight = own.clone().chunk(2)
        of_all = sum_over(own, ctx.ranks, "router statistics").div_(ctx.count)
        first, second = (each.view(shape) for each in of_all.chunk(2))
        factor = scale if weight is None else scale * weight.to(scale.dtype)
        of_x = (grad_wide - first - normalised * second) * factor.view(shape)
        return (
            of_x.to(x.dtype),
            None if weight is None else of_weight.to(weight.dtype),
            of_bias.to(mean.dtype if weight is None else weight.dtype) if ctx.bias else None,
            None,
            None,
        )


def _others(x: Tensor) -> list[int]:
    """All dimensions but the channels."""
    return [d for d in range(x.dim()) if d != 1]
