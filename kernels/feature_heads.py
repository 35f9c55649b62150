"""feature_heads: linear heads on features that lie there, each row by its own expert's head.

    out[r] = W_i f_i[number of r's sample] + b_i          i the expert of row r
    d_W_i = sum over rows r of i of d_out[r] f_i[number]^T        d_b_i = sum of d_out[r]

One launch forward and one backward, however many experts there are: features are read by number
where they lie, so nothing is gathered, and features get no gradient. An expert has a few rows of a
batch, so that its weights are what is read: row tiles are small, and each reads a head once. No
atomics: each element of a gradient belongs to one program, which sums in the order of the rows.

Experts differ in D, so features are flat, and ``table`` says where each expert's part starts. So
are parameters: all weights [C, D_i], one behind the other, then the biases [M, C]. What all D have
in common (VEC) is known when compiling, so that loads are wide.

Shapes: N samples, M experts, K active experts per sample, R = N*K rows, C outputs, D_i features.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, next_power_of_2
from ._grouped import find_tile, operand, product_constants, tf32_is_allowed
from ._launch import Launch, Plan, apply, once_differentiable, register

_FEW_ROWS = 32  # per expert: below, tiles of 16 rows, as small as a product's can be
_DEEP = 64  # tiles of D


@triton.jit
def _place(table_ptr, expert, M: tl.constexpr, VEC: tl.constexpr):
    """Where an expert's features and its weights start, and D."""
    features = tl.load(table_ptr + expert)
    weights = tl.load(table_ptr + M + expert)
    width = tl.load(table_ptr + 2 * M + expert)
    return features * VEC, weights * VEC, width * VEC


@triton.jit
def _numbers(numbers_ptr, rows_ptr, row, begin, mask, K: tl.constexpr):
    """The numbers of features of rows; where there are none, an expert's lie in its rows' order."""
    number = row - begin
    if numbers_ptr is not None:
        sample = tl.load(rows_ptr + row, mask=mask, other=0).to(tl.int64) // K
        number = tl.load(numbers_ptr + sample, mask=mask, other=0).to(tl.int64)
    return number


