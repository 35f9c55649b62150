"""The gradients of BatchNorm over the first rows of a padded group; formulas in batch_norm.py.

Two passes: the first reads d_y and x and leaves two sums of each channel, and with a residual the
gradient g behind the activation, which is the residual's own; the second reads x and g, or d_y once
more, and writes d_x. Where the activation's derivative cannot be told from x alone, since a
residual was added, the first pass reads what it can be told from: the result or the residual.

Shapes: x [capacity, C, ...], S trailing positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activation import FROM_RESULT, slope
from ._batch_statistics import BLOCK_JOINED, BLOCK_SPLITS
from ._common import TRITON_DTYPE, cdiv
from ._launch import Launch, Plan, register
from ._layout import settle_gradient
from ._norm_tiles import (
    SIZES,
    addresses,
    by_channel,
    by_item,
    factor_and_bias,
    items_of_split,
    over_items,
    programs_of_tiles,
    split_sums,
    tile_arguments,
    valid_rows,
    zeros_of_tile,
)

TILE = 2048  # elements of a program: three tensors are read at once


@triton.jit(do_not_specialize=SIZES)
def _gradient_sums_kernel(
    # inputs
    d_y_ptr,  # like x
    x_ptr,  # [capacity, C, S], or [capacity, S, C] if MINOR
    gate_ptr,  # like x: the result or the residual; or None
    count_ptr,  # [] int32
    mean_ptr,  # [C]
    scale_ptr,  # [C]
    weight_ptr,  # [C], or None
    bias_ptr,  # [C], or None
    # outputs
    sum_ptr,  # [splits, C]: of g
    product_ptr,  # [splits, C]: of g * (x - mean)
    g_ptr,  # like x, or None
    # sizes
    capacity, channel_units, trailing_units, splits,
    VEC_C: tl.constexpr, VEC_S: tl.constexpr, MINOR: tl.constexpr, ACTIVATION: tl.constexpr,
    GATE_IS_RESULT: tl.constexpr, COMPUTE: tl.constexpr,
    # tunables
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (splits * C / BLOCK_C,). A program owns a share of the items of BLOCK_C channels: of the
    valid ones, or of all where g is written."""
    program = tl.program_id(0)
    split = program % splits
    channels, trailing = channel_units * VEC_C, trailing_units * VEC_S
    valid, items = valid_rows(count_ptr, capacity) * trailing, capacity * trailing
    extent = valid if g_ptr is None else items
    begin, end = items_of_split(split, splits, extent, BLOCK_T)
    channel = program // splits * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel < channels
    mean = by_channel(tl.load(mean_ptr + channel, mask_c, other=0.0), MINOR)
    if ACTIVATION > 0 and not GATE_IS_RESULT:
        factor, bias = factor_and_bias(
            scale_ptr, weight_ptr, bias_ptr, channel, mask_c, MINOR, COMPUTE
        )
    sums = zeros_of_tile(COMPUTE, MINOR, BLOCK_T, BLOCK_C)
    products = zeros_of_tile(COMPUTE, MINOR, BLOCK_T, BLOCK_C)
    for start in range(begin, tl.minimum(end, extent), BLOCK_T):
        item = start + tl.arange(0, BLOCK_T)
        mask = by_item(item < valid, MINOR) & by_channel(mask_c, MINOR)
        offsets = addresses(item, channel, channels, trailing, MINOR)
        g = tl.load(d_y_ptr + offsets, mask, other=0.0).to(COMPUTE)
        centred = tl.load(x_ptr + offsets, mask, other=0.0).to(COMPUTE) - mean
        if ACTIVATION > 0:
            if GATE_IS_RESULT:
                at = tl.load(gate_ptr + offsets, mask, other=0.0).to(COMPUTE)
            else:
                at = centred * factor + bias
                if gate_ptr is not None:
                    at += tl.load(gate_ptr + offsets, mask, other=0.0).to(COMPUTE)
            g *= slope(at, ACTIVATION)
        g = tl.where(mask, g, 0.0)
        if g_ptr is not None:
            own = by_item(item < items, MINOR) & by_channel(mask_c, MINOR)
            tl.store(g_ptr + offsets, g.to(g_ptr.dtype.element_ty), own)
        sums += g
        products += g * centred
    target = split * channels + channel
    tl.store(sum_ptr + target, over_items(sums, MINOR), mask_c)
    tl.store(product_ptr + target, over_items(products, MINOR), mask_c)


