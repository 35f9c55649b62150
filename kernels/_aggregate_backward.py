"""Backward of aggregate (whose formulas are in aggregate.py): rows and weights, matrix and bias.

Two launches, no atomics: each element of each gradient belongs to one program, which sums in a
fixed order. The exploit loss's gradient is added to the rows' while a row is at hand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import cdiv, next_power_of_2, register
from ._grouped import (
    find_tile,
    item_slot,
    operand,
    product_constants,
    sample_offsets,
    splits_for,
    tiles_for,
)
from ._outputs import (
    Launch,
    accumulator,
    blocks,
    channels_minor,
    dense,
    is_channels_last,
    item_offsets,
    launching,
    trailing_size,
    units,
)
from .exploit_loss import loss_gradient


@triton.jit
def _backward_rows(
    d_outputs_ptr,  # [R, C, S] or [R, S, C], written
    d_weights_ptr,  # [N, K], written
    d_y_ptr,  # [N, C_OUT, S] or [N, S, C_OUT]
    products_ptr,  # [R, C_OUT, S] or [R, S, C_OUT]
    outputs_ptr,  # [R, C, S] or [R, S, C]
    weights_ptr,  # [N, K]
    rows_ptr,  # [R]
    offsets_ptr,  # [M + 1]
    matrix_ptr,  # [C_OUT, M, C]
    d_loss_ptr,  # [], or None without the loss, as the two below
    logsumexp_ptr,  # [R, S]
    target_ptr,  # [N, S]
    num_rows,
    tiles,
    trailing,
    length_units,  # of L = C_OUT * S
    divisor,  # N * S
    ignore_index,
    M: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    VEC: tl.constexpr,
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
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Grid: row tiles x tiles of C, then blocks of rows. The first kind writes a tile of d_outputs,
    the loss's gradient added; the second takes <d_y, products> of BLOCK_R rows for d_weights."""
    pid = tl.program_id(0)
    tiled: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    if pid < tiles * tiled:
        expert, first, end = find_tile(pid % tiles, offsets_ptr, trailing, M, BLOCK_M, BLOCK_T)
        if first < end:
            item = first + tl.arange(0, BLOCK_T)
            mask_t = item < end
            row, s, base = item_offsets(item, trailing, C, MINOR)
            slot = item_slot(rows_ptr, row, mask_t, EVEN)
            base_y = sample_offsets(slot // K, s, trailing, C_OUT, MINOR)
            step = 1 if MINOR else trailing
            c = (pid // tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
            offs_w = (expert * C + c)[None, :]

            g = tl.zeros([BLOCK_T, BLOCK_C], dtype=COMPUTE)
            for start in range(0, C_OUT, BLOCK_CO):
                co = start + tl.arange(0, BLOCK_CO)
                mask_y = mask_t[:, None] & (co < C_OUT)[None, :]
                mask_w = (co < C_OUT)[:, None] & (c < C)[None, :]
                d_y = tl.load(
                    d_y_ptr + base_y[:, None] + co[None, :] * step, mask=mask_y, other=0.0
                )
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
            weight = tl.load(weights_ptr + slot, mask=mask_t, other=0.0).to(COMPUTE)
            d_x = weight[:, None] * g
            if d_loss_ptr is not None:
                x = tl.load(outputs_ptr + offs_x, mask=mask, other=0.0).to(COMPUTE)
                lse = tl.load(logsumexp_ptr + item, mask=mask_t, other=0.0)[:, None]
                offs_target = slot // K * trailing + s
                target = tl.load(target_ptr + offs_target, mask=mask_t, other=0)[:, None]
                scale = tl.load(d_loss_ptr).to(COMPUTE) / divisor
                d_x += scale * loss_gradient(x, lse, target, c[None, :], ignore_index, C, SMOOTHING)
            tl.store(d_outputs_ptr + offs_x, d_x, mask=mask)
    else:
        length = length_units * VEC
        block = pid - tiles * tiled
        row = block.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = row < num_rows
        slot = tl.load(rows_ptr + row, mask=mask_r, other=0).to(tl.int64)
        dot = tl.zeros([BLOCK_R, BLOCK_L], dtype=COMPUTE)
        for start in range(0, length, BLOCK_L):
            offs_l = start + tl.arange(0, BLOCK_L)
            mask = mask_r[:, None] & (offs_l < length)[None, :]
            d_y = tl.load(
                d_y_ptr + (slot // K)[:, None] * length + offs_l[None, :], mask=mask, other=0.0
            ).to(COMPUTE)
            z = tl.load(
                products_ptr + row[:, None] * length + offs_l[None, :], mask=mask, other=0.0
            )
            dot += d_y * z
        tl.store(d_weights_ptr + slot, tl.sum(dot, axis=1), mask=mask_r)


@triton.jit
def _bias_share(
    d_bias_ptr,  # [C_OUT] of this share, written
    d_y_ptr,
    co,
    split,
    num_sample_items,
    trailing,
    C_OUT: tl.constexpr,
    SPLITS: tl.constexpr,
    MINOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_CO: tl.constexpr,
):
    """The sum of d_y over a share of the samples' items, for the channels ``co``."""
    share = tl.cdiv(num_sample_items, SPLITS * BLOCK_T) * BLOCK_T
    begin = split.to(tl.int64) * share
    end = tl.minimum(num_sample_items, begin + share)
    total = tl.zeros([BLOCK_CO, BLOCK_T], dtype=COMPUTE)
    for start in range(begin, end, BLOCK_T):
        item = start + tl.arange(0, BLOCK_T)
        _, _, base = item_offsets(item, trailing, C_OUT, MINOR)
        offs_y = base[None, :] + co[:, None] * (1 if MINOR else trailing)
        mask = (co < C_OUT)[:, None] & (item < end)[None, :]
        total += tl.load(d_y_ptr + offs_y, mask=mask, other=0.0).to(COMPUTE)
    tl.store(d_bias_ptr + co, tl.sum(total, axis=1), mask=co < C_OUT)


@triton.jit
def _backward_matrix(
    d_matrix_ptr,  # [SPLITS, C_OUT, M, C], written
    d_bias_ptr,  # [SPLITS, C_OUT], written, or None
    d_y_ptr,  # [N, C_OUT, S] or [N, S, C_OUT]
    outputs_ptr,  # [R, C, S] or [R, S, C]
    weights_ptr,  # [N, K]
    rows_ptr,  # [R]
    offsets_ptr,  # [M + 1]
    num_sample_items,  # N * S
    trailing,
    M: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    SPLITS: tl.constexpr,
    MINOR: tl.constexpr,
    EVEN: tl.constexpr,  # S is a multiple of 16
    DOT: tl.constexpr,
    UPCAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: SPLITS x experts x tiles of [C_OUT, C]. A program walks over its share of an expert's
    items and writes its tile, zeros for an expert without rows; those of expert 0's
    first tiles of C add up the bias's gradient too."""
    tiled_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tiled_co: tl.constexpr = (C_OUT + BLOCK_CO - 1) // BLOCK_CO
    pid = tl.program_id(0)
    c_tile = pid % tiled_c
    c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    co = (pid // tiled_c) % tiled_co * BLOCK_CO + tl.arange(0, BLOCK_CO)
    expert = pid // (tiled_c * tiled_co) % M
    split = pid // (tiled_c * tiled_co * M)
    step = 1 if MINOR else trailing

    begin = tl.load(offsets_ptr + expert).to(tl.int64) * trailing
    end = tl.load(offsets_ptr + expert + 1).to(tl.int64) * trailing
    share = tl.cdiv(end - begin, SPLITS * BLOCK_T) * BLOCK_T
    begin += split * share
    end = tl.minimum(end, begin + share)
    d_w = tl.zeros([BLOCK_CO, BLOCK_C], dtype=COMPUTE)
    for start in range(begin, end, BLOCK_T):
        item = start + tl.arange(0, BLOCK_T)
        mask_t = item < end
        row, s, base = item_offsets(item, trailing, C, MINOR)
        slot = item_slot(rows_ptr, row, mask_t, EVEN)
        weight = tl.load(weights_ptr + slot, mask=mask_t, other=0.0).to(COMPUTE)
        base_y = sample_offsets(slot // K, s, trailing, C_OUT, MINOR)
        mask_y, mask_x = (co < C_OUT)[:, None] & mask_t[None, :], mask_t[:, None] & (c < C)[None, :]
        d_y = tl.load(d_y_ptr + base_y[None, :] + co[:, None] * step, mask=mask_y, other=0.0)
        x = tl.load(outputs_ptr + base[:, None] + c[None, :] * step, mask=mask_x, other=0.0)
        d_w = tl.dot(
            operand(d_y.to(COMPUTE) * weight[None, :], DOT, UPCAST),
            operand(x, DOT, UPCAST),
            d_w,
            input_precision=PRECISION,
            out_dtype=COMPUTE,
        )
    line = (split * C_OUT + co).to(tl.int64)
    offs_w = line[:, None] * (M * C) + (expert * C + c)[None, :]
    tl.store(d_matrix_ptr + offs_w, d_w, mask=(co < C_OUT)[:, None] & (c < C)[None, :])

    if d_bias_ptr is not None and (expert == 0 and c_tile == 0):
        _bias_share(
            d_bias_ptr + split * C_OUT,
            d_y_ptr,
            co,
            split,
            num_sample_items,
            trailing,
            C_OUT,
            SPLITS,
            MINOR,
            COMPUTE,
            BLOCK_T,
            BLOCK_CO,
        )


def plan_rows(
    d_y,
    products,
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
):
    """d_outputs and d_weights; ``dtype`` is the products', d_loss None for no exploit loss."""
    num_experts, k = offsets.numel() - 1, weights.shape[1]
    num_rows, channels = outputs.shape[:2]
    c_out, trailing = matrix.shape[0], trailing_size(outputs)
    items = num_rows * trailing
    tile = tiles_for(num_experts, cdiv(items, num_experts), channels, c_out, dtype)
    tiles = items // tile.high + num_experts
    length = c_out * trailing
    length_units, vec = units(length)
    block_r, block_l = blocks(num_rows, length)
    d_outputs, d_weights = torch.empty_like(outputs), torch.empty_like(weights)
    launch = Launch(
        _backward_rows,
        tiles * cdiv(channels, tile.wide) + cdiv(num_rows, block_r),
        d_outputs_ptr=d_outputs,
        d_weights_ptr=d_weights,
        d_y_ptr=dense(d_y, is_channels_last(outputs)),
        products_ptr=products,
        outputs_ptr=outputs,
        weights_ptr=weights,
        rows_ptr=rows,
        offsets_ptr=offsets,
        matrix_ptr=matrix,
        d_loss_ptr=d_loss,
        logsumexp_ptr=logsumexp,
        target_ptr=target,
        num_rows=num_rows,
        tiles=tiles,
        trailing=trailing,
        length_units=length_units,
        divisor=num_rows // k * trailing,
        ignore_index=ignore_index,
        M=num_experts,
        K=k,
        C=channels,
        C_OUT=c_out,
        VEC=vec,
        MINOR=channels_minor(outputs),
        EVEN=trailing % 16 == 0,
        SMOOTHING=label_smoothing,
        **product_constants(dtype),
        BLOCK_M=next_power_of_2(num_experts),
        BLOCK_T=tile.high,
        BLOCK_CO=tile.deep,
        BLOCK_C=tile.wide,
        BLOCK_R=block_r,
        BLOCK_L=block_l,
    )
    return (d_outputs, d_weights), launch


def plan_matrix(d_y, outputs, weights, rows, offsets, matrix, dtype, bias_dtype):
    """Shares of d_matrix [SPLITS, C_OUT, M*C] and of d_bias [SPLITS, C_OUT] (None for no bias)."""
    num_experts, k = offsets.numel() - 1, weights.shape[1]
    num_rows, channels = outputs.shape[:2]
    c_out, trailing = matrix.shape[0], trailing_size(outputs)
    items = num_rows * trailing
    tile = tiles_for(num_experts, c_out, channels, cdiv(items, num_experts), dtype)
    programs = num_experts * cdiv(c_out, tile.high) * cdiv(channels, tile.wide)
    splits = splits_for(programs, items, num_experts)
    shares = accumulator(dtype)  # rounded to the gradient's dtype once, after they are added up
    d_matrix, d_bias = (
        None if final is None else matrix.new_empty(size, dtype=final if splits == 1 else shares)
        for size, final in (
            ((splits, *matrix.shape), matrix.dtype),
            ((splits, c_out), bias_dtype),
        )
    )
    launch = Launch(
        _backward_matrix,
        programs * splits,
        d_matrix_ptr=d_matrix,
        d_bias_ptr=d_bias,
        d_y_ptr=dense(d_y, is_channels_last(outputs)),
        outputs_ptr=outputs,
        weights_ptr=weights,
        rows_ptr=rows,
        offsets_ptr=offsets,
        num_sample_items=items // k,
        trailing=trailing,
        M=num_experts,
        K=k,
        C=channels,
        C_OUT=c_out,
        SPLITS=splits,
        MINOR=channels_minor(outputs),
        EVEN=trailing % 16 == 0,
        **product_constants(dtype),
        BLOCK_T=tile.deep,
        BLOCK_CO=tile.high,
        BLOCK_C=tile.wide,
    )
    return (d_matrix, d_bias), launch


def _matrix(d_y, outputs, weights, rows, offsets, matrix, dtype, bias_dtype):
    (d_matrix, d_bias), launch = plan_matrix(
        d_y, outputs, weights, rows, offsets, matrix, dtype, bias_dtype
    )
    launch()
    if d_bias is None:
        d_bias, bias_dtype = matrix.new_empty((1, 0)), matrix.dtype
    if len(d_matrix) > 1:
        d_matrix, d_bias = (shares.sum(0, keepdim=True) for shares in (d_matrix, d_bias))
    return d_matrix[0].to(matrix.dtype), d_bias[0].to(bias_dtype)


def _matrix_fake(d_y, outputs, weights, rows, offsets, matrix, dtype, bias_dtype):
    size = 0 if bias_dtype is None else matrix.shape[0]
    return torch.empty_like(matrix), matrix.new_empty(size, dtype=bias_dtype or matrix.dtype)


backward_rows = register(
    "aggregate_backward_rows(Tensor d_y, Tensor products, Tensor outputs, Tensor weights,"
    " Tensor rows, Tensor offsets, Tensor matrix, ScalarType dtype, Tensor? d_loss,"
    " Tensor? logsumexp, Tensor? target, float label_smoothing, int ignore_index)"
    " -> (Tensor d_outputs, Tensor d_weights)",
    launching(plan_rows),
    lambda d_y, products, outputs, weights, *_: (
        torch.empty_like(outputs),
        torch.empty_like(weights),
    ),
)
backward_matrix = register(
    "aggregate_backward_matrix(Tensor d_y, Tensor outputs, Tensor weights, Tensor rows,"
    " Tensor offsets, Tensor matrix, ScalarType dtype, ScalarType? bias_dtype)"
    " -> (Tensor d_matrix, Tensor d_bias)",
    _matrix,
    _matrix_fake,
)
