"""How BatchNorm's kernels walk over maps: tiles of items and channels, in either memory layout.

An item is one (row, position); there are T = capacity * S of them, of which the first
V = count * S are valid. A tile has the axis first that is further apart in memory, so that lanes
lie along the other: [BLOCK_T, BLOCK_C] of channels-last maps and plain rows (MINOR),
[BLOCK_C, BLOCK_T] of contiguous maps. Vectors over channels or items are turned to fit.

Sizes come as (units, VEC), see ``_layout.units``, and none is compiled in: a network has dozens of
layers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, next_power_of_2
from ._layout import channels_minor, trailing_size

TILE = 4096  # elements of a program of 4 warps: 32 a thread, 4 loads of 128 bits of bf16 under way
PROGRAMS = 528  # of a launch: 4 for each multiprocessor of an H100
# Of a program at least: what it reads and leaves of each channel, some 24 bytes, is then 1 % of the
# 10 bytes of each item that backward moves in bf16.
ITEMS = 256
SIZES = ["capacity", "channel_units", "trailing_units", "splits", "tiles"]  # never compiled in


@triton.jit
def by_channel(vector, MINOR: tl.constexpr):
    """[BLOCK_C] to be used with a tile."""
    return vector[None, :] if MINOR else vector[:, None]


@triton.jit
def by_item(vector, MINOR: tl.constexpr):
    """[BLOCK_T] to be used with a tile."""
    return vector[:, None] if MINOR else vector[None, :]


@triton.jit
def over_items(tile, MINOR: tl.constexpr):
    """The sum of each channel, [BLOCK_C]."""
    return tl.sum(tile, axis=0 if MINOR else 1)


@triton.jit
def zeros_of_tile(
    COMPUTE: tl.constexpr, MINOR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    return tl.zeros((BLOCK_T, BLOCK_C) if MINOR else (BLOCK_C, BLOCK_T), COMPUTE)


@triton.jit
def addresses(item, channel, channels, trailing, MINOR: tl.constexpr):
    """Offsets of a tile's elements: of items [BLOCK_T] and channels [BLOCK_C]."""
    if MINOR:
        offsets = item.to(tl.int64)[:, None] * channels + channel[None, :]
    else:
        row = (item // trailing).to(tl.int64)
        base = row * channels * trailing + item % trailing
        offsets = base[None, :] + channel.to(tl.int64)[:, None] * trailing
    return offsets


@triton.jit
def valid_rows(count_ptr, capacity):
    """How many there are, read on the device."""
    count = tl.load(count_ptr)
    tl.device_assert((count >= 0) & (count <= capacity), "batch_norm: count out of range")
    return tl.minimum(count, capacity)


@triton.jit
def items_of_split(split, splits, items, BLOCK_T: tl.constexpr):
    """The first item of a program's share of them, and the end of whole tiles."""
    share = tl.cdiv(tl.cdiv(items, splits), BLOCK_T) * BLOCK_T
    begin = split * share
    return begin, begin + share


@triton.jit
def factor_and_bias(
    scale_ptr, weight_ptr, bias_ptr, channel, mask_c, MINOR: tl.constexpr, COMPUTE: tl.constexpr
):
    """What x - mean is multiplied by, and what is added: for a tile."""
    factor = tl.load(scale_ptr + channel, mask_c, other=0.0)
    if weight_ptr is not None:
        factor *= tl.load(weight_ptr + channel, mask_c, other=0.0).to(COMPUTE)
    bias = tl.zeros_like(factor)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask_c, other=0.0).to(COMPUTE)
    return by_channel(factor, MINOR), by_channel(bias, MINOR)


def tile_of(x: Tensor, elements: int) -> tuple[int, int]:
    """(BLOCK_T, BLOCK_C)."""
    if not channels_minor(x):
        # Half a tile: the addresses of narrow loads, where S is odd, take registers as well.
        return 256, elements // 512
    channels = x.shape[1]
    if channels < 16:
        block_c = next_power_of_2(channels)
        return elements // block_c, block_c
    # As many channels as leave enough programs, and few lanes without any; 16 fill a sector.
    shares = cdiv(_items(x), ITEMS)
    for block_c in (64, 32):
        blocks = cdiv(channels, block_c)
        if blocks * shares >= PROGRAMS and blocks * block_c <= 1.25 * channels:
            return elements // block_c, block_c
    return elements // 16, 16


def _items(x: Tensor) -> int:
    return len(x) * trailing_size(x)


def split_sums(x: Tensor, elements: int) -> int:
    """Programs that share the items of a block of channels, in launches that sum over them."""
    blocks = cdiv(x.shape[1], tile_of(x, elements)[1])
    return max(1, min(PROGRAMS // blocks, _items(x) // ITEMS))


def vector(size: int, itemsize: int) -> int:
    """The largest power of two that divides ``size`` and fills at most 128 bits."""
    return min(size & -size, 16 // itemsize)


def tile_arguments(x: Tensor, elements: int) -> dict:
    """Sizes and tiles of a launch over x [capacity, C, ...]."""
    block_t, block_c = tile_of(x, elements)
    channels, trailing, minor = x.shape[1], trailing_size(x), channels_minor(x)
    # Only of what is contiguous in memory need a divisor be known when compiling.
    vec_c = vector(channels, x.element_size()) if minor else 1
    vec_s = 1 if minor else vector(trailing, x.element_size())
    return {
        "capacity": len(x),
        "channel_units": channels // vec_c,
        "trailing_units": trailing // vec_s,
        "VEC_C": vec_c,
        "VEC_S": vec_s,
        "MINOR": minor,
        "BLOCK_T": block_t,
        "BLOCK_C": block_c,
    }


def programs_of_tiles(x: Tensor, elements: int) -> tuple[int, int]:
    """(tiles of a program, programs) of a launch that writes all of x."""
    block_t, block_c = tile_of(x, elements)
    tiles = max(1, ITEMS // block_t)
    return tiles, cdiv(x.shape[1], block_c) * cdiv(_items(x), block_t * tiles)
