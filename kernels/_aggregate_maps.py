"""Forward of aggregate on maps in one launch: y alone is written, the products are never in memory.

    y[n] = sum_j w[n, j] * W_i outputs[positions[n, j]] + bias      i = experts[n, j]

A tile of a map's positions belongs to one sample, whose K rows a program multiplies one after the
other and adds up in registers. Bytes: each row is read once for each tile of C_OUT (the second time
from the L2 cache: those tiles are neighbours in the grid), y is written once. The form for vectors
(aggregate.py), whose tiles hold rows of many samples, writes and reads R*S*C_OUT float32 products
beside, and launches twice.

Shapes as in aggregate.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, next_power_of_2
from ._cross_entropy import PARTIALS, sum_partials
from ._grouped import operand, product_constants, row_tiles, tiles_for
from ._launch import Launch
from ._layout import channels_minor, trailing_size

# A product has at least 16 rows. Maps of fewer positions would fill them with nothing: they are
# small, and go the way of vectors.
_SMALLEST_MAP = 16


def adds_in_place(outputs: Tensor) -> bool:
    """Whether these are maps that are aggregated sample by sample, without products in memory."""
    return trailing_size(outputs) >= _SMALLEST_MAP


@triton.jit(do_not_specialize=["partial_units"])
def _sum_products(
    y_ptr,  # [N, C_OUT, S], or [N, S, C_OUT] if MINOR, written
    loss_ptr,  # [], written, or None
    outputs_ptr,  # [R, C, S] or [R, S, C]
    weights_ptr,  # [N, K]
    positions_ptr,  # [N, K]
    offsets_ptr,  # [M + 1]
    matrix_ptr,  # [C_OUT, M, C]
    bias_ptr,  # [C_OUT] or None
    partials_ptr,  # [partial_units * PARTIALS] or None
    trailing,  # S
    partial_units,
    M: tl.constexpr,
    K: tl.constexpr,
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
    PARTIALS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid: samples x tiles of S x tiles of C_OUT. A program owns a tile of a sample's y and adds
    its K weighted products, j ascending. The first one also adds up the exploit loss's partial
    sums."""
    tiled_co: tl.constexpr = (C_OUT + BLOCK_CO - 1) // BLOCK_CO
    pid = tl.program_id(0)
    tiled_s = tl.cdiv(trailing, BLOCK_T)
    n = (pid // tiled_co // tiled_s).to(tl.int64)
    s = (pid // tiled_co % tiled_s).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    co = pid % tiled_co * BLOCK_CO + tl.arange(0, BLOCK_CO)
    mask_t, mask_co = (s < trailing)[:, None], (co < C_OUT)[None, :]
    step = 1 if MINOR else trailing
    offs_m = tl.arange(0, BLOCK_M)
    first_rows = tl.load(offsets_ptr + offs_m, mask=offs_m < M, other=0)

    y = tl.zeros([BLOCK_T, BLOCK_CO], dtype=COMPUTE)
    for j in range(K):
        row = tl.load(positions_ptr + n * K + j)
        started = (offs_m < M) & (first_rows <= row)
        expert = tl.sum(started.to(tl.int32), axis=0) - 1
        weight = tl.load(weights_ptr + n * K + j).to(COMPUTE)
        base = row.to(tl.int64) * (C * trailing) + (s * C if MINOR else s)
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
        y += weight * product
    if bias_ptr is not None:
        y += tl.load(bias_ptr + co, mask=co < C_OUT, other=0.0).to(COMPUTE)[None, :]
    base = n * (C_OUT * trailing) + (s * C_OUT if MINOR else s)
    tl.store(y_ptr + base[:, None] + co[None, :] * step, y, mask=mask_t & mask_co)

    if partials_ptr is not None and pid == 0:
        sum_partials(loss_ptr, partials_ptr, partial_units, COMPUTE, PARTIALS, BLOCK_P)


def map_launch(
    y, loss, outputs, weights, positions, offsets, matrix, bias, dtype, partials
) -> Launch:
    """Fills y, and the loss if there are ``partials``; ``dtype`` is of what is multiplied."""
    num_experts, (n, k) = offsets.numel() - 1, weights.shape
    channels, c_out, trailing = outputs.shape[1], matrix.shape[0], trailing_size(outputs)
    count = num_experts * row_tiles(outputs.shape[0] * trailing, num_experts)
    tile = tiles_for(count, None, c_out, channels, dtype)
    high = min(tile.high, next_power_of_2(trailing))
    return Launch(
        _sum_products,
        n * cdiv(trailing, high) * cdiv(c_out, tile.wide),
        y_ptr=y,
        loss_ptr=None if partials is None else loss,
        outputs_ptr=outputs,
        weights_ptr=weights,
        positions_ptr=positions,
        offsets_ptr=offsets,
        matrix_ptr=matrix,
        bias_ptr=bias,
        partials_ptr=partials,
        trailing=trailing,
        partial_units=0 if partials is None else partials.numel() // PARTIALS,
        M=num_experts,
        K=k,
        C=channels,
        C_OUT=c_out,
        MINOR=channels_minor(outputs),
        **product_constants(dtype),
        BLOCK_M=next_power_of_2(num_experts),
        BLOCK_T=high,
        BLOCK_CO=tile.wide,
        BLOCK_C=tile.deep,
        PARTIALS=PARTIALS,
        BLOCK_P=1024,
        # Two sums of a large tile are 128 registers a thread for 4 warps.
        num_warps=8 if high * tile.wide > 4096 else 4,
    )
