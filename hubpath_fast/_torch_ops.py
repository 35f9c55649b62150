"""The operations of ``functional`` in vectorised PyTorch: no host read on a device.

The arguments were checked by ``functional``; shapes and meanings are its own. Autograd
differentiates each: its backward of these few operations is as short as a hand-written one. The
exception is ``aggregate`` on the CPU, of large hubs a loop over experts after all, of large maps
over rows: there a host read is free, a call is cheap next to a product of matrices, and the loops
save M/K of the work and, of maps, the memory. On other devices maps are concatenated.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._noise_draw import NoiseDraw
from ._torch_batch_norm import masked_batch_norm  # noqa: F401  one of the operations
from ._torch_grouped import GroupedAggregate
from ._torch_maps import MapAggregate
from ._torch_rows import accumulator, expert_of_row, sample_of_row, weight_of_row
from .routing import Routing, takes_all

# Multiply-adds that the grouped form must save per expert before it pays. Measured on one thread of
# an EPYC (AVX-512), forward and backward: an expert's three calls cost about 25 us, and the forms
# cross between 2.4e5 (N=4096 M=5 K=2 C=10: dense 1.1 ms, grouped 1.4) and 4.0e5 (M=64: 9.1, 2.7).
GROUPED_MIN_SAVED = 3 << 17
# Elements of a map from which on its row is multiplied alone: about 30 us of calls, forward and
# backward, are then less than what the grouped form moves more. Measured as above, at N=48 M=5 K=2:
# 5 x 32x32 (5,120) is even, 10 x 16x16 (2,560) loses, 1.8, of 10 x 32x32 and 32 x 16x16 wins, 1.5
# and 1.2.
ROWS_MIN_ELEMENTS = 1 << 13


def noisy_topk(
    clean: Tensor, noise: Tensor, eps: Tensor | NoiseDraw | str | None, k: int, renormalize: bool
) -> tuple[Tensor, ...]:
    dtype = accumulator(clean.dtype)
    z = clean.to(dtype)
    if eps is not None:
        z = torch.addcmul(z, _normals(eps, z), F.softplus(noise.to(dtype)))
    p = torch.softmax(z, dim=1, dtype=dtype)
    num_experts = p.shape[1]
    experts = _largest(p.detach(), k)
    weights = p.gather(1, experts)
    if renormalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    if k == num_experts:
        return weights, p.mean(dim=0), experts, *_plan_of_all(experts)

    by_row, rows = torch.sort(experts.flatten(), stable=True)
    every = torch.arange(rows.numel(), device=rows.device, dtype=torch.int32)
    positions = torch.empty_like(every).index_copy_(0, rows, every).view_as(experts)
    bounds = torch.arange(num_experts + 1, device=rows.device)
    offsets = torch.searchsorted(by_row, bounds, out_int32=True)
    return weights, p.mean(dim=0), experts, offsets, rows.int(), positions


def _normals(eps: Tensor | NoiseDraw | str, z: Tensor) -> Tensor:
    """The noise that eps gives or says how to draw, like z."""
    if isinstance(eps, str):
        return torch.randn_like(z)
    if isinstance(eps, Tensor):
        return eps.to(z.dtype)
    drawn = eps.normals(*z.shape).to(z.dtype)
    return drawn.pin_memory().to(z.device, non_blocking=True) if z.is_cuda else drawn.to(z.device)


def _plan_of_all(experts: Tensor) -> tuple[Tensor, ...]:
    """offsets, rows and positions where each sample has all M experts: nothing to sort or count."""
    n, m = experts.shape
    slot = torch.arange(n * m, device=experts.device, dtype=torch.int32).view(n, m)
    rows = torch.empty_like(slot).scatter_(1, experts, slot).t().flatten()
    offsets = torch.arange(0, n * m + 1, n, device=experts.device, dtype=torch.int32)
    positions = (experts * n + torch.arange(n, device=experts.device)[:, None]).int()
    return offsets, rows, positions


def _largest(p: Tensor, k: int) -> Tensor:
    """[N, K] indices of the K largest of each row of p, the lowest index first among equals.

    torch.topk leaves the order of ties open. Both forms take the lowest index first, and of a row
    of NaN (all equal) 0..K-1: always distinct, always in range. Rounds of argmax win from about
    M = 5 K on: on one thread 1.4 ms against 33 at N=4096 M=64 K=2, 94 us against 47 at N=256 M=16
    K=8.
    """
    if p.shape[1] < 5 * k:
        order = torch.sort(p, dim=1, descending=True, stable=True).indices
        return order[:, :k].contiguous()
    left, taken = p.clone(), []
    for _ in range(k):
        taken.append(left.argmax(dim=1, keepdim=True))
        left.scatter_(1, taken[-1], -1.0)  # below every probability
    return torch.cat(taken, dim=1)


def gather(
    x: Tensor,
    plan: Routing,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    if takes_all(plan) and scale is None and shift is None:
        copies = torch.cat([x.to(dtype)] * plan.num_experts)
        return copies.contiguous(memory_format=memory_format)
    sample = sample_of_row(plan.rows, plan.k)
    if memory_format == torch.channels_last:
        out = x.permute(0, 2, 3, 1).index_select(0, sample).permute(0, 3, 1, 2)
    else:
        out = x.index_select(0, sample)
    if scale is None and shift is None:
        return out.to(dtype)
    compute = accumulator(dtype)
    expert = expert_of_row(plan)
    per_row = (len(expert), -1, *[1] * (x.dim() - 2))
    out = out.to(compute)
    if scale is not None:
        out = out * scale.to(compute).index_select(0, expert).view(per_row)
    if shift is not None:
        out = out + shift.to(compute).index_select(0, expert).view(per_row)
    return out.to(dtype)


def gather_into(
    out: Tensor,
    x: Tensor,
    plan: Routing,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    last = out.dim() == 4 and not out.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    found = gather(x, plan, scale, shift, out.dtype, layout)
    expert = expert_of_row(plan)
    begin = plan.offsets.index_select(0, expert)
    within = torch.arange(len(expert), device=x.device) - begin
    out.index_copy_(0, within + expert * (len(out) // plan.num_experts), found)


def combine(outputs: Tensor, weights: Tensor, plan: Routing) -> Tensor:
    n, m = plan.num_samples, plan.num_experts
    flat = outputs.flatten(1)
    weighted = flat * weight_of_row(weights, plan.rows).to(accumulator(flat.dtype)).unsqueeze(1)
    if takes_all(plan):
        concat = weighted.to(flat.dtype).view(m, n, -1).transpose(0, 1)
        return concat.reshape(n, m * outputs.shape[1], *outputs.shape[2:])
    cell = sample_of_row(plan.rows, plan.k) * m + expert_of_row(plan)
    concat = flat.new_zeros(n * m, flat.shape[1])
    concat = concat.index_copy(0, cell, weighted.to(flat.dtype))
    return concat.view(n, m * outputs.shape[1], *outputs.shape[2:])


def aggregate(
    outputs: Tensor,
    weights: Tensor,
    plan: Routing,
    matrix: Tensor,
    bias: Tensor | None,
    grouped: bool | None = None,
    by_row: bool | None = None,
) -> Tensor:
    """grouped, by_row: the form, on the CPU; where nothing is said, ``prefer_rows``, then
    ``prefer_grouped`` choose. outputs of another dtype than the matrix are cast to it."""
    on_cpu = outputs.device.type == "cpu"
    if by_row is None:
        by_row = on_cpu and grouped is None and prefer_rows(outputs, matrix)
    if by_row:
        return MapAggregate.apply(outputs, weights, matrix, bias, plan.experts, plan.positions)
    outputs = outputs.to(matrix.dtype)
    if grouped is None:
        grouped = on_cpu and prefer_grouped(outputs, matrix, plan.k)
    if grouped:
        tables = plan.rows, plan.positions, plan.offsets
        return GroupedAggregate.apply(outputs, weights, matrix, bias, *tables)
    return linear_over_channels(combine(outputs, weights, plan), matrix, bias)


def prefer_rows(outputs: Tensor, matrix: Tensor) -> bool:
    """Whether maps [R, C, ...] are aggregated a row at a time, which keeps nothing of their size.

    It is faster, too, where a row's products outweigh its calls (``ROWS_MIN_ELEMENTS``), unless the
    matrix's block is larger than a map: then adding up its gradient row by row costs more.
    """
    trailing = math.prod(outputs.shape[2:])
    elements = outputs.shape[1] * trailing
    return trailing >= matrix.shape[0] and elements >= ROWS_MIN_ELEMENTS


def prefer_grouped(outputs: Tensor, matrix: Tensor, k: int) -> bool:
    """Whether products of R rows with their expert's block beat the dense product.

    The dense form does M/K times the arithmetic and builds the concatenation, but is one call. The
    line lies where the arithmetic saved pays for the calls: see ``GROUPED_MIN_SAVED``.
    """
    num_experts = matrix.shape[1] // outputs.shape[1]
    # Products of the dense form, N*S * M*C * C_OUT, less those of the grouped one.
    saved = outputs.numel() // k * matrix.shape[0] * (num_experts - k)
    return saved >= GROUPED_MIN_SAVED * num_experts


def exploit_loss(
    outputs: Tensor,
    plan: Routing,
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    total = _cross_entropy(outputs, plan, target, label_smoothing, ignore_index, "sum")
    positions = outputs.numel() // outputs.shape[1]  # R, times those of a map
    return total / (positions / plan.k)


def _cross_entropy(
    outputs: Tensor,
    plan: Routing,
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Of every row against its sample's target."""
    compute = accumulator(outputs.dtype)
    if target.is_floating_point():
        target = target.to(compute)  # or smoothing would be rounded to the target's precision
    return F.cross_entropy(
        outputs.to(compute),
        target.index_select(0, sample_of_row(plan.rows, plan.k)),
        reduction=reduction,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )


