"""The loss of maps: the mean of squares against bumps that are drawn inside.

    loss of a face = 1 / (L h w) * sum over landmarks and cells of (output - target)^2
    gradient       = 2 / (L h w) * (output - target)

Targets come as points and are drawn where they are needed, once for the loss and again for its
gradient, so nothing of a map's size is kept beside the outputs.

Letters: N faces, L landmarks, h, w a map's cells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import check_float, check_no_gradient
from ..._torch_ops import accumulator
from .maps import bumps


def map_loss(outputs: Tensor, points: Tensor, sigma: float, kind: str = "subpixel") -> Tensor:
    """[N]: the loss of each face, computed in float32 (float64 of float64 outputs).

    A landmark outside the map has a target of zeros, which counts as any other.

    Args:
        outputs: maps [N, L, h, w] of a model, any float dtype.
        points: [N, L, 3] x, y in cells and weight, as of ``gaussian_targets``; no gradient.
        sigma, kind: of the bumps, as of ``gaussian_targets``.

    Raises:
        ValueError: shapes that do not fit, another dtype or kind, points that want a gradient.
    """
    if not isinstance(outputs, Tensor) or outputs.dim() != 4:
        found = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"outputs: expected maps [N, L, h, w], got {found}")
    check_float("outputs", outputs)
    if not outputs.shape[1:].numel():
        raise ValueError(f"outputs: expected maps with cells, got {list(outputs.shape)}")
    if not isinstance(points, Tensor) or list(points.shape) != [*outputs.shape[:2], 3]:
        found = list(points.shape) if isinstance(points, Tensor) else type(points).__name__
        raise ValueError(
            f"points: expected {[*outputs.shape[:2], 3]}, x, y and weight of outputs' landmarks, "
            f"got {found}"
        )
    if points.device != outputs.device:
        raise ValueError(
            f"points: are on {points.device}, the outputs on {outputs.device}; move one of them"
        )
    check_float("points", points)
    check_no_gradient("points", points, "map_loss")
    return _MapLoss.apply(outputs, points, sigma, kind)


class _MapLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, points: Tensor, sigma: float, kind: str) -> Tensor:
        ctx.save_for_backward(outputs, points)
        ctx.drawn = sigma, kind
        return _difference(outputs, points, sigma, kind).square_().flatten(1).mean(dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        outputs, points = ctx.saved_tensors
        # Plain operations, so that a gradient of this gradient comes out right, too.
        share = gradient * (-2.0 / outputs.shape[1:].numel())
        difference = _difference(outputs, points, *ctx.drawn)
        difference.mul_(share[:, None, None, None])
        return difference.to(outputs.dtype), None, None, None


def _difference(outputs: Tensor, points: Tensor, sigma: float, kind: str) -> Tensor:
    """Targets less outputs, [N, L, h, w], in one new tensor."""
    dtype = accumulator(outputs.dtype)
    with torch.autocast(outputs.device.type, enabled=False):
        down, across = bumps(points.to(dtype), *outputs.shape[2:], sigma, kind)
        return (down[..., :, None] * across[..., None, :]).sub_(outputs)