@triton.jit(do_not_specialize=SIZES)
def _joined_gradients_kernel(
    # inputs
    sum_ptr,  # [splits, C]
    product_ptr,  # [splits, C]
    count_ptr,  # [] int32
    scale_ptr,  # [C]
    # outputs
    d_weight_ptr,  # [C], or None
    d_bias_ptr,  # [C], or None
    constant_ptr,  # [C]: the mean of g
    linear_ptr,  # [C]: scale^2 times the mean of g * (x - mean)
    # sizes
    capacity, channel_units, trailing_units, splits,
    VEC_C: tl.constexpr, VEC_S: tl.constexpr, KEPT: tl.constexpr, COMPUTE: tl.constexpr,
    # tunables
    BLOCK_SPLITS: tl.constexpr, BLOCK_JOINED: tl.constexpr,
):  # fmt: skip
    """Grid (C / BLOCK_JOINED,). A program owns BLOCK_JOINED channels.

    KEPT: there are running statistics, by which a single row was normalised.
    """
    channels = channel_units * VEC_C
    count = valid_rows(count_ptr, capacity)
    channel = tl.program_id(0) * BLOCK_JOINED + tl.arange(0, BLOCK_JOINED)
    mask_c = channel < channels
    sums = tl.zeros((BLOCK_SPLITS, BLOCK_JOINED), COMPUTE)
    products = tl.zeros((BLOCK_SPLITS, BLOCK_JOINED), COMPUTE)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        mask = (split < splits)[:, None] & mask_c[None, :]
        source = split[:, None] * channels + channel[None, :]
        sums += tl.load(sum_ptr + source, mask, other=0.0)
        products += tl.load(product_ptr + source, mask, other=0.0)
    total, product = tl.sum(sums, axis=0), tl.sum(products, axis=0)
    scale = tl.load(scale_ptr + channel, mask_c, other=0.0)
    if d_weight_ptr is not None:
        d_weight = product * scale
        tl.store(d_weight_ptr + channel, d_weight.to(d_weight_ptr.dtype.element_ty), mask_c)
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + channel, total.to(d_bias_ptr.dtype.element_ty), mask_c)
    number = tl.maximum(count * trailing_units * VEC_S, 1).to(COMPUTE)
    if KEPT:
        total = tl.where(count > 1, total, 0.0)
        product = tl.where(count > 1, product, 0.0)
    tl.store(constant_ptr + channel, total / number, mask_c)
    tl.store(linear_ptr + channel, scale * scale * product / number, mask_c)


