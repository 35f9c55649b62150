"""The operations of ``functional`` in vectorised PyTorch: no loop over experts, no host read.

The arguments were checked by ``functional``; shapes and meanings are its own. Autograd
differentiates each: its backward of these few operations is as short as a hand-written one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows below which the dense product beats the grouped one: see ``prefer_grouped``.
GROUPED_MIN_ELEMENTS = 1 << 21


def noisy_topk(
    clean: Tensor, noise: Tensor, eps: Tensor | str | None, k: int, renormalize: bool
) -> tuple[Tensor, ...]:
    dtype = torch.float64 if clean.dtype == torch.float64 else torch.float32
    z = clean.to(dtype)
    if eps is not None:
        draw = torch.randn_like(z) if isinstance(eps, str) else eps.to(dtype)
        z = torch.addcmul(z, draw, F.softplus(noise.to(dtype)))
    p = torch.softmax(z, dim=1, dtype=dtype)
    num_experts = p.shape[1]
    # torch.topk leaves the order of ties open; a stable sort takes the lowest index first, and
    # sorts NaN rows (all equal) into 0..K-1: always distinct, always in range.
    experts = torch.sort(p.detach(), dim=1, descending=True, stable=True).indices[:, :k]
    experts = experts.contiguous()
    weights = p.gather(1, experts)
    if renormalize:
        weights = weights / weights.sum(dim=1, keepdim=True)

    by_row, rows = torch.sort(experts.flatten(), stable=True)
    every = torch.arange(rows.numel(), device=rows.device, dtype=torch.int32)
    positions = torch.empty_like(every).index_copy_(0, rows, every).view_as(experts)
    bounds = torch.arange(num_experts + 1, device=rows.device)
    offsets = torch.searchsorted(by_row, bounds, out_int32=True)
    return weights, p.mean(dim=0), experts, offsets, rows.int(), positions


def gather(
    x: Tensor,
    rows: Tensor,
    positions: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    sample = _sample_of_row(rows, positions.shape[1])
    if memory_format == torch.channels_last:
        out = x.permute(0, 2, 3, 1).index_select(0, sample).permute(0, 3, 1, 2)
    else:
        out = x.index_select(0, sample)
    if scale is None and shift is None:
        return out.to(dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    expert = _expert_of_row(offsets, rows.numel())
    per_row = (rows.numel(), -1, *[1] * (x.dim() - 2))
    out = out.to(compute)
    if scale is not None:
        out = out * scale.to(compute).index_select(0, expert).view(per_row)
    if shift is not None:
        out = out + shift.to(compute).index_select(0, expert).view(per_row)
    return out.to(dtype)


def combine(
    outputs: Tensor,
    weights: Tensor,
    experts: Tensor,
    rows: Tensor,
    positions: Tensor,
    offsets: Tensor,
) -> Tensor:
    (n, k), num_experts = experts.shape, offsets.numel() - 1
    flat = outputs.flatten(1)
    weighted = flat * _weight_of_row(weights, rows).to(_compute_dtype(flat)).unsqueeze(1)
    cell = _sample_of_row(rows, k) * num_experts + _expert_of_row(offsets, rows.numel())
    concat = flat.new_zeros(n * num_experts, flat.shape[1])
    concat = concat.index_copy(0, cell, weighted.to(flat.dtype))
    return concat.view(n, num_experts * outputs.shape[1], *outputs.shape[2:])


def aggregate(
    outputs: Tensor,
    weights: Tensor,
    experts: Tensor,
    rows: Tensor,
    positions: Tensor,
    offsets: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
) -> Tensor:
    if outputs.dim() > 2 or not prefer_grouped(outputs, matrix):
        concat = combine(outputs, weights, experts, rows, positions, offsets)
        return linear_over_channels(concat, matrix, bias)
    num_experts = offsets.numel() - 1
    c_out, c = matrix.shape[0], outputs.shape[1]
    weighted = outputs * _weight_of_row(weights, rows).to(_compute_dtype(outputs)).unsqueeze(1)
    blocks = matrix.to(outputs.dtype).view(c_out, num_experts, c).permute(1, 2, 0)
    per_row = F.grouped_mm(weighted.to(outputs.dtype), blocks, offs=offsets[1:])
    n, k = experts.shape
    y = per_row.index_select(0, positions.flatten()).view(n, k, c_out).sum(dim=1)
    return y if bias is None else y + bias.to(y.dtype)


def prefer_grouped(outputs: Tensor, matrix: Tensor) -> bool:
    """Whether the grouped product (R rows against their expert's block) beats the dense one.

    The dense form does M/K times the arithmetic and builds the concatenation, but is one call.
    Torch's grouped product takes float32 and the half types with rows of a multiple of 16 bytes.
    """
    itemsize = outputs.element_size()
    aligned = outputs.shape[1] * itemsize % 16 == 0 and matrix.shape[0] * itemsize % 16 == 0
    return (
        hasattr(F, "grouped_mm")
        and outputs.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and aligned
        and matrix.numel() >= GROUPED_MIN_ELEMENTS
    )


def exploit_loss(
    outputs: Tensor,
    rows: Tensor,
    target: Tensor,
    k: int,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    target = target.index_select(0, _sample_of_row(rows, k))
    total = F.cross_entropy(
        outputs.to(_compute_dtype(outputs)),
        target,
        reduction="sum",
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )
    return total / (target.numel() / k)


def linear_over_channels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear map over dimension 1 of [N, C] or [N, C, ...], at every position alike."""
    if x.dim() == 2:
        return F.linear(x, weight, bias)
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sample_of_row(rows: Tensor, k: int) -> Tensor:
    return torch.div(rows, k, rounding_mode="floor").long()


def _expert_of_row(offsets: Tensor, num_rows: int) -> Tensor:
    row = torch.arange(num_rows, device=offsets.device, dtype=torch.int32)
    return torch.searchsorted(offsets[1:], row, right=True)


def _weight_of_row(weights: Tensor, rows: Tensor) -> Tensor:
    return weights.flatten().index_select(0, rows)
