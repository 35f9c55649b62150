"""The statistics of each channel over the valid rows of a padded group, and the running ones.

    mean = (1/V) sum x,   var = (1/V) sum (x - mean)^2,   V = count * S valid items
    running += momentum * (found - running), with var * V / (V - 1)

One pass over x. A program adds up x - p and its square, p the first of its values of the channel:
where the mean is large against the spread nothing cancels, and (mean - p)^2 is at most the sum of
squares, so that rounding costs the variance at most as many units in the last place as a program
has items: 256, and more where a large map is shared by PROGRAMS of them. A second, small launch
joins what the programs found, in a fixed order.

Shapes: x [capacity, C, ...], S trailing positions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import TRITON_DTYPE, accumulator, cdiv
from ._launch import Launch, Plan, register
from ._layout import settle
from ._norm_tiles import (
    SIZES,
    TILE,
    addresses,
    by_channel,
    by_item,
    items_of_split,
    over_items,
    split_sums,
    tile_arguments,
    valid_rows,
    zeros_of_tile,
)

BLOCK_SPLITS, BLOCK_JOINED = 64, 8  # of a tile of the sums that are joined: splits, channels


@triton.jit(do_not_specialize=SIZES)
def _statistics_kernel(
    # inputs
    x_ptr,  # [capacity, C, S], or [capacity, S, C] if MINOR
    count_ptr,  # [] int32
    # outputs
    mean_ptr,  # [splits, C]
    square_ptr,  # [splits, C]: sums of squares about that mean
    tracked_ptr,  # [] int64, one is added; or None
    # sizes
    capacity, channel_units, trailing_units, splits,
    VEC_C: tl.constexpr, VEC_S: tl.constexpr, MINOR: tl.constexpr, COMPUTE: tl.constexpr,
    # tunables
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (splits * C / BLOCK_C,). A program owns a share of the items of BLOCK_C channels."""
    program = tl.program_id(0)
    split = program % splits
    channels, trailing = channel_units * VEC_C, trailing_units * VEC_S
    count = valid_rows(count_ptr, capacity)
    if tracked_ptr is not None:
        # Here, by one program: the next launch reads it in all.
        tracked = tl.load(tracked_ptr, program == 0, other=0)
        tl.debug_barrier()  # every warp has loaded it
        tl.store(tracked_ptr, tracked + (count > 1), program == 0)
    items = count * trailing
    begin, end = items_of_split(split, splits, items, BLOCK_T)
    channel = program // splits * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel < channels
    # An array of one item, to be addressed as the others are.
    first = begin + tl.zeros((1,), tl.int32)
    at_first = addresses(first, channel, channels, trailing, MINOR)
    present = by_item(first < items, MINOR) & by_channel(mask_c, MINOR)
    pivot = tl.load(x_ptr + at_first, present, other=0.0).to(COMPUTE)
    sums = zeros_of_tile(COMPUTE, MINOR, BLOCK_T, BLOCK_C)
    squares = zeros_of_tile(COMPUTE, MINOR, BLOCK_T, BLOCK_C)
    for start in range(begin, tl.minimum(end, items), BLOCK_T):
        item = start + tl.arange(0, BLOCK_T)
        mask = by_item(item < items, MINOR) & by_channel(mask_c, MINOR)
        offsets = addresses(item, channel, channels, trailing, MINOR)
        x = tl.load(x_ptr + offsets, mask, other=0.0).to(COMPUTE)
        shifted = tl.where(mask, x - pivot, 0.0)
        sums += shifted
        squares += shifted * shifted
    found = tl.maximum(tl.minimum(end, items) - begin, 1).to(COMPUTE)
    pivot = over_items(pivot, MINOR)
    offset = over_items(sums, MINOR) / found
    square = over_items(squares, MINOR) - found * offset * offset
    target = split * channels + channel
    tl.store(mean_ptr + target, pivot + offset, mask_c)
    tl.store(square_ptr + target, tl.where(square < 0, 0.0, square), mask_c)


