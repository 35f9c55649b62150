"""aggregate: the linear aggregator on rows, without the concatenation it is defined on.

    y[n] = sum_j w[n, j] * W_i outputs[positions[n, j]] + bias      i = experts[n, j]
    W_i = matrix[:, i*C:(i+1)*C]

Rows lie in expert order, so the products W_i outputs[r] are one grouped matrix product: a tile of
rows belongs to one expert and reads that expert's block of the matrix only. The concatenation's
zeros are never multiplied: K/M of its work and none of its memory. A second launch adds each
sample's K products in order; nothing of them is kept. Of maps one launch does both, and the
products are never in memory (_aggregate_maps.py). Backward, with g[r] = W_i^T d_y[n]:

    d_outputs[r] = w[n, j] * g[r]                 d_w[n, j] = <g[r], outputs[r]>
    d_W_i = sum over rows of i of w[n, j] * d_y[n] outputs[r]^T        d_bias = sum_n d_y[n]

Shapes: N samples, M experts, K active experts per sample, R = N*K rows, C outputs, C_OUT outputs
of the aggregator, S trailing elements (maps: linear over dimension 1 at each), T = R*S items.

Beside outputs [T, C], y [N*S, C_OUT] and their gradients there are, of maps, only the dots that
d_weights is summed from, T for every 32 to 128 channels, and shares of d_matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ._aggregate_backward import aggregate_backward
from ._aggregate_form import choose_grouped, product_dtype
from ._aggregate_maps import adds_in_place, map_launch
from ._common import TRITON_DTYPE, RowPlan, accumulator, cdiv, next_power_of_2
from ._cross_entropy import PARTIALS, sum_partials
from ._grouped import find_tile, operand, product_constants, row_tiles, tf32_is_allowed, tiles_for
from ._launch import Launch, Plan, apply, once_differentiable, register
from ._layout import (
    blocks,
    channels_minor,
    empty,
    is_channels_last,
    item_offsets,
    settle,
    trailing_size,
    units,
)
from .combine import combine
from .exploit_loss import exploit_loss_forward
from .exploit_loss import plan_forward as plan_loss
from .router_loss import add_router_gradient, supervise


@triton.jit(do_not_specialize=["tiles"])
def _products(
    products_ptr,  # [R, C_OUT, S], or [R, S, C_OUT] if MINOR, written
    outputs_ptr,  # [R, C, S] or [R, S, C]
    offsets_ptr,  # [M + 1]
    matrix_ptr,  # [C_OUT, M, C]
    tiles,  # T // BLOCK_T + M
    trailing,  # S
    M: tl.constexpr,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    MINOR: tl.constexpr,
    DOT: tl.constexpr,
    UPCAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: row tiles x tiles of C_OUT. A program multiplies one expert's items by its block."""
    pid = tl.program_id(0)
    expert, first, end = find_tile(pid % tiles, offsets_ptr, trailing, M, BLOCK_M, BLOCK_T)
    if first < end:
        item = first + tl.arange(0, BLOCK_T)
        mask_t = (item < end)[:, None]
        _, _, base = item_offsets(item, trailing, C, MINOR)
        step = 1 if MINOR else trailing
        co = (pid // tiles) * BLOCK_CO + tl.arange(0, BLOCK_CO)
        mask_co = (co < C_OUT)[None, :]
        offs_w = co.to(tl.int64)[None, :] * (M * C) + expert * C

        product = tl.zeros([BLOCK_T, BLOCK_CO], dtype=COMPUTE)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            mask_x, mask_w = mask_t & (c < C)[None, :], mask_co & (c < C)[:, None]
            x = tl.load(outputs_ptr + base[:, None] + c[None, :] * step, mask=mask_x, other=0.0)
            w = tl.load(matrix_ptr + offs_w + c[:, None], mask=mask_w, other=0.0)
            product = tl.dot(
                operand(x, DOT, UPCAST),
                operand(w, DOT, UPCAST),
                product,
                input_precision=PRECISION,
                out_dtype=COMPUTE,
            )
        _, _, base = item_offsets(item, trailing, C_OUT, MINOR)
        offs_z = base[:, None] + co[None, :] * step
        tl.store(products_ptr + offs_z, product, mask=mask_t & mask_co)


@triton.jit(do_not_specialize=["num_samples", "partial_units"])
def _sum_rows(
    y_ptr,  # [N, L], L = C_OUT * S, written
    loss_ptr,  # [], written, or None
    products_ptr,  # [R, L]
    weights_ptr,  # [N, K]
    positions_ptr,  # [N, K]
    bias_ptr,  # [C_OUT] or None
    partials_ptr,  # [partial_units * PARTIALS] or None
    num_samples,
    length_units,
    trailing,
    partial_units,
    K: tl.constexpr,
    C_OUT: tl.constexpr,
    VEC: tl.constexpr,
    MINOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PARTIALS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid: tiles of [N, L]. A program adds its samples' K weighted products, j ascending. The
    first one also adds up the exploit loss's partial sums, which saves a launch."""
    length = length_units * VEC
    tiles = tl.cdiv(length, BLOCK_L)
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < num_samples
    offs_l = (pid % tiles) * BLOCK_L + tl.arange(0, BLOCK_L)
    mask = mask_n[:, None] & (offs_l < length)[None, :]
    y = tl.zeros([BLOCK_N, BLOCK_L], dtype=COMPUTE)
    for j in range(K):
        row = tl.load(positions_ptr + n * K + j, mask=mask_n, other=0).to(tl.int64)
        w = tl.load(weights_ptr + n * K + j, mask=mask_n, other=0.0).to(COMPUTE)
        z = tl.load(products_ptr + row[:, None] * length + offs_l[None, :], mask=mask, other=0.0)
        y += w[:, None] * z
    if bias_ptr is not None:
        co = offs_l % C_OUT if MINOR else offs_l // trailing
        y += tl.load(bias_ptr + co, mask=offs_l < length, other=0.0).to(COMPUTE)[None, :]
    tl.store(y_ptr + n[:, None] * length + offs_l[None, :], y, mask=mask)

    if partials_ptr is not None and pid == 0:
        sum_partials(loss_ptr, partials_ptr, partial_units, COMPUTE, PARTIALS, BLOCK_P)


def plan_forward(outputs, weights, positions, offsets, matrix, bias, dtype, partials) -> Plan:
    """y and, if there are ``partials``, their sum; ``dtype`` is of what is multiplied, and of y."""
    num_experts, (n, k) = offsets.numel() - 1, weights.shape
    num_rows, channels = outputs.shape[:2]
    c_out, trailing = matrix.shape[0], trailing_size(outputs)
    given = outputs, weights, positions, offsets, matrix, bias, dtype, partials
    y, loss = _fake(*given)
    if adds_in_place(outputs):
        return Plan((y, loss), [map_launch(y, loss, *given)])
    products = empty(outputs, num_rows, accumulator(dtype), c_out)
    minor = channels_minor(outputs)
    items = num_rows * trailing
    count = num_experts * row_tiles(items, num_experts)
    tile = tiles_for(count, None, c_out, channels, dtype)
    tiles = items // tile.high + num_experts
    multiply = Launch(
        _products,
        tiles * cdiv(c_out, tile.wide),
        products_ptr=products,
        outputs_ptr=outputs,
        offsets_ptr=offsets,
        matrix_ptr=matrix,
        tiles=tiles,
        trailing=trailing,
        M=num_experts,
        C=channels,
        C_OUT=c_out,
        MINOR=minor,
        **product_constants(dtype),
        BLOCK_M=next_power_of_2(num_experts),
        BLOCK_T=tile.high,
        BLOCK_CO=tile.wide,
        BLOCK_C=tile.deep,
    )
    length_units, vec = units(c_out * trailing)
    block_n, block_l = blocks(c_out * trailing)
    add = Launch(
        _sum_rows,
        cdiv(n, block_n) * cdiv(c_out * trailing, block_l),
        y_ptr=y,
        loss_ptr=None if partials is None else loss,
        products_ptr=products,
        weights_ptr=weights,
        positions_ptr=positions,
        bias_ptr=bias,
        partials_ptr=partials,
        num_samples=n,
        length_units=length_units,
        trailing=trailing,
        partial_units=0 if partials is None else partials.numel() // PARTIALS,
        K=k,
        C_OUT=c_out,
        VEC=vec,
        MINOR=minor,
        COMPUTE=TRITON_DTYPE[accumulator(dtype)],
        BLOCK_N=block_n,
        BLOCK_L=block_l,
        PARTIALS=PARTIALS,
        BLOCK_P=1024,
    )
    return Plan((y, loss), [multiply, add])


def _fake(outputs, weights, positions, offsets, matrix, bias, dtype, partials):
    return (
        empty(outputs, weights.shape[0], dtype, matrix.shape[0]),
        outputs.new_empty((0,) if partials is None else (), dtype=accumulator(dtype)),
    )


aggregate_forward = register(
    "aggregate_forward(Tensor outputs, Tensor weights, Tensor positions, Tensor offsets,"
    " Tensor matrix, Tensor? bias, ScalarType dtype, Tensor? partials)"
    " -> (Tensor y, Tensor loss)",
    plan_forward,
    _fake,
    settings=tf32_is_allowed,
)


def plan_with_loss(
    outputs, weights, positions, offsets, matrix, bias, dtype, rows, target, label_smoothing,
    ignore_index,
) -> Plan:  # fmt: skip
    """y, the exploit loss and the rows' logsumexp."""
    loss = plan_loss(outputs, rows, target, weights.shape[1], label_smoothing, ignore_index)
    partials, logsumexp, _ = loss.results
    joined = plan_forward(outputs, weights, positions, offsets, matrix, bias, dtype, partials)
    return Plan((*joined.results, logsumexp), [*loss.launches, *joined.launches])


def _with_loss_fake(
    outputs, weights, positions, offsets, matrix, bias, dtype, rows, target, *smoothing
):
    y, loss = _fake(outputs, weights, positions, offsets, matrix, bias, dtype, target)
    items = outputs.shape[0], trailing_size(outputs)
    return y, loss, outputs.new_empty(items, dtype=accumulator(outputs.dtype))


aggregate_with_loss_forward = register(
    "aggregate_with_loss_forward(Tensor outputs, Tensor weights, Tensor positions, Tensor offsets,"
    " Tensor matrix, Tensor? bias, ScalarType dtype, Tensor rows, Tensor target,"
    " float label_smoothing, int ignore_index) -> (Tensor y, Tensor loss, Tensor logsumexp)",
    plan_with_loss,
    _with_loss_fake,
    settings=tf32_is_allowed,
)


class _Aggregate(torch.autograd.Function):
    """With a target, the exploit loss comes along: one backward for both (fused_loss.py). With a
    temperature, the router's loss, too."""

    @staticmethod
    def forward(
        ctx, outputs, weights, matrix, bias, rows, positions, offsets, dtype, target, temperature,
        *smoothing,
    ):  # fmt: skip
        outputs, weights, matrix = settle(outputs), weights.contiguous(), matrix.contiguous()
        joining = outputs, weights, positions, offsets, matrix, bias, dtype
        logsumexp = gradient = None
        router = ()
        if target is None:
            y, _ = aggregate_forward(*joining, None)
        elif temperature is None:
            y, loss, logsumexp = aggregate_with_loss_forward(*joining, rows, target, *smoothing)
        else:
            partials, logsumexp, losses = exploit_loss_forward(
                outputs, rows, target, weights.shape[1], *smoothing, True
            )
            *router, gradient = supervise(losses, weights, positions, temperature)
            y, loss = aggregate_forward(*joining, partials)
        ctx.save_for_backward(
            outputs, weights, rows, offsets, matrix, bias, logsumexp, target, gradient
        )
        ctx.dtype, ctx.smoothing = dtype, smoothing
        return y if target is None else (y, loss, *router)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_loss=None, d_router=None):
        *saved, bias, logsumexp, target, gradient = ctx.saved_tensors
        for_outputs, for_weights, for_matrix, for_bias, *_ = ctx.needs_input_grad
        d_outputs, d_weights, d_matrix, d_bias = aggregate_backward(
            d_y, *saved, ctx.dtype, bias.dtype if for_bias else None,
            for_outputs or for_weights, for_matrix or for_bias,
            d_loss, logsumexp, target, *ctx.smoothing,
        )  # fmt: skip
        if for_weights:
            d_weights = add_router_gradient(d_weights, gradient, d_router)
        return (
            d_outputs if for_outputs else None,
            d_weights if for_weights else None,
            d_matrix if for_matrix else None,
            d_bias if for_bias else None,
            None, None, None, None, None, None, None, None,
        )  # fmt: skip


def linear(concat: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` over dimension 1 of ``concat``, in its dtype, or autocast's where it is on."""
    matrix = matrix.to(concat.dtype)
    bias = None if bias is None else bias.to(concat.dtype)
    if concat.dim() == 2:
        return F.linear(concat, matrix, bias)
    if is_channels_last(concat):
        return F.linear(concat.movedim(1, -1), matrix, bias).movedim(-1, 1)
    y = torch.matmul(matrix, concat.flatten(2))
    y = y if bias is None else y + bias.to(y.dtype)[:, None]  # autocast's, as of F.linear
    return y.unflatten(2, concat.shape[2:])


def apply_grouped(
    outputs: Tensor,
    weights: Tensor,
    plan: RowPlan,
    matrix: Tensor,
    bias: Tensor | None,
    target: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    temperature: float | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """The grouped form; with a target the exploit loss, with a temperature the router's, too."""
    return apply(
        _Aggregate,
        outputs,
        weights,
        matrix,
        bias,
        plan.rows.contiguous(),
        plan.positions.contiguous(),
        plan.offsets.contiguous(),
        product_dtype(outputs),
        None if target is None else target.contiguous(),
        None if temperature is None else float(temperature),
        float(label_smoothing),
        ignore_index,
    )


def aggregate(
    outputs: Tensor,
    weights: Tensor,
    plan: RowPlan,
    matrix: Tensor,
    bias: Tensor | None,
    grouped: bool | None = None,
) -> Tensor:
    """The linear aggregator on rows: ``F.linear(combine(outputs), matrix, bias)``.

    Args:
        outputs: [R, C] or [R, C, ...] (maps: linear over dimension 1) float16, bfloat16 or
            float32 (float64 too under the interpreter), contiguous or channels last.
        weights, plan: as for ``combine``.
        matrix: [C_OUT, M*C], bias: [C_OUT] or None; of any float dtype.
        grouped: True for the grouped form (two launches forward, one of maps; two backward, or more
            where few experts get many rows), False for combine and a dense product, None for
            whichever ``choose_grouped`` says.

    Returns:
        [N, C_OUT, ...] in the dtype of ``outputs``, or autocast's where autocast is on, and in
        their layout. Products are of that dtype, sums float32 (float64 for float64). float32
        products use tf32 only if ``torch.backends.cuda.matmul.allow_tf32``. Differentiable in
        outputs, weights, matrix and bias; no atomics, the same bits each time.
    """
    if grouped is None:
        grouped = choose_grouped(outputs, weights, plan, matrix)
    if not grouped:
        return linear(combine(outputs, weights, plan), matrix, bias)
    return apply_grouped(outputs, weights, plan, matrix, bias)