def total_loss(
    prediction: Tensor,
    target: Tensor,
    mean: Tensor,
    exploit: Tensor | None,
    weight: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of maps and class probabilities, too."""
    dtypes = [t.dtype for t in (prediction, mean, exploit) if t is not None]
    compute = torch.float64 if torch.float64 in dtypes else torch.float32
    losses = losses_of_samples(prediction.to(compute), target, label_smoothing)
    task, explore = losses.mean(), exploration_loss(mean, compute)
    total = task + weight * explore
    return total if exploit is None else total + exploit, task, explore, losses


def losses_of_samples(prediction: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """[N]: the cross-entropy of each sample, of a map the mean over its positions."""
    compute = accumulator(prediction.dtype)
    if target.is_floating_point():
        target = target.to(compute)
    losses = F.cross_entropy(
        prediction.to(compute), target, reduction="none", label_smoothing=label_smoothing
    )
    return losses if losses.dim() == 1 else losses.flatten(1).mean(dim=1)


def exploration_loss(mean: Tensor, compute: torch.dtype | None = None) -> Tensor:
    tiny = torch.finfo(mean.dtype).tiny
    mean = mean.to(compute or accumulator(mean.dtype))
    return (mean * mean.clamp_min(tiny).log()).sum()


def router_loss(
    outputs: Tensor,
    weights: Tensor,
    plan: Routing,
    target: Tensor,
    temperature: float,
    label_smoothing: float,
) -> Tensor:
    with torch.no_grad():
        losses = row_losses(outputs, plan, target, label_smoothing)
    return router_loss_of_rows(losses, weights, plan, temperature)


def router_loss_of_rows(
    losses: Tensor,
    weights: Tensor,
    plan: Routing,
    temperature: float,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """losses: [R], taken as numbers. sample_weight: [N] or None, of each sample's term."""
    losses = losses.detach().to(torch.promote_types(losses.dtype, weights.dtype))
    by_slot = losses.index_select(0, plan.positions.flatten()).view_as(plan.positions)
    q = torch.softmax(-by_slot / temperature, dim=1)
    # A weight below the smallest normal number has underflowed: clamped, its logarithm stays
    # finite, and its own gradient, which its softmax would multiply by that weight, is 0.
    tiny = torch.finfo(weights.dtype).tiny
    log_r = weights.clamp_min(tiny).log() - weights.sum(dim=1, keepdim=True).log()
    divergence = (torch.xlogy(q, q) - q * log_r).sum(dim=1)
    if sample_weight is not None:
        divergence = divergence * sample_weight
    return divergence.mean()


def row_losses(
    outputs: Tensor,
    plan: Routing,
    target: Tensor,
    label_smoothing: float,
    ignore_index: int = -100,
) -> Tensor:
    """[R]: the cross-entropy of each row, of a map the mean over its positions."""
    losses = _cross_entropy(outputs, plan, target, label_smoothing, ignore_index, "none")
    return losses if losses.dim() == 1 else losses.flatten(1).mean(dim=1)


def losses_of_rows(
    outputs: Tensor,
    weights: Tensor,
    plan: Routing,
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
    temperature: float | None = None,
) -> tuple[Tensor, ...]:
    """``(exploit_loss,)``; with a temperature ``(exploit_loss, router_loss)`` of the same rows."""
    if temperature is None:
        return (exploit_loss(outputs, plan, target, label_smoothing, ignore_index),)
    losses = row_losses(outputs, plan, target, label_smoothing, ignore_index)
    router = router_loss_of_rows(losses, weights, plan, temperature)
    return losses.sum() / plan.num_samples, router


def combine_with_exploit_loss(
    outputs: Tensor,
    weights: Tensor,
    plan: Routing,
    *loss: Tensor | float | int,
    temperature: float | None = None,
) -> tuple[Tensor, ...]:
    """loss: the arguments of ``exploit_loss`` behind the plan; temperature: as of
    ``losses_of_rows``."""
    losses = losses_of_rows(outputs, weights, plan, *loss, temperature)
    return combine(outputs, weights, plan), *losses


def aggregate_with_exploit_loss(
    outputs: Tensor,
    weights: Tensor,
    plan: Routing,
    matrix: Tensor,
    bias: Tensor | None,
    *loss: Tensor | float | int,
    temperature: float | None = None,
) -> tuple[Tensor, ...]:
    """The product is of the matrix's dtype, autocast's where it is on; the loss takes outputs as
    they are."""
    y = aggregate(outputs, weights, plan, matrix, bias)
    return y, *losses_of_rows(outputs, weights, plan, *loss, temperature)


def linear_over_channels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear map over dimension 1 of [N, C] or [N, C, ...], at every position alike."""
    if x.dim() == 2:
        return F.linear(x, weight, bias)
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
