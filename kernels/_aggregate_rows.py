"""Backward of aggregate towards the rows: d_outputs, and what d_weights is summed from.

With g[r] = W_i^T d_y[n] a tile of d_outputs is w * g, the exploit loss's gradient added while the
row is at hand, and d_w[n, j] = <d_y[n], W_i outputs[r]> is <g[r], outputs[r]>: the forward's
products need not be kept. A program has only its own channels of g, so it leaves their share of
that dot product; the matrix's launch adds the shares up in a fixed order (_aggregate_matrix.py).

Shapes as in aggregate.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import accumulator, cdiv, next_power_of_2
from ._cross_entropy import loss_gradient
from ._grouped import (
    NARROWEST,
    backward_arguments,
    find_tile,
    item_slot,
    operand,
    row_tiles,
    sample_offsets,
    tiles_for,
)
from ._launch import Launch, Plan
from ._layout import item_offsets, trailing_size


@triton.jit(do_not_specialize=["tiles", "divisor"])
def _backward_rows(
    d_outputs_ptr,  # [R, C, S] or [R, S, C], written
    dots_ptr,  # [N, K, tiles of C, S], written
    d_y_ptr,  # [N, C_OUT, S] or [N, S, C_OUT]
    outputs_ptr,  # [R, C, S] or [R, S, C]
    weights_ptr,  # [N, K]
    rows_ptr,  # [R]
    offsets_ptr,  # [M + 1]
    matrix_ptr,  # [C_OUT, M, C]
    d_loss_ptr,  # [], or None without the loss, as the two below
    logsumexp_ptr,  # [R, S]
    target_ptr,  # [N, S]
    tiles,
    trailing,
    divisor,  # N * S
    ignore_index,
    M: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    MINOR: tl.constexpr,
    EVEN: tl.constexpr,  # S is a multiple of 16
    SMOOTHING: tl.constexpr,
    DOT: tl.constexpr,
    UPCAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: row tiles x tiles of C. A program writes a tile of d_outputs, and for each of its items
    the dot product of g and the outputs over its channels."""
    pid = tl.program_id(0)
    expert, first, end = find_tile(pid % tiles, offsets_ptr, trailing, M, BLOCK_M, BLOCK_T)
    if first < end:
        item = first + tl.arange(0, BLOCK_T)
        mask_t = item < end
        row, s, base = item_offsets(item, trailing, C, MINOR)
        slot = item_slot(rows_ptr, row, mask_t, EVEN)
        base_y = sample_offsets(slot // K, s, trailing, C_OUT, MINOR)
        step = 1 if MINOR else trailing
        c_tile = pid // tiles
        c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
        offs_w = (expert * C + c)[None, :]

        g = tl.zeros([BLOCK_T, BLOCK_C], dtype=COMPUTE)
        for start in range(0, C_OUT, BLOCK_CO):
            co = start + tl.arange(0, BLOCK_CO)
            mask_y = mask_t[:, None] & (co < C_OUT)[None, :]
            mask_w = (co < C_OUT)[:, None] & (c < C)[None, :]
            d_y = tl.load(d_y_ptr + base_y[:, None] + co[None, :] * step, mask=mask_y, other=0.0)
            w = tl.load(
                matrix_ptr + co.to(tl.int64)[:, None] * (M * C) + offs_w, mask=mask_w, other=0.0
            )
            g = tl.dot(
                operand(d_y, DOT, UPCAST),
                operand(w, DOT, UPCAST),
                g,
                input_precision=PRECISION,
                out_dtype=COMPUTE,
            )
        mask = mask_t[:, None] & (c < C)[None, :]
        offs_x = base[:, None] + c[None, :] * step
        x = tl.load(outputs_ptr + offs_x, mask=mask, other=0.0).to(COMPUTE)
        offs_dot = (slot * ((C + BLOCK_C - 1) // BLOCK_C) + c_tile) * trailing + s
        # A bare product would be contracted with the sum's first addition, x*g + neighbour's, which
        # is rounded otherwise on each of the two sides: lanes that should agree would not. This
        # mask (all of it is 0 there anyway) keeps them apart, and costs no registers.
        products = tl.where(mask_t[:, None], g * x, 0.0)
        tl.store(dots_ptr + offs_dot, tl.sum(products, axis=1), mask=mask_t)

        weight = tl.load(weights_ptr + slot, mask=mask_t, other=0.0).to(COMPUTE)
        d_x = weight[:, None] * g
        if d_loss_ptr is not None:
            lse = tl.load(logsumexp_ptr + item, mask=mask_t, other=0.0)[:, None]
            offs_target = slot // K * trailing + s
            target = tl.load(target_ptr + offs_target, mask=mask_t, other=0)[:, None]
            scale = tl.load(d_loss_ptr).to(COMPUTE) / divisor
            d_x += scale * loss_gradient(x, lse, target, c[None, :], ignore_index, C, SMOOTHING)
        tl.store(d_outputs_ptr + offs_x, d_x, mask=mask)


def has_dots(outputs: torch.Tensor) -> bool:
    """Whether d_weights is a sum of dots, or one dot each whatever the tiles are."""
    return outputs.shape[1] > NARROWEST or trailing_size(outputs) > 1


def plan_backward_rows(
    d_y,
    outputs,
    weights,
    rows,
    offsets,
    matrix,
    dtype,
    d_loss,
    logsumexp,
    target,
    label_smoothing,
    ignore_index,
) -> Plan:
    """d_outputs, and the dots [N, K, tiles of C, S] whose sum over the last two is d_weights.

    Unless ``has_dots``, they are d_weights itself, of its dtype. ``dtype`` is the products', d_loss
    None for no exploit loss.
    """
    num_experts, (n, k) = offsets.numel() - 1, weights.shape
    num_rows, channels = outputs.shape[:2]
    c_out, trailing = matrix.shape[0], trailing_size(outputs)
    items = num_rows * trailing
    products = num_experts * row_tiles(items, num_experts)
    tile = tiles_for(products, None, channels, c_out, dtype)
    tiles, tiles_c = items // tile.high + num_experts, cdiv(channels, tile.wide)
    if has_dots(outputs):
        dots = weights.new_empty((n, k, tiles_c, trailing), dtype=accumulator(dtype))
    else:
        dots = torch.empty_like(weights)
    d_outputs = torch.empty_like(outputs)
    launch = Launch(
        _backward_rows,
        tiles * tiles_c,
        d_outputs_ptr=d_outputs,
        dots_ptr=dots,
        **backward_arguments(d_y, outputs, weights, rows, offsets, matrix, dtype),
        matrix_ptr=matrix,
        d_loss_ptr=d_loss,
        logsumexp_ptr=logsumexp,
        target_ptr=target,
        tiles=tiles,
        divisor=num_rows // k * trailing,
        ignore_index=ignore_index,
        SMOOTHING=label_smoothing,
        BLOCK_M=next_power_of_2(num_experts),
        BLOCK_T=tile.high,
        BLOCK_CO=tile.deep,
        BLOCK_C=tile.wide,
        # g, the outputs and d_outputs of a large tile are 250 registers a thread for 4 warps.
        num_warps=8 if tile.high * tile.wide > 4096 else 4,
    )
    return Plan((d_outputs, dots), [launch])
