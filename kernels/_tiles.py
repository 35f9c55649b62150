"""How gather's kernels walk over samples: tiles of planes, per-channel factors, memory layouts.

A sample is a number of planes, one behind the other in memory: its channels when each channel's
elements lie together and there are many of them (a factor is then one number a plane), else all of
it at once.

Shapes: N samples, M experts, K active experts per sample, C channels (dimension 1).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, next_power_of_2
from ._layout import trailing_size

TILE = 2048  # elements a program of 4 warps: 16 a thread, one 128-bit load of bytes
PLANE = 128  # the least elements for which a plane of its own is worth it
FEW_CHANNELS = 8


@triton.jit
def expert_of(position, offsets_ptr, mask, M: tl.constexpr, BITS: tl.constexpr):
    """The last expert whose rows begin at or before ``position``, found by bisection."""
    expert = tl.zeros_like(position).to(tl.int32)
    for bit in tl.static_range(BITS):
        next_expert = expert + (1 << (BITS - 1 - bit))
        inside = mask & (next_expert < M)
        begin = tl.load(offsets_ptr + next_expert, inside, other=0)
        expert = tl.where(inside & (begin <= position), next_expert, expert)
    return expert


@triton.jit
def per_channel(
    ptr, expert, plane, channel, mask, C: tl.constexpr, BY_PLANE: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """ptr[expert, channel], to be used with a tile [BLOCK_P, BLOCK_I]."""
    base = ptr + expert.to(tl.int64)[:, None] * C
    if BY_PLANE:
        value = tl.load(base + plane[:, None], mask[:, None], other=0.0)
    elif C <= FEW:
        # Selecting among a few numbers is cheaper than a load for every element.
        value = tl.load(base, mask[:, None], other=0.0)
        for c in tl.static_range(1, C):
            other = tl.load(base + c, mask[:, None], other=0.0)
            value = tl.where(channel[None, :] == c, other, value)
    else:
        value = tl.load(base + channel[None, :], mask[:, None], other=0.0)
    return value


@triton.jit
def tile_of(
    N, PLANES: tl.constexpr, INNER: tl.constexpr, SPATIAL: tl.constexpr, C: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """What a program owns: sample and plane [BLOCK_P], element in the plane and its channel
    [BLOCK_I], and the two masks."""
    CHUNKS: tl.constexpr = (INNER + BLOCK_I - 1) // BLOCK_I
    program = tl.program_id(0)
    item = (program // CHUNKS).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    chunk = program % CHUNKS
    if INNER >= 2**31 - BLOCK_I:
        chunk = chunk.to(tl.int64)
    inner = chunk * BLOCK_I + tl.arange(0, BLOCK_I)
    sample = item // PLANES
    return sample, item % PLANES, inner, (inner // SPATIAL) % C, sample < N, inner < INNER


def channel_sizes(x: Tensor) -> tuple[int, int]:
    """(C, SPATIAL) of [N, C, ...]."""
    return (x.shape[1] if x.dim() > 1 else 1), trailing_size(x)


def tile_walk(x: Tensor, positions: Tensor, offsets: Tensor, affine: bool, channels_last: bool):
    """Programs and arguments of a tile walk over x in one layout."""
    channels, spatial = channel_sizes(x)
    elements = channels * spatial
    # Planes of odd sizes would only break the alignment that whole samples may have.
    by_plane = affine and not channels_last and spatial >= PLANE
    by_plane = by_plane and (spatial % 16 == 0 or elements % 16 != 0)
    planes, inner = (channels, spatial) if by_plane else (1, elements)
    block_i = min(TILE, next_power_of_2(inner))
    block_p = TILE // block_i  # whatever N is: it varies, and tiles are compiled in
    experts = offsets.numel() - 1
    return cdiv(x.shape[0] * planes, block_p) * cdiv(inner, block_i), {
        "N": x.shape[0],
        "PLANES": planes,
        "INNER": inner,
        "SPATIAL": 1 if channels_last else spatial,
        "C": channels,
        "M": experts,
        "K": positions.shape[1],
        "BY_PLANE": by_plane,
        "BITS": (experts - 1).bit_length(),
        "FEW": FEW_CHANNELS,
        "BLOCK_P": block_p,
        "BLOCK_I": block_i,
    }
