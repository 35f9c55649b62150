"""Backward of aggregate towards the matrix: d_matrix, d_bias, and the sums that make d_weights.

    d_W_i = sum over rows of i of w[n, j] * d_y[n] outputs[r]^T        d_bias = sum_n d_y[n]

No atomics: each element belongs to one program, which sums in a fixed order. d_weights comes along
because the launch before left it in parts (_aggregate_rows.py), too few numbers for a launch.

Shapes as in aggregate.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import accumulator, cdiv
from ._grouped import (
    NARROWEST,
    backward_arguments,
    item_slot,
    operand,
    sample_offsets,
    splits_for,
    tiles_for,
)
from ._launch import Launch, Plan
from ._layout import blocks, item_offsets, trailing_size


@triton.jit
def _store_share(final_ptr, shares_ptr, begin, offsets, value, mask, splits):
    """The whole sum to ``final_ptr``, rounded once, or one of several shares behind ``begin``."""
    if splits == 1:
        tl.store(final_ptr + offsets, value, mask=mask)
    else:
        tl.store(shares_ptr + begin + offsets, value, mask=mask)


@triton.jit
def _bias_sum(
    d_y_ptr,
    co,
    split,
    splits,
    num_samples,
    trailing,
    C_OUT: tl.constexpr,
    MINOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_CO: tl.constexpr,
):
    """The sum of d_y over a share of the samples' items, for the channels ``co``."""
    num_items = num_samples.to(tl.int64) * trailing
    share = tl.cdiv(num_items, splits * BLOCK_T) * BLOCK_T
    begin = split * share
    end = tl.minimum(num_items, begin + share)
    total = tl.zeros([BLOCK_CO, BLOCK_T], dtype=COMPUTE)
    for start in range(begin, end, BLOCK_T):
        item = start + tl.arange(0, BLOCK_T)
        _, _, base = item_offsets(item, trailing, C_OUT, MINOR)
        offs_y = base[None, :] + co[:, None] * (1 if MINOR else trailing)
        mask = (co < C_OUT)[:, None] & (item < end)[None, :]
        total += tl.load(d_y_ptr + offs_y, mask=mask, other=0.0).to(COMPUTE)
    return tl.sum(total, axis=1)