@triton.jit(do_not_specialize=SIZES)
def _joined_statistics_kernel(
    # inputs
    mean_ptr,  # [splits, C]
    square_ptr,  # [splits, C]
    count_ptr,  # [] int32
    tracked_ptr,  # [] int64, or None
    # in place
    running_mean_ptr,  # [C], or None
    running_var_ptr,  # [C], or None
    # outputs
    found_mean_ptr,  # [C]
    found_scale_ptr,  # [C]: 1 / sqrt(var + eps)
    # sizes
    capacity, channel_units, trailing_units, splits,
    VEC_C: tl.constexpr, VEC_S: tl.constexpr, MOMENTUM: tl.constexpr, EPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    # tunables
    BLOCK_T: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_JOINED: tl.constexpr,
):  # fmt: skip
    """Grid (C / BLOCK_JOINED,). A program owns BLOCK_JOINED channels.

    MOMENTUM: None where the running statistics are means over all batches. BLOCK_T: of the first
    launch.
    """
    channels = channel_units * VEC_C
    count = valid_rows(count_ptr, capacity)
    items = count * trailing_units * VEC_S
    channel = tl.program_id(0) * BLOCK_JOINED + tl.arange(0, BLOCK_JOINED)
    mask_c = channel < channels
    pivot = tl.load(mean_ptr + channel, mask_c, other=0.0)
    sums = tl.zeros((BLOCK_SPLITS, BLOCK_JOINED), COMPUTE)
    squares = tl.zeros((BLOCK_SPLITS, BLOCK_JOINED), COMPUTE)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        begin, end = items_of_split(split, splits, items, BLOCK_T)
        of_split = tl.minimum(end, items) - begin
        mask = ((split < splits) & (of_split > 0))[:, None] & mask_c[None, :]
        source = split[:, None] * channels + channel[None, :]
        mean = tl.load(mean_ptr + source, mask, other=0.0)
        square = tl.load(square_ptr + source, mask, other=0.0)
        offset = tl.where(mask, mean - pivot[None, :], 0.0)
        weighted = offset * of_split.to(COMPUTE)[:, None]
        sums += weighted
        squares += square + weighted * offset
    number = tl.maximum(items, 1).to(COMPUTE)
    offset = tl.sum(sums, axis=0) / number
    mean = pivot + offset
    square = tl.sum(squares, axis=0) - number * offset * offset
    square = tl.where(square < 0, 0.0, square)
    var = square / number
    if running_mean_ptr is not None:
        several = count > 1
        share = tl.full((), 1.0, COMPUTE)  # of the first batch
        if MOMENTUM is not None:
            share = tl.full((), MOMENTUM, COMPUTE)
        elif tracked_ptr is not None:
            share = 1.0 / tl.maximum(tl.load(tracked_ptr), 1).to(COMPUTE)
        running_mean = tl.load(running_mean_ptr + channel, mask_c, other=0.0).to(COMPUTE)
        running_var = tl.load(running_var_ptr + channel, mask_c, other=0.0).to(COMPUTE)
        unbiased = square / tl.maximum(items - 1, 1).to(COMPUTE)
        moved = mask_c & several
        mean_after = running_mean + share * (mean - running_mean)
        var_after = running_var + share * (unbiased - running_var)
        tl.debug_barrier()  # every warp has loaded them
        tl.store(running_mean_ptr + channel, mean_after, moved)
        tl.store(running_var_ptr + channel, var_after, moved)
        mean = tl.where(several, mean, running_mean)
        var = tl.where(several, var, running_var)
    tl.store(found_mean_ptr + channel, mean, mask_c)
    tl.store(found_scale_ptr + channel, 1.0 / tl.sqrt(var + EPS), mask_c)


def _fake(x, *rest) -> tuple[Tensor, Tensor]:
    dtype = accumulator(x.dtype)
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


def plan_statistics(x, count, running_mean, running_var, tracked, momentum, eps) -> Plan:
    mean, scale = _fake(x)
    sizes, splits = tile_arguments(x, TILE), split_sums(x, TILE)
    means, squares = (mean.new_empty(splits, x.shape[1]) for _ in range(2))
    compute = TRITON_DTYPE[mean.dtype]
    blocks = cdiv(x.shape[1], sizes["BLOCK_C"])
    first = Launch(
        _statistics_kernel, splits * blocks, x_ptr=x, count_ptr=count, mean_ptr=means,
        square_ptr=squares, tracked_ptr=tracked, splits=splits, COMPUTE=compute, **sizes,
    )  # fmt: skip
    for only_of_tiles in ("MINOR", "BLOCK_C"):
        del sizes[only_of_tiles]
    second = Launch(
        _joined_statistics_kernel, cdiv(x.shape[1], BLOCK_JOINED), mean_ptr=means,
        square_ptr=squares, count_ptr=count, tracked_ptr=tracked, running_mean_ptr=running_mean,
        running_var_ptr=running_var, found_mean_ptr=mean, found_scale_ptr=scale, splits=splits,
        MOMENTUM=momentum, EPS=eps, COMPUTE=compute, BLOCK_SPLITS=BLOCK_SPLITS,
        BLOCK_JOINED=BLOCK_JOINED, **sizes,
    )  # fmt: skip
    return Plan((mean, scale), [first, second])


def _settle(x, *rest):
    return settle(x), *rest


batch_statistics = register(
    "batch_statistics(Tensor x, Tensor count, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor(c!)? tracked, float? momentum, float eps) -> (Tensor mean, Tensor scale)",
    plan_statistics,
    _fake,
    _settle,
)
