"""The operations of ``functional`` in vectorised PyTorch: no host read on a device.

The arguments were checked by ``functional``; shapes and meanings are its own. Autograd
differentiates each: its backward of these few operations is as short as a hand-written one. The
exception is ``aggregate`` on large hubs on the CPU, a loop over experts after all: there a host
read is free, a call is cheap next to a product of matrices, and the loop saves M/K of the work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .routing import Routing

# Multiply-adds that the grouped form must save per expert before it pays. Measured on one thread of
# an EPYC (AVX-512), forward and backward: an expert's three calls cost about 25 us, and the forms
# cross between 2.4e5 (N=4096 M=5 K=2 C=10: dense 1.1 ms, grouped 1.4) and 4.0e5 (M=64: 9.1, 2.7).
GROUPED_MIN_SAVED = 3 << 17


def noisy_topk(
    clean: Tensor, noise: Tensor, eps: Tensor | str | None, k: int, renormalize: bool
) -> tuple[Tensor, ...]:
    dtype = accumulator(clean.dtype)
    z = clean.to(dtype)
    if eps is not None:
        draw = torch.randn_like(z) if isinstance(eps, str) else eps.to(dtype)
        z = torch.addcmul(z, draw, F.softplus(noise.to(dtype)))
    p = torch.softmax(z, dim=1, dtype=dtype)
    num_experts = p.shape[1]
    experts = _largest(p.detach(), k)
    weights = p.gather(1, experts)
    if renormalize:
        weights = weights / weights.sum(dim=1, keepdim=True)

    by_row, rows = torch.sort(experts.flatten(), stable=True)
    every = torch.arange(rows.numel(), device=rows.device, dtype=torch.int32)
    positions = torch.empty_like(every).index_copy_(0, rows, every).view_as(experts)
    bounds = torch.arange(num_experts + 1, device=rows.device)
    offsets = torch.searchsorted(by_row, bounds, out_int32=True)
    return weights, p.mean(dim=0), experts, offsets, rows.int(), positions


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
    sample = sample_of_row(plan.rows, plan.k)
    if memory_format == torch.channels_last:
        out = x.permute(0, 2, 3, 1).index_select(0, sample).permute(0, 3, 1, 2)
    else:
        out = x.index_select(0, sample)
    if scale is None and shift is None:
        return out.to(dtype)
    compute = accumulator(dtype)
    expert = _expert_of_row(plan)
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
    expert = _expert_of_row(plan)
    begin = plan.offsets.index_select(0, expert)
    within = torch.arange(len(expert), device=x.device) - begin
    out.index_copy_(0, within + expert * (len(out) // plan.num_experts), found)


def combine(outputs: Tensor, weights: Tensor, plan: Routing) -> Tensor:
    n, m = plan.num_samples, plan.num_experts
    flat = outputs.flatten(1)
    weighted = flat * _weight_of_row(weights, plan.rows).to(accumulator(flat.dtype)).unsqueeze(1)
    cell = sample_of_row(plan.rows, plan.k) * m + _expert_of_row(plan)
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
) -> Tensor:
    """grouped: the form, on the CPU; None for the one that ``prefer_grouped`` says."""
    if grouped is None:
        grouped = outputs.device.type == "cpu" and prefer_grouped(outputs, matrix, plan.k)
    if grouped:
        tables = plan.rows, plan.positions, plan.offsets
        return _GroupedAggregate.apply(outputs, weights, matrix, bias, *tables)
    return linear_over_channels(combine(outputs, weights, plan), matrix, bias)


def prefer_grouped(outputs: Tensor, matrix: Tensor, k: int) -> bool:
    """Whether products of R rows with their expert's block beat the dense product.

    The dense form does M/K times the arithmetic and builds the concatenation, but is one call. The
    line lies where the arithmetic saved pays for the calls: see ``GROUPED_MIN_SAVED``.
    """
    num_experts = matrix.shape[1] // outputs.shape[1]
    # Products of the dense form, N*S * M*C * C_OUT, less those of the grouped one.
    saved = outputs.numel() // k * matrix.shape[0] * (num_experts - k)
    return saved >= GROUPED_MIN_SAVED * num_experts


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


def _operation(schema: str, function, fake):
    """An operation of its own: compiled code calls it whole and does not look into the loop."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CPU")
    torch.library.register_fake(f"hubpath_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.hubpath_fast, name).default


_LIBRARY = torch.library.Library("hubpath_fast", "FRAGMENT")
_grouped_products = _operation(
    "cpu_grouped_products(Tensor items, Tensor matrix, Tensor offsets, bool transposed) -> Tensor",
    _products,
    _products_fake,
)
_grouped_matrix_gradient = _operation(
    "cpu_grouped_matrix_gradient(Tensor d_products, Tensor items, Tensor offsets) -> Tensor",
    _matrix_gradient,
    _matrix_gradient_fake,
)


class _GroupedAggregate(torch.autograd.Function):
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
            d_rows = d_rows * _weight_of_row(weights, rows).to(dtype).view(-1, 1, 1)
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
    y = aggregate(outputs.to(matrix.dtype), weights, plan, matrix, bias)
    return y, *losses_of_rows(outputs, weights, plan, *loss, temperature)


def linear_over_channels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear map over dimension 1 of [N, C] or [N, C, ...], at every position alike."""
    if x.dim() == 2:
        return F.linear(x, weight, bias)
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What an operation computes in: float64 for float64, float32 for anything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sample_of_row(rows: Tensor, k: int) -> Tensor:
    """[R] the sample whose slot each row is."""
    return torch.div(rows, k, rounding_mode="floor").long()


def _expert_of_row(plan: Routing) -> Tensor:
    row = torch.arange(plan.rows.numel(), device=plan.rows.device, dtype=torch.int32)
    return torch.searchsorted(plan.offsets[1:], row, right=True)


def _weight_of_row(weights: Tensor, rows: Tensor) -> Tensor:
    return weights.flatten().index_select(0, rows)