@triton.jit
def _sum_dots(
    d_weights_ptr,  # [N, K], written
    dots_ptr,  # [N, K, L]
    block,
    num_rows,
    num_dots,  # L
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """d_weights of BLOCK_R slots."""
    slot = block.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = slot < num_rows
    total = tl.zeros([BLOCK_R, BLOCK_L], dtype=COMPUTE)
    for start in range(0, num_dots, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        mask = mask_r[:, None] & (offs_l < num_dots)[None, :]
        offsets = slot[:, None] * num_dots + offs_l[None, :]
        total += tl.load(dots_ptr + offsets, mask=mask, other=0.0)
    tl.store(d_weights_ptr + slot, tl.sum(total, axis=1), mask=mask_r)


@triton.jit(do_not_specialize=["num_samples", "num_rows", "num_dots", "splits"])
def _backward_matrix(
    d_matrix_ptr,  # [C_OUT, M, C], written if splits is 1
    d_bias_ptr,  # [C_OUT], as d_matrix, or None
    matrix_shares_ptr,  # [splits, C_OUT, M, C], written if splits is more
    bias_shares_ptr,  # [splits, C_OUT], as matrix_shares, or None
    d_weights_ptr,  # [N, K], written, or None
    dots_ptr,  # [N, K, L], or None as d_weights
    d_y_ptr,  # [N, C_OUT, S] or [N, S, C_OUT]
    outputs_ptr,  # [R, C, S] or [R, S, C]
    weights_ptr,  # [N, K]
    rows_ptr,  # [R]
    offsets_ptr,  # [M + 1]
    num_samples,
    num_rows,
    num_dots,  # L
    splits,
    trailing,
    M: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    MINOR: tl.constexpr,
    EVEN: tl.constexpr,  # S is a multiple of 16
    DOT: tl.constexpr,
    UPCAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Grid: splits x experts x tiles of [C_OUT, C], then blocks of slots if there are dots. A
    program of the first kind walks over its share of an expert's items and writes its tile, zeros
    for an expert without rows; those of expert 0's first tiles of C add up the bias's gradient too.
    The second kind sums d_weights."""
    tiled_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tiled_co: tl.constexpr = (C_OUT + BLOCK_CO - 1) // BLOCK_CO
    pid = tl.program_id(0)
    programs = splits * (M * tiled_c * tiled_co)
    if pid < programs:
        c_tile = pid % tiled_c
        c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
        co = (pid // tiled_c) % tiled_co * BLOCK_CO + tl.arange(0, BLOCK_CO)
        expert = pid // (tiled_c * tiled_co) % M
        split = pid // (tiled_c * tiled_co * M)
        step = 1 if MINOR else trailing

        begin = tl.load(offsets_ptr + expert).to(tl.int64) * trailing
        end = tl.load(offsets_ptr + expert + 1).to(tl.int64) * trailing
        share = tl.cdiv(end - begin, splits * BLOCK_T) * BLOCK_T
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
            mask_y, mask_x = (
                (co < C_OUT)[:, None] & mask_t[None, :],
                mask_t[:, None] & (c < C)[None, :],
            )
            d_y = tl.load(d_y_ptr + base_y[None, :] + co[:, None] * step, mask=mask_y, other=0.0)
            x = tl.load(outputs_ptr + base[:, None] + c[None, :] * step, mask=mask_x, other=0.0)
            d_w = tl.dot(
                operand(d_y.to(COMPUTE) * weight[None, :], DOT, UPCAST),
                operand(x, DOT, UPCAST),
                d_w,
                input_precision=PRECISION,
                out_dtype=COMPUTE,
            )
        mask_co = co < C_OUT
        offs_w = co.to(tl.int64)[:, None] * (M * C) + (expert * C + c)[None, :]
        mask = mask_co[:, None] & (c < C)[None, :]
        begin = split.to(tl.int64) * (C_OUT * M * C)
        _store_share(d_matrix_ptr, matrix_shares_ptr, begin, offs_w, d_w, mask, splits)
        if d_bias_ptr is not None and (expert == 0 and c_tile == 0):
            d_b = _bias_sum(
                d_y_ptr, co, split, splits, num_samples, trailing, C_OUT, MINOR, COMPUTE,
                BLOCK_T, BLOCK_CO,
            )  # fmt: skip
            _store_share(d_bias_ptr, bias_shares_ptr, split * C_OUT, co, d_b, mask_co, splits)
    elif dots_ptr is not None:
        _sum_dots(
            d_weights_ptr, dots_ptr, pid - programs, num_rows, num_dots, COMPUTE, BLOCK_R, BLOCK_L
        )


def plan_backward_matrix(
    d_y, outputs, weights, rows, offsets, matrix, dtype, bias_dtype, dots
) -> Plan:
    """d_matrix, shares of it, d_bias, shares of it, d_weights.

    Few experts with many rows each are cut into several shares [splits, ...], which remain to be
    added up; of a gradient and its shares the one that is not written is empty. ``bias_dtype``
    None: no d_bias. ``dots`` as ``plan_backward_rows`` leaves them; None: no d_weights.
    """
    num_experts, k = offsets.numel() - 1, weights.shape[1]
    num_rows, channels = outputs.shape[:2]
    c_out, trailing = matrix.shape[0], trailing_size(outputs)
    items = num_rows * trailing
    tile = tiles_for(num_experts, c_out, channels, None, dtype)
    programs = num_experts * cdiv(c_out, tile.high) * cdiv(channels, tile.wide)
    splits = splits_for(programs, items, num_experts)

    def gradient(shape, final):
        """One whole, or shares that are rounded to its dtype once, after they are added up."""
        if final is None:
            return None, None
        whole = matrix.new_empty(shape if splits == 1 else 0, dtype=final)
        size = 0 if splits == 1 else (splits, *shape)
        return whole, matrix.new_empty(size, dtype=accumulator(dtype))

    d_matrix, d_bias = gradient(matrix.shape, matrix.dtype), gradient((c_out,), bias_dtype)
    d_weights = None if dots is None else torch.empty_like(weights)
    # Fits the dots of any tiles.
    block_r, block_l = blocks(cdiv(channels, NARROWEST) * trailing)
    launch = Launch(
        _backward_matrix,
        programs * splits + (0 if dots is None else cdiv(num_rows, block_r)),
        d_matrix_ptr=d_matrix[0],
        d_bias_ptr=d_bias[0],
        matrix_shares_ptr=d_matrix[1],
        bias_shares_ptr=d_bias[1],
        d_weights_ptr=d_weights,
        dots_ptr=dots,
        **backward_arguments(d_y, outputs, weights, rows, offsets, matrix, dtype),
        num_samples=num_rows // k,
        num_rows=num_rows,
        num_dots=0 if dots is None else dots[0, 0].numel(),
        splits=splits,
        BLOCK_T=tile.deep,
        BLOCK_CO=tile.high,
        BLOCK_C=tile.wide,
        BLOCK_R=block_r,
        BLOCK_L=block_l,
    )
    return Plan((*d_matrix, *d_bias, d_weights), [launch])