@triton.jit(do_not_specialize=["tiles"])
def _heads_forward(
    out_ptr,  # [R, C], written
    features_ptr,  # flat: of expert i [images, D_i]
    numbers_ptr,  # [N], or None
    rows_ptr,  # [R]
    offsets_ptr,  # [M + 1]
    parameters_ptr,  # flat: of each expert [C, D_i], then [M, C]
    first_bias,  # where these start
    table_ptr,  # [3, M] in units of VEC: first feature, first weight, D
    tiles,  # R // BLOCK_R + M
    M: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    VEC: tl.constexpr,
    DOT: tl.constexpr,
    UPCAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: row tiles x tiles of C. A program multiplies one expert's rows by its head."""
    pid = tl.program_id(0)
    expert, first, end = find_tile(pid % tiles, offsets_ptr, 1, M, BLOCK_M, BLOCK_R)
    if first < end:
        feature, weight, width = _place(table_ptr, expert, M, VEC)
        begin = tl.load(offsets_ptr + expert).to(tl.int64)
        row = first + tl.arange(0, BLOCK_R)
        mask_r = row < end
        number = _numbers(numbers_ptr, rows_ptr, row, begin, mask_r, K)
        c = (pid // tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = c < C
        total = tl.zeros([BLOCK_R, BLOCK_C], dtype=COMPUTE)
        for start in range(0, width, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            mask_d = d < width
            x = tl.load(
                features_ptr + (feature + number * width)[:, None] + d[None, :],
                mask=mask_r[:, None] & mask_d[None, :],
                other=0.0,
            )
            w = tl.load(
                parameters_ptr + (weight + c * width)[None, :] + d[:, None],
                mask=mask_c[None, :] & mask_d[:, None],
                other=0.0,
            )
            total = tl.dot(
                operand(x, DOT, UPCAST),
                operand(w, DOT, UPCAST),
                total,
                input_precision=PRECISION,
                out_dtype=COMPUTE,
            )
        biases = parameters_ptr + first_bias + expert.to(tl.int64) * C
        bias = tl.load(biases + c, mask=mask_c, other=0.0)
        total += bias.to(COMPUTE)[None, :]
        tl.store(
            out_ptr + row[:, None] * C + c[None, :], total, mask=mask_r[:, None] & mask_c[None, :]
        )


@triton.jit
def _heads_backward(
    gradient_ptr,  # as parameters, written
    touched_ptr,  # [M], 1 is written for experts with rows
    d_out_ptr,  # [R, C]
    features_ptr,  # as of the forward pass, as the rest
    numbers_ptr,
    rows_ptr,
    offsets_ptr,
    first_bias,
    table_ptr,
    M: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    VEC: tl.constexpr,
    WIDEST: tl.constexpr,  # the largest D
    DOT: tl.constexpr,
    UPCAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: experts x tiles of [C, WIDEST], of which those beyond an expert's D end at once. A
    program walks over an expert's rows and writes its tile, zeros for an expert without rows; those
    of the first tile of D add up the bias's gradient, too."""
    tiled_d: tl.constexpr = (WIDEST + BLOCK_D - 1) // BLOCK_D
    tiled_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    d_tile, c_tile = pid % tiled_d, pid // tiled_d % tiled_c
    expert = (pid // (tiled_d * tiled_c)).to(tl.int64)
    feature, weight, width = _place(table_ptr, expert, M, VEC)
    if d_tile * BLOCK_D < width:
        d = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)
        c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_d, mask_c = d < width, c < C
        begin = tl.load(offsets_ptr + expert).to(tl.int64)
        end = tl.load(offsets_ptr + expert + 1).to(tl.int64)
        d_w = tl.zeros([BLOCK_C, BLOCK_D], dtype=COMPUTE)
        d_b = tl.zeros([BLOCK_C], dtype=COMPUTE)
        for start in range(begin, end, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R)
            mask_r = row < end
            number = _numbers(numbers_ptr, rows_ptr, row, begin, mask_r, K)
            x = tl.load(
                features_ptr + (feature + number * width)[:, None] + d[None, :],
                mask=mask_r[:, None] & mask_d[None, :],
                other=0.0,
            )
            dy = tl.load(
                d_out_ptr + row[None, :] * C + c[:, None],
                mask=mask_c[:, None] & mask_r[None, :],
                other=0.0,
            )
            d_b += tl.sum(dy.to(COMPUTE), axis=1)
            d_w = tl.dot(
                operand(dy, DOT, UPCAST),
                operand(x, DOT, UPCAST),
                d_w,
                input_precision=PRECISION,
                out_dtype=COMPUTE,
            )
        tl.store(
            gradient_ptr + (weight + c * width)[:, None] + d[None, :],
            d_w,
            mask=mask_c[:, None] & mask_d[None, :],
        )
        if d_tile == 0:
            tl.store(gradient_ptr + first_bias + expert * C + c, d_b, mask=mask_c)
            if c_tile == 0:
                tl.store(touched_ptr + expert, 1, mask=begin < end)


def plan_forward(features, numbers, rows, offsets, parameters, table, c, k, vec, widest) -> Plan:
    """[R, C]."""
    num_experts, num_rows = table.shape[1], rows.numel()
    out = parameters.new_empty(num_rows, c)
    block_r = 16 if num_rows < num_experts * _FEW_ROWS else 64
    block_c = min(max(next_power_of_2(c), 16), 64)
    tiles = num_rows // block_r + num_experts
    launch = Launch(
        _heads_forward,
        tiles * cdiv(c, block_c),
        out_ptr=out,
        tiles=tiles,
        **_arguments(features, numbers, rows, offsets, parameters, table, c, k, vec),
        BLOCK_M=next_power_of_2(num_experts),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        BLOCK_D=min(max(next_power_of_2(widest), 16), _DEEP),
    )
    return Plan(out, [launch])


def plan_backward(
    d_out, features, numbers, rows, offsets, parameters, table, touched, c, k, vec, widest
) -> Plan:
    """The gradient, as parameters."""
    gradient = torch.empty_like(parameters)
    # Of 64 outputs a thread would need 253 registers, and two blocks would fill a multiprocessor.
    block_c = min(max(next_power_of_2(c), 16), 32)
    block_d = min(max(next_power_of_2(widest), 16), _DEEP)
    given = _arguments(features, numbers, rows, offsets, parameters, table, c, k, vec)
    del given["parameters_ptr"]  # only their shape counts
    launch = Launch(
        _heads_backward,
        table.shape[1] * cdiv(c, block_c) * cdiv(widest, block_d),
        gradient_ptr=gradient,
        touched_ptr=touched,
        d_out_ptr=d_out,
        **given,
        WIDEST=widest,
        BLOCK_R=16,
        BLOCK_C=block_c,
        BLOCK_D=block_d,
    )
    return Plan(gradient, [launch])


def _arguments(features, numbers, rows, offsets, parameters, table, c, k, vec) -> dict[str, Any]:
    """What both launches are given."""
    num_experts = table.shape[1]
    return {
        "features_ptr": features,
        "numbers_ptr": numbers,
        "rows_ptr": rows,
        "offsets_ptr": offsets,
        "parameters_ptr": parameters,
        "first_bias": parameters.numel() - num_experts * c,
        "table_ptr": table,
        "M": num_experts,
        "K": k,
        "C": c,
        "VEC": vec,
        **product_constants(parameters.dtype),
    }


_forward = register(
    "feature_heads(Tensor features, Tensor? numbers, Tensor rows, Tensor offsets,"
    " Tensor parameters, Tensor table, int c, int k, int vec, int widest) -> Tensor",
    plan_forward,
    lambda features, numbers, rows, offsets, parameters, table, c, *_: parameters.new_empty(
        rows.numel(), c
    ),
    settings=tf32_is_allowed,
)
_backward = register(
    "feature_heads_backward(Tensor d_out, Tensor features, Tensor? numbers, Tensor rows,"
    " Tensor offsets, Tensor parameters, Tensor table, Tensor(a!) touched, int c, int k, int vec,"
    " int widest) -> Tensor",
    plan_backward,
    lambda d_out, features, numbers, rows, offsets, parameters, *_: torch.empty_like(parameters),
    lambda d_out, *rest: (d_out.contiguous(), *rest),
    tf32_is_allowed,
)


class _FeatureHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameters, features, numbers, rows, offsets, table, touched, *sizes):
        ctx.save_for_backward(features, numbers, rows, offsets, parameters, table)
        ctx.touched, ctx.sizes = touched, sizes
        return _forward(features, numbers, rows, offsets, parameters, table, *sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        gradient = _backward(d_out, *ctx.saved_tensors, ctx.touched, *ctx.sizes)
        return gradient, *[None] * (6 + len(ctx.sizes))


class HeadTable(NamedTuple):
    """Where each expert's part lies. table: int64 [3, M]: where its features and its weights start,
    and D, in units of ``vec`` elements. widest: the largest D. c: C."""

    table: Tensor
    c: int
    vec: int
    widest: int


def head_table(starts: Sequence[int], widths: Sequence[int], c: int) -> HeadTable:
    """On the host. starts: of each expert's features in the flat ones, in elements. widths: D."""
    vec = 16
    while any(number % vec for number in (*starts, *widths)):
        vec //= 2
    weights = [c * before for before in itertools.accumulate(widths[:-1], initial=0)]
    table = torch.tensor([list(starts), weights, list(widths)], dtype=torch.int64)
    return HeadTable(table // vec, c, vec, max(widths))


def feature_heads(
    parameters: Tensor,
    features: Tensor,
    numbers: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    k: int,
    table: HeadTable,
    touched: Tensor,
) -> Tensor:
    """The outputs of all experts' linear heads.

    Args:
        parameters: flat [sum of C * D_i + M * C], any float dtype: the experts' weights [C, D_i],
            one behind the other, then their biases [M, C].
        features: flat, any float dtype: of expert i [images, D_i].
        numbers: [N], the sample's row in each expert's features, any dtype; None: features hold
            each expert's rows alone, in their order.
        rows, offsets: as in ``RowPlan``. k: K.
        table: of ``head_table``, its tensor on the device.
        touched: [M] int32: set to 1 by the backward pass for each expert that has rows.

    Returns:
        [R, C] in the dtype of the parameters, in which products are made too, whatever autocast
        says; sums are float32 (float64 for float64). Differentiable in the parameters, with zeros
        for experts without rows; the same bits each time.
    """
    numbers = None if numbers is None else numbers.contiguous()
    return apply(
        _FeatureHeads, parameters, features, numbers, rows, offsets, table.table, touched, table.c,
        k, table.vec, table.widest,
    )  # fmt: skip