@triton.jit(do_not_specialize=SIZES)
def _input_gradient_kernel(
    # inputs
    g_ptr,  # like x; d_y where an activation still has to be differentiated
    x_ptr,  # [capacity, C, S], or [capacity, S, C] if MINOR
    count_ptr,  # [] int32
    mean_ptr,  # [C]
    scale_ptr,  # [C]
    weight_ptr,  # [C], or None
    bias_ptr,  # [C], or None
    constant_ptr,  # [C]
    linear_ptr,  # [C]
    # outputs
    d_x_ptr,  # like x
    # sizes
    capacity, channel_units, trailing_units, tiles,
    VEC_C: tl.constexpr, VEC_S: tl.constexpr, MINOR: tl.constexpr, ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    # tunables
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (C / BLOCK_C * T / BLOCK_T / tiles,). A program owns ``tiles`` tiles of its channels."""
    channels, trailing = channel_units * VEC_C, trailing_units * VEC_S
    blocks = tl.cdiv(channels, BLOCK_C)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(0) // blocks * tiles * BLOCK_T
    mask_c = channel < channels
    valid, items = valid_rows(count_ptr, capacity) * trailing, capacity * trailing
    mean = by_channel(tl.load(mean_ptr + channel, mask_c, other=0.0), MINOR)
    factor, bias = factor_and_bias(scale_ptr, weight_ptr, bias_ptr, channel, mask_c, MINOR, COMPUTE)
    constant = by_channel(tl.load(constant_ptr + channel, mask_c, other=0.0), MINOR)
    linear = by_channel(tl.load(linear_ptr + channel, mask_c, other=0.0), MINOR)
    for start in range(first, tl.minimum(first + tiles * BLOCK_T, items), BLOCK_T):
        item = start + tl.arange(0, BLOCK_T)
        own = by_item(item < items, MINOR) & by_channel(mask_c, MINOR)
        mask = by_item(item < valid, MINOR) & by_channel(mask_c, MINOR)
        offsets = addresses(item, channel, channels, trailing, MINOR)
        g = tl.load(g_ptr + offsets, mask, other=0.0).to(COMPUTE)
        centred = tl.load(x_ptr + offsets, mask, other=0.0).to(COMPUTE) - mean
        if ACTIVATION > 0:
            g *= slope(centred * factor + bias, ACTIVATION)
        d_x = tl.where(mask, factor * (g - constant - centred * linear), 0.0)
        tl.store(d_x_ptr + offsets, d_x.to(d_x_ptr.dtype.element_ty), own)


def _fake(
    d_y, x, gate, count, mean, scale, weight, bias, activation, with_residual, kept, needs_d_x
) -> tuple[Tensor, ...]:
    def like(tensor: Tensor | None) -> Tensor:
        return x.new_empty(0) if tensor is None else torch.empty_like(tensor)

    return (
        like(x if needs_d_x else None),
        like(weight),
        like(bias),
        like(x if with_residual else None),
    )


def plan_backward(
    d_y, x, gate, count, mean, scale, weight, bias, activation, with_residual, kept, needs_d_x
) -> Plan:
    results = _fake(
        d_y, x, gate, count, mean, scale, weight, bias, activation, with_residual, kept, needs_d_x
    )
    d_x, d_weight, d_bias, g = results
    sizes, splits = tile_arguments(x, TILE), split_sums(x, TILE)
    sums, products = (mean.new_empty(splits, x.shape[1]) for _ in range(2))
    constant, linear = torch.empty_like(mean), torch.empty_like(mean)
    compute = TRITON_DTYPE[mean.dtype]
    given = {"count_ptr": count, "mean_ptr": mean, "weight_ptr": weight, "bias_ptr": bias}
    given |= {"x_ptr": x, "scale_ptr": scale, "COMPUTE": compute}
    of_tiles = {name: sizes.pop(name) for name in ("MINOR", "BLOCK_T", "BLOCK_C")}
    launches = [
        Launch(
            _gradient_sums_kernel, splits * cdiv(x.shape[1], of_tiles["BLOCK_C"]), d_y_ptr=d_y,
            gate_ptr=gate, sum_ptr=sums, product_ptr=products, g_ptr=g if with_residual else None,
            splits=splits, ACTIVATION=activation,
            GATE_IS_RESULT=gate is not None and activation in FROM_RESULT,
            **given, **sizes, **of_tiles,
        ),
        Launch(
            _joined_gradients_kernel, cdiv(x.shape[1], BLOCK_JOINED), sum_ptr=sums,
            product_ptr=products, count_ptr=count, scale_ptr=scale,
            d_weight_ptr=None if weight is None else d_weight,
            d_bias_ptr=None if bias is None else d_bias, constant_ptr=constant, linear_ptr=linear,
            splits=splits, KEPT=kept, COMPUTE=compute, BLOCK_SPLITS=BLOCK_SPLITS,
            BLOCK_JOINED=BLOCK_JOINED, **sizes,
        ),
    ]  # fmt: skip
    if needs_d_x:
        tiles, programs = programs_of_tiles(x, TILE)
        last = Launch(
            _input_gradient_kernel, programs, g_ptr=g if with_residual else d_y,
            constant_ptr=constant, linear_ptr=linear, d_x_ptr=d_x, tiles=tiles,
            ACTIVATION=0 if with_residual else activation, **given, **sizes, **of_tiles,
        )  # fmt: skip
        launches.append(last)
    return Plan(results, launches)


batch_norm_backward = register(
    "batch_norm_backward(Tensor d_y, Tensor x, Tensor? gate, Tensor count, Tensor mean,"
    " Tensor scale, Tensor? weight, Tensor? bias, int activation, bool with_residual, bool kept,"
    " bool needs_d_x) -> (Tensor d_x, Tensor d_weight, Tensor d_bias, Tensor g)",
    plan_backward,
    _fake,
    settle_gradient,
)
