"""Memory layouts: of samples [N, C, ...] and of expert outputs [R, C, ...].

Two are read in place: contiguous, and channels last (dimension 1 innermost in memory, for any
number of dimensions). Anything else is copied once. S trailing elements lie behind dimension 1
(S = 1 for plain rows).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import next_power_of_2


@triton.jit
def item_offsets(item, trailing, C: tl.constexpr, MINOR: tl.constexpr):
    """Row, trailing element and address of channel 0 of an item, one (row, trailing element).

    MINOR: dimension 1 is innermost in memory, so that items lie one behind the other.
    """
    if MINOR:
        return item // trailing, item % trailing, item * C
    row = item // trailing
    return row, item % trailing, row * (C * trailing) + item % trailing


def has_layout(x: Tensor, channels_last: bool) -> bool:
    """Both hold where they coincide: with one channel, or one trailing element."""
    return (x.movedim(1, -1) if channels_last else x).is_contiguous()


def is_channels_last(x: Tensor) -> bool:
    return x.dim() > 2 and not x.is_contiguous() and has_layout(x, True)


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` in the given layout: itself if it is so already, else a copy."""
    if has_layout(x, channels_last):
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def settle(x: Tensor, channels_last: bool = False) -> Tensor:
    """``x`` in one of the two layouts: the given one if it has to be copied."""
    return x if x.is_contiguous() else dense(x, channels_last or is_channels_last(x))


def settle_gradient(gradient: Tensor, outputs: Tensor, *rest) -> tuple:
    """The arguments of a backward operation, the incoming gradient in the layout of ``outputs``."""
    return dense(gradient, is_channels_last(outputs)), outputs, *rest


def empty(
    like: Tensor,
    samples: int,
    dtype: torch.dtype,
    channels: int | None = None,
    channels_last: bool | None = None,
) -> Tensor:
    """Uninitialised [samples, channels, ...]; None, and the trailing shape: those of ``like``."""
    own = like.shape[1:2] if channels is None else (channels,)
    if is_channels_last(like) if channels_last is None else channels_last:
        return like.new_empty((samples, *like.shape[2:], *own), dtype=dtype).movedim(-1, 1)
    return like.new_empty((samples, *own, *like.shape[2:]), dtype=dtype)


def trailing_size(outputs: Tensor) -> int:
    return math.prod(outputs.shape[2:])


def channels_minor(outputs: Tensor) -> bool:
    """Whether dimension 1 is innermost in memory: plain rows, and channels-last maps."""
    return trailing_size(outputs) == 1 or is_channels_last(outputs)


def units(size: int) -> tuple[int, int]:
    """``size`` as (units, VEC) with VEC its largest power of two up to 16.

    Triton sees at compile time whether an integer argument is a multiple of 16, and nothing
    else: a size of 1000 would be read one element at a time. Passing ``size // VEC`` with VEC
    known when compiling gives full-width loads without compiling for each size.
    """
    vec = min(size & -size, 16) if size else 1
    return size // vec, vec


def blocks(length: int, elements: int = 1024) -> tuple[int, int]:
    """(rows, elements) of one program's tile of a matrix of rows of ``length``, powers of two.

    The number of rows has no say: it varies from batch to batch, and tiles are compiled in.
    """
    block_l = min(next_power_of_2(length), elements)
    return elements // block_l, block_l
