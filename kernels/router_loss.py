"""router_loss: how far the router's weights are from what its experts got right (our addition).

    l_j = loss of the row of slot (n, j), a number
    q = softmax(-l / tau)     r_j = w_j / sum_j w_j
    loss = (1/N) * sum_n KL(q_n || r_n) = (1/N) * sum over slots of q (log q - log r)
    d_w[n, j] = d_loss / N * (1 / sum_j w_j - q_j / w_j)

The losses are the exploit loss's own, so there is one launch more, over slots, and it leaves the
gradient for a d_loss of 1 along with the loss: backward is a product. A weight below the smallest
normal number has underflowed: it counts as that number, and q / w, which its softmax would multiply
by that weight, as 0.

Shapes: N samples, K active experts per sample, R = N*K rows, C outputs, S trailing elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import TRITON_DTYPE, RowPlan, accumulator, cdiv, next_power_of_2
from ._launch import Launch, Plan, apply, once_differentiable, register
from ._layout import settle
from .exploit_loss import exploit_loss_forward

_TILE = 1024  # slots of one tile
_TILES = 8  # of one program: up to 4,096 samples of 2 experts need no second launch


@triton.jit(do_not_specialize=["num_samples"])
def _router_loss(
    partials_ptr,  # [programs], written
    gradient_ptr,  # [N, K], written
    losses_ptr,  # [R]
    weights_ptr,  # [N, K]
    positions_ptr,  # [N, K]
    num_samples,
    K: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    TINY: tl.constexpr,  # the weights' smallest normal number
    COMPUTE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: blocks of samples. A program owns TILES * BLOCK_N samples: it writes their gradients
    and one sum of their divergences."""
    first = tl.program_id(0).to(tl.int64) * (TILES * BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N], dtype=COMPUTE)
    for start in range(first, min(first + TILES * BLOCK_N, num_samples), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        slot = n[:, None] * K + offs_k[None, :]
        mask_n, mask_k = (n < num_samples)[:, None], (offs_k < K)[None, :]
        mask = mask_n & mask_k
        row = tl.load(positions_ptr + slot, mask=mask, other=0).to(tl.int64)
        loss = tl.load(losses_ptr + row, mask=mask, other=0.0).to(COMPUTE)
        w = tl.load(weights_ptr + slot, mask=mask, other=0.0).to(COMPUTE)

        z = tl.where(mask_k, -loss / TEMPERATURE, -float("inf"))
        z -= tl.max(z, axis=1)[:, None]
        power = tl.exp(z)
        powers = tl.sum(power, axis=1)[:, None]
        q = power / powers
        log_q = tl.where(power == 0, 0.0, z - tl.log(powers))  # 0 log 0 = 0
        sum_w = tl.where(mask_n, tl.sum(w, axis=1)[:, None], 1.0)
        w_above_0 = tl.maximum(w, TINY)
        log_r = tl.log(w_above_0) - tl.log(sum_w)
        divergence = tl.where(mask, q * (log_q - log_r), 0.0)
        total += tl.sum(divergence, axis=1)
        d_w = 1.0 / sum_w - tl.where(w >= TINY, q / w_above_0, 0.0)
        tl.store(gradient_ptr + slot, d_w / num_samples, mask=mask)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(total, axis=0) / num_samples)


def _tile(k: int) -> tuple[int, int]:
    """(BLOCK_N, BLOCK_K)."""
    block_k = next_power_of_2(k)
    return max(_TILE // block_k, 1), block_k


def plan_forward(losses, weights, positions, temperature) -> Plan:
    partials, gradient = _fake(losses, weights, positions, temperature)
    n, k = weights.shape
    block_n, block_k = _tile(k)
    launch = Launch(
        _router_loss,
        partials.numel(),
        partials_ptr=partials,
        gradient_ptr=gradient,
        losses_ptr=losses,
        weights_ptr=weights,
        positions_ptr=positions,
        num_samples=n,
        K=k,
        TEMPERATURE=temperature,
        TINY=torch.finfo(weights.dtype).tiny,
        COMPUTE=TRITON_DTYPE[partials.dtype],
        TILES=_TILES,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
    )
    return Plan((partials, gradient), [launch])


def _fake(losses, weights, positions, temperature):
    n, k = weights.shape
    programs = cdiv(n, _TILES * _tile(k)[0])
    partials = losses.new_empty(programs, dtype=accumulator(losses.dtype, weights.dtype))
    return partials, torch.empty_like(weights)


router_loss_forward = register(
    "router_loss_forward(Tensor losses, Tensor weights, Tensor positions, float temperature)"
    " -> (Tensor partials, Tensor gradient)",
    plan_forward,
    _fake,
)


def supervise(
    losses: Tensor, weights: Tensor, positions: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient [N, K] towards the weights; losses: [R, S], a map's are averaged.

    One launch for plain rows of up to ``_TILES`` tiles of samples; one more for maps, and one more
    to add up what several programs leave.
    """
    losses = losses.flatten() if losses.shape[1] == 1 else losses.mean(dim=1)
    partials, gradient = router_loss_forward(losses, weights, positions, temperature)
    return partials.sum() if partials.numel() > 1 else partials.view(()), gradient


def add_router_gradient(
    d_weights: Tensor, gradient: Tensor | None, d_router: Tensor | None
) -> Tensor:
    """d_weights with the router's own: one launch; itself where there is none."""
    if gradient is None:
        return d_weights
    return torch.addcmul(d_weights, gradient, d_router.to(gradient.dtype))


class _RouterLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, outputs, rows, positions, target, temperature, *smoothing):
        weights = weights.contiguous()
        *_, losses = exploit_loss_forward(outputs, rows, target, weights.shape[1], *smoothing, True)
        loss, gradient = supervise(losses, weights, positions, temperature)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        (gradient,) = ctx.saved_tensors
        return gradient * d_loss.to(gradient.dtype), None, None, None, None, None, None, None


def router_loss(
    outputs: Tensor,
    weights: Tensor,
    plan: RowPlan,
    target: Tensor,
    temperature: float,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """(1/N) * sum over samples of KL(q || r), of the rows' cross-entropies.

    Args:
        outputs, plan, target, label_smoothing, ignore_index: as of ``exploit_loss``; the losses of
            ignored rows are 0.
        weights: [N, K] float32 or float64.
        temperature: tau > 0; compiled in.

    Returns:
        float32 scalar (float64 where anything is), differentiable in ``weights`` alone: two
        launches forward, a product backward, the same bits each time.
    """
    return apply(
        _RouterLoss,
        weights,
        settle(outputs.detach()),
        plan.rows.contiguous(),
        plan.positions.contiguous(),
        target.contiguous(),
        float(temperature),
        float(label_smoothing),
        ignore_index,
    )
