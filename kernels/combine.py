"""combine: the experts' weighted rows, set side by side for each sample (equation 1).

    concat[n, i*C + c, ...] = w[n, j] * outputs[positions[n, j], c, ...]   if experts[n, j] == i
                              0                                            if expert i is inactive

Shapes: N samples, M experts, K active experts per sample, R = N*K rows, C outputs, S trailing
elements. The kernels see memory, not shapes: a sample's output from one expert is ``outer`` runs of
``inner`` elements, (1, C*S) when contiguous and (S, C) in channels last, and the concatenation
sets the experts' runs side by side: outputs [R, outer, inner], concat [N, outer, M, inner].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import TRITON_DTYPE, RowPlan, accumulator, cdiv, next_power_of_2
from ._cross_entropy import loss_gradient
from ._launch import Launch, Plan, apply, once_differentiable, register
from ._layout import blocks, channels_minor, empty, settle, settle_gradient, trailing_size, units
from .exploit_loss import exploit_loss_forward
from .router_loss import add_router_gradient, supervise

_MAX_LOOKUP = 2048  # (pair, slot) comparisons of one program: keeps K = M = 1024 in registers
_MAX_SLOTS = 32  # of one backward program: 64 spilled a register on sm_80 at C = 10


@triton.jit(do_not_specialize=["num_runs"])
def _combine_forward(
    concat_ptr,  # [N, outer, M, inner], written
    outputs_ptr,  # [R, outer, inner]
    weights_ptr,  # [N, K]
    experts_ptr,  # [N, K]
    positions_ptr,  # [N, K]
    num_runs,  # N * outer * M
    outer,
    inner_units,
    M: tl.constexpr,
    K: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Grid: tiles of the runs, innermost first. A program owns BLOCK_P runs of the concatenation
    and BLOCK_L elements of each: it looks up which row fills each run, and writes it or zeros."""
    inner = inner_units * VEC
    tiles = tl.cdiv(inner, BLOCK_L)
    pid = tl.program_id(0)
    run = (pid // tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = run < num_runs
    expert = run % M
    n = run // M // outer
    o = (run // M) % outer

    offs_k = tl.arange(0, BLOCK_K)
    slot = n[:, None] * K + offs_k[None, :]
    mask_s = mask_p[:, None] & (offs_k < K)[None, :]
    hit = tl.load(experts_ptr + slot, mask=mask_s, other=-1) == expert[:, None]
    position = tl.load(positions_ptr + slot, mask=mask_s, other=-1)
    weight = tl.load(weights_ptr + slot, mask=mask_s, other=0.0).to(COMPUTE)
    row = tl.max(tl.where(hit, position, -1), axis=1).to(tl.int64)  # at most one hit
    weight = tl.sum(tl.where(hit, weight, 0.0), axis=1)

    offs_l = (pid % tiles) * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_l = (offs_l < inner)[None, :]
    source = outputs_ptr + (row * outer + o)[:, None] * inner + offs_l[None, :]
    x = tl.load(source, mask=(row >= 0)[:, None] & mask_l, other=0.0).to(COMPUTE)
    target = concat_ptr + run[:, None] * inner + offs_l[None, :]
    tl.store(target, weight[:, None] * x, mask=mask_p[:, None] & mask_l)


@triton.jit(do_not_specialize=["num_rows", "divisor"])
def _combine_backward(
    d_outputs_ptr,  # [R, outer, inner], written
    d_weights_ptr,  # [N, K], written
    d_concat_ptr,  # [N, outer, M, inner]
    outputs_ptr,  # [R, outer, inner]
    weights_ptr,  # [N, K]
    experts_ptr,  # [N, K]
    positions_ptr,  # [N, K]
    d_loss_ptr,  # [], or None without the loss, as the two below
    logsumexp_ptr,  # [R, S]
    target_ptr,  # [N, S]
    num_rows,
    outer,
    inner_units,
    trailing,  # S
    divisor,  # N * S
    ignore_index,
    M: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    VEC: tl.constexpr,
    FLAT: tl.constexpr,  # outer = 1
    MINOR: tl.constexpr,  # dimension 1 is innermost
    WITH_LOSS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Grid: blocks of slots. A program owns BLOCK_R slots (n, j) and walks over their row's whole
    length: it writes the row's gradient and sums <d_concat, outputs> in a fixed order."""
    inner = inner_units * VEC
    slot = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = slot < num_rows
    n = slot // K
    expert = tl.load(experts_ptr + slot, mask=mask_r, other=0).to(tl.int64)
    row = tl.load(positions_ptr + slot, mask=mask_r, other=0).to(tl.int64)
    weight = tl.load(weights_ptr + slot, mask=mask_r, other=0.0).to(COMPUTE)
    if WITH_LOSS:
        scale = tl.load(d_loss_ptr).to(COMPUTE) / divisor
        if FLAT and MINOR:  # S = 1: one target for the whole row
            lse = tl.load(logsumexp_ptr + row, mask=mask_r, other=0.0)[:, None]
            y = tl.load(target_ptr + n, mask=mask_r, other=0)[:, None]

    dot = tl.zeros([BLOCK_R, BLOCK_L], dtype=COMPUTE)
    for start in range(0, outer * inner, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        mask = mask_r[:, None] & (offs_l < outer * inner)[None, :]
        offs_x = row[:, None] * (outer * inner) + offs_l[None, :]
        if FLAT:
            offs_concat = (n * M + expert)[:, None] * inner + offs_l[None, :]
        else:
            run = (n[:, None] * outer + (offs_l // inner)[None, :]) * M + expert[:, None]
            offs_concat = run * inner + (offs_l % inner)[None, :]
        d_concat = tl.load(d_concat_ptr + offs_concat, mask=mask, other=0.0).to(COMPUTE)
        x = tl.load(outputs_ptr + offs_x, mask=mask, other=0.0).to(COMPUTE)
        dot += d_concat * x
        d_x = weight[:, None] * d_concat
        if WITH_LOSS:
            if FLAT and MINOR:
                c = offs_l
            else:
                c = offs_l % C if MINOR else offs_l // trailing
                s = offs_l // C if MINOR else offs_l % trailing
                offs_lse = row[:, None] * trailing + s[None, :]
                lse = tl.load(logsumexp_ptr + offs_lse, mask=mask, other=0.0)
                y = tl.load(target_ptr + n[:, None] * trailing + s[None, :], mask=mask, other=0)
            d_x += scale * loss_gradient(x, lse, y, c[None, :], ignore_index, C, SMOOTHING)
        tl.store(d_outputs_ptr + offs_x, d_x, mask=mask)
    tl.store(d_weights_ptr + slot, tl.sum(dot, axis=1), mask=mask_r)


def _runs(outputs: Tensor) -> tuple[int, int]:
    """(outer, inner): how many runs of how many elements a row is made of."""
    channels, trailing = outputs.shape[1], trailing_size(outputs)
    return (trailing, channels) if channels_minor(outputs) else (1, channels * trailing)


def _arguments(outputs, weights, experts, positions, num_experts) -> dict:
    """What forward and backward are both launched with."""
    outer, inner = _runs(outputs)
    inner_units, vec = units(inner)
    return {
        "outputs_ptr": outputs,
        "weights_ptr": weights,
        "experts_ptr": experts,
        "positions_ptr": positions,
        "outer": outer,
        "inner_units": inner_units,
        "M": num_experts,
        "K": experts.shape[1],
        "VEC": vec,
        "COMPUTE": TRITON_DTYPE[accumulator(outputs.dtype)],
    }


def plan_forward(outputs, weights, experts, positions, num_experts) -> Plan:
    n, k = experts.shape
    concat = empty(outputs, n, outputs.dtype, num_experts * outputs.shape[1])
    outer, inner = _runs(outputs)
    num_runs = n * outer * num_experts
    block_k = next_power_of_2(k)
    block_p, block_l = blocks(inner)
    block_p = min(block_p, max(_MAX_LOOKUP // block_k, 1))
    launch = Launch(
        _combine_forward,
        cdiv(num_runs, block_p) * cdiv(inner, block_l),
        **_arguments(outputs, weights, experts, positions, num_experts),
        concat_ptr=concat,
        num_runs=num_runs,
        BLOCK_K=block_k,
        BLOCK_P=block_p,
        BLOCK_L=block_l,
    )
    return Plan(concat, [launch])


def plan_backward(
    d_concat,
    outputs,
    weights,
    experts,
    positions,
    num_experts,
    d_loss,
    logsumexp,
    target,
    label_smoothing,
    ignore_index,
) -> Plan:
    n, k = experts.shape
    with_loss = d_loss is not None
    d_outputs, d_weights = torch.empty_like(outputs), torch.empty_like(weights)
    outer, inner = _runs(outputs)
    trailing = trailing_size(outputs)
    block_r, block_l = blocks(outer * inner)
    block_r = min(block_r, _MAX_SLOTS)
    launch = Launch(
        _combine_backward,
        cdiv(n * k, block_r),
        **_arguments(outputs, weights, experts, positions, num_experts),
        d_outputs_ptr=d_outputs,
        d_weights_ptr=d_weights,
        d_concat_ptr=d_concat,
        d_loss_ptr=d_loss,
        logsumexp_ptr=logsumexp,
        target_ptr=target,
        num_rows=n * k,
        trailing=trailing,
        divisor=n * trailing,
        ignore_index=ignore_index,
        FLAT=outer == 1,
        MINOR=channels_minor(outputs),
        C=outputs.shape[1] if with_loss else 0,  # not used then: do not compile for each
        WITH_LOSS=with_loss,
        SMOOTHING=label_smoothing,
        BLOCK_R=block_r,
        BLOCK_L=block_l,
    )
    return Plan((d_outputs, d_weights), [launch])


combine_forward = register(
    "combine_forward(Tensor outputs, Tensor weights, Tensor experts, Tensor positions,"
    " SymInt num_experts) -> Tensor",
    plan_forward,
    lambda outputs, weights, experts, positions, num_experts: empty(
        outputs, experts.shape[0], outputs.dtype, num_experts * outputs.shape[1]
    ),
)
combine_backward = register(
    "combine_backward(Tensor d_concat, Tensor outputs, Tensor weights, Tensor experts,"
    " Tensor positions, SymInt num_experts, Tensor? d_loss, Tensor? logsumexp, Tensor? target,"
    " float label_smoothing, int ignore_index) -> (Tensor, Tensor)",
    plan_backward,
    lambda d_concat, outputs, weights, *_: (torch.empty_like(outputs), torch.empty_like(weights)),
    settle_gradient,
)


class _Combine(torch.autograd.Function):
    """With a target, the exploit loss comes along: one backward for both (fused_loss.py). With a
    temperature, the router's loss, too."""

    @staticmethod
    def forward(
        ctx, outputs, weights, experts, rows, positions, num_experts, target, temperature,
        *smoothing,
    ):  # fmt: skip
        outputs, weights = settle(outputs), weights.contiguous()
        concat = combine_forward(outputs, weights, experts, positions, num_experts)
        results, logsumexp, gradient = [concat], None, None
        if target is not None:
            partials, logsumexp, losses = exploit_loss_forward(
                outputs, rows, target, experts.shape[1], *smoothing, temperature is not None
            )
            results.append(partials.sum())
        if temperature is not None:
            router, gradient = supervise(losses, weights, positions, temperature)
            results.append(router)
        ctx.save_for_backward(outputs, weights, experts, positions, logsumexp, target, gradient)
        ctx.num_experts, ctx.smoothing = num_experts, smoothing
        return tuple(results) if target is not None else concat

    @staticmethod
    @once_differentiable
    def backward(ctx, d_concat, d_loss=None, d_router=None):
        *combined, logsumexp, target, gradient = ctx.saved_tensors
        d_outputs, d_weights = combine_backward(
            d_concat, *combined, ctx.num_experts, d_loss, logsumexp, target, *ctx.smoothing
        )
        d_weights = add_router_gradient(d_weights, gradient, d_router)
        return d_outputs, d_weights, None, None, None, None, None, None, None, None


def apply_combine(
    outputs: Tensor,
    weights: Tensor,
    plan: RowPlan,
    target: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    temperature: float | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """The concatenation; with a target the exploit loss, with a temperature the router's, too."""
    return apply(
        _Combine,
        outputs,
        weights,
        plan.experts.contiguous(),
        None if target is None else plan.rows.contiguous(),
        plan.positions.contiguous(),
        plan.offsets.numel() - 1,
        None if target is None else target.contiguous(),
        None if temperature is None else float(temperature),
        float(label_smoothing),
        ignore_index,
    )


def combine(outputs: Tensor, weights: Tensor, plan: RowPlan) -> Tensor:
    """Weighted rows to the concatenation, its zeros included, each element written once.

    Args:
        outputs: [R, C, ...] float16, bfloat16, float32 (float64 too under the interpreter),
            rows by expert, then by sample; contiguous or channels last (else it is copied).
        weights: [N, K] floating.
        plan: where rows lie.

    Returns:
        [N, M*C, ...] in the dtype and layout of ``outputs``; computed in float32 (float64 for
        float64) and rounded once. Differentiable in ``outputs`` and ``weights``: both gradients
        come from one launch, without atomics, the same bits each time.
    """
    return apply_combine(outputs, weights, plan)
