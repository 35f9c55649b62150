"""What combine, aggregate and exploit_loss share: the memory layout of expert outputs.

Expert outputs are [R, C, ...] with S trailing elements behind dimension 1 (S = 1 for plain rows).
Two layouts are read in place: contiguous, and channels last (dimension 1 innermost in memory, for
any number of dimensions). Anything else is copied once. Results take the layout of their inputs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import next_power_of_2

TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def item_offsets(item, trailing, C: tl.constexpr, MINOR: tl.constexpr):
    """Row, trailing element and address of channel 0 of an item, one (row, trailing element).

    MINOR: dimension 1 is innermost in memory, so that items lie one behind the other.
    """
    if MINOR:
        return item // trailing, item % trailing, item * C
    row = item // trailing
    return row, item % trailing, row * (C * trailing) + item % trailing


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What an operation computes in: float64 for float64, float32 for anything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_channels_last(outputs: Tensor) -> bool:
    return not outputs.is_contiguous() and outputs.movedim(1, -1).is_contiguous()


def dense(tensor: Tensor, channels_last: bool) -> Tensor:
    """``tensor`` in the given layout: itself if it is so already, else a copy."""
    if not channels_last:
        return tensor.contiguous()
    moved = tensor.movedim(1, -1)
    return tensor if moved.is_contiguous() else moved.contiguous().movedim(-1, 1)


def settle(outputs: Tensor) -> Tensor:
    """``outputs`` in one of the two layouts."""
    return dense(outputs, is_channels_last(outputs))


def settle_gradient(gradient: Tensor, outputs: Tensor, *rest) -> tuple:
    """The arguments of a backward operation, the incoming gradient in the layout of ``outputs``."""
    return dense(gradient, is_channels_last(outputs)), outputs, *rest


def empty(outputs: Tensor, samples: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [samples, channels, ...] with the trailing shape and layout of ``outputs``."""
    trailing = outputs.shape[2:]
    if is_channels_last(outputs):
        return outputs.new_empty((samples, *trailing, channels), dtype=dtype).movedim(-1, 1)
    return outputs.new_empty((samples, channels, *trailing), dtype=dtype)


def trailing_size(outputs: Tensor) -> int:
    return math.prod(outputs.shape[2:])


def channels_minor(outputs: Tensor) -> bool:
    """Whether dimension 1 is innermost in memory: plain rows, and channels-last maps."""
    return trailing_size(outputs) == 1 or is_channels_last(outputs)


def units(size: int) -> tuple[int, int]:
    """``size`` as (units, VEC) with VEC its largest power of two up to 16.

    Triton sees at compile time whether an integer argument is a multiple of 16, and nothing
    else: a size of 1000 would be read one element at a time. Passing ``size // VEC`` with VEC
    known when compiling gives full-width loads without compiling anew for each size.
    """
    vec = min(size & -size, 16) if size else 1
    return size // vec, vec


def blocks(length: int, elements: int = 1024) -> tuple[int, int]:
    """(rows, elements) of one program's tile of a matrix of rows of ``length``, powers of two.

    The number of rows has no say: it varies from batch to batch, and tiles are compiled in.
    """
    block_l = min(next_power_of_2(length), elements)
    return elements // block_l, block_l
