"""What the grouped matrix products of aggregate share: row tiles, tile sizes, precision.

Rows lie in expert order, so a tile of items (one (row, trailing element) each) that does not cross
an expert's boundary is multiplied by one expert's block of the matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import TRITON_DTYPE, accumulator, cdiv, next_power_of_2
from ._launch import INTERPRETED
from ._layout import channels_minor, trailing_size

_PROGRAMS = 256  # keeps the GPUs of today busy (up to 148 multiprocessors): cut finer below this
_MANY_ROWS = 512  # per expert: from here on it is safe to count on _MANY_TILES tiles of them
_MANY_TILES = 8
NARROWEST = 32  # no tile of more channels is narrower


@triton.jit
def find_tile(
    tile, offsets_ptr, trailing, M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Expert of a row tile, and its first item and the expert's end (first >= end: nothing to do).

    Expert i starts at tile offsets[i] // BLOCK_T + i. These starts leave room for every expert's
    last, partly filled tile and need no sum over experts; T // BLOCK_T + M tiles cover them all.
    """
    offs_m = tl.arange(0, BLOCK_M)
    begin = tl.load(offsets_ptr + offs_m, mask=offs_m < M, other=0).to(tl.int64) * trailing
    started = (offs_m < M) & (begin // BLOCK_T + offs_m <= tile)
    expert = tl.sum(started.to(tl.int32), axis=0) - 1
    begin = tl.load(offsets_ptr + expert).to(tl.int64) * trailing
    end = tl.load(offsets_ptr + expert + 1).to(tl.int64) * trailing
    return expert, begin + (tile - begin // BLOCK_T - expert) * BLOCK_T, end


@triton.jit
def item_slot(rows_ptr, row, mask, EVEN: tl.constexpr):
    """The slot n*K + j of each item's row."""
    slot = tl.load(rows_ptr + row, mask=mask, other=0).to(tl.int64)
    # Tiles start at multiples of 16, so with S one too, 16 neighbours share a row. The compiler
    # cannot know this of loaded values, and would read the sample's map element by element.
    return tl.max_constancy(slot, 16) if EVEN else slot


@triton.jit
def sample_offsets(n, s, trailing, C: tl.constexpr, MINOR: tl.constexpr):
    """Address of channel 0 at trailing element s of sample n in [N, C, S], [N, S, C] if MINOR."""
    return n * (C * trailing) + (s * C if MINOR else s)


@triton.jit
def operand(x, DOT: tl.constexpr, UPCAST: tl.constexpr):
    """Round to the product's dtype. The interpreter multiplies bfloat16 wrongly: widen it there."""
    x = x.to(DOT)
    if UPCAST:
        x = x.to(tl.float32)
    return x


class Tiles(NamedTuple):
    """Sizes of a grouped product's tiles, powers of two from 16 on."""

    high: int
    wide: int
    deep: int  # along the dimension that is summed over


def row_tiles(items: int, experts: int) -> int:
    """How many row tiles an expert has at least, in two classes only.

    A kernel is compiled for its tiles, and these follow from here: finer classes would compile
    again for the last, smaller batch of an epoch.
    """
    return _MANY_TILES if items >= experts * _MANY_ROWS else 1


def tiles_for(
    products: int, high: int | None, wide: int, deep: int | None, dtype: torch.dtype
) -> Tiles:
    """Tiles of ``products`` products [high, deep] x [deep, wide].

    None stands for rows, whose number varies from batch to batch: the tile is as if they were
    many, and ``products`` counts their tiles. A tile is up to 128 wide for half precision (tensor
    cores), 64 for float32, whose products are plain multiply-adds and fill the registers sooner;
    narrower where that leaves too few programs.
    """
    half = dtype.itemsize == 2
    highest, widest, deepest = (64, 128, 64) if half else (64, 64, 16)
    block_high = highest if high is None else min(max(next_power_of_2(high), 16), highest)
    stacked = 1 if high is None else cdiv(high, block_high)
    while widest > NARROWEST and products * stacked * cdiv(wide, widest) < _PROGRAMS:
        widest //= 2
    block_wide = min(max(next_power_of_2(wide), 16), widest)
    block_deep = deepest if deep is None else min(max(next_power_of_2(deep), 16), deepest)
    return Tiles(block_high, block_wide, block_deep)


def splits_for(programs: int, items: int, experts: int) -> int:
    """Into how many shares to cut each expert's items where the experts' tiles are few programs.

    Shares cost a second pass that adds them up, so none is made for fewer than 512 items.
    """
    splits = 1
    while programs * splits < _PROGRAMS and items // (experts * splits) > 512:
        splits *= 2
    return splits


def tf32_is_allowed() -> bool:
    """float32 products are exact multiply-adds unless torch allows tf32, as in ``F.linear``."""
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # set through torch's newer switch; the older one then refuses to be read
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def product_constants(dtype: torch.dtype) -> dict:
    """The constants of a kernel whose products are of ``dtype``."""
    return {
        "DOT": TRITON_DTYPE[dtype],
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
        "COMPUTE": TRITON_DTYPE[accumulator(dtype)],
        "PRECISION": "tf32" if dtype == torch.float32 and tf32_is_allowed() else "ieee",
    }


def backward_arguments(d_y, outputs, weights, rows, offsets, matrix, dtype) -> dict:
    """What aggregate's two backward launches are both given."""
    trailing = trailing_size(outputs)
    return {
        "d_y_ptr": d_y,
        "outputs_ptr": outputs,
        "weights_ptr": weights,
        "rows_ptr": rows,
        "offsets_ptr": offsets,
        "trailing": trailing,
        "M": offsets.numel() - 1,
        "K": weights.shape[1],
        "C": outputs.shape[1],
        "C_OUT": matrix.shape[0],
        "MINOR": channels_minor(outputs),
        "EVEN": trailing % 16 == 0,
        **product_constants(dtype),
    }
