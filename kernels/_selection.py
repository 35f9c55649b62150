"""Device code of the router's choice: the K largest p, and which samples chose an expert before.

Tiles are [PARTS, BLOCK_N, WIDTH], see _scores.py; slots are [BLOCK_N, BLOCK_K], BLOCK_K >= K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._scores import max_over_experts, sum_over_experts


@triton.jit
def choose(
    p, size, m, mask_m, K: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The K largest p of each sample, ties to the lowest expert.

    Returns weights and experts, slots, and the tile of the rounds in which p was chosen, K if not.

    A round takes the largest p, then the lowest expert that has it: two reductions of one 32-bit
    number. One reduction of an integer made of both would need 64 bits (30 of p, 10 of the
    expert): as many shuffles, and a tenth more instructions.
    """
    LAST: tl.constexpr = 2147483647
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    # -1 where taken. All are alike in a row of NaN, which so chooses 0..K-1, as a stable
    # descending sort would; no round finds the same expert again.
    sound = size == size
    key = tl.where(mask_m, tl.where(sound[None, :, None], p, 1.0), -1.0)
    chosen = tl.full(p.shape, K, tl.int32)
    weights = tl.zeros((BLOCK_N, BLOCK_K), p.dtype)
    experts = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    for j in range(K):
        largest = max_over_experts(key)
        backwards = tl.where(key == largest[None, :, None], LAST - m, 0)
        lowest = max_over_experts(backwards)
        # backwards, not m: what is computed from p lies where p does, with no conversion
        here = backwards == lowest[None, :, None]
        key = tl.where(here, -1.0, key)
        chosen = tl.where(here, j, chosen)
        weights = tl.where(offs_k == j, largest[:, None], weights)
        experts = tl.where(offs_k == j, (LAST - lowest)[:, None], experts)
    weights = tl.where(sound[:, None], weights, size[:, None])
    if RENORMALIZE:
        weights /= tl.sum(weights, axis=1)[:, None]
    return weights, experts, chosen


@triton.jit
def count_samples(active, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """How many earlier samples of the tile have each expert active, and how many in all.

    Counts up to BLOCK_N need few bits: those of all parts are scanned in one integer if it has
    room, for one shuffle instead of PARTS.
    """
    BITS: tl.constexpr = 4 if BLOCK_N <= 8 else (8 if BLOCK_N <= 128 else 16)
    if PARTS > 1 and PARTS * BITS <= 64:
        FIELD: tl.constexpr = 2**BITS - 1
        WORD: tl.constexpr = tl.int32 if PARTS * BITS <= 32 else tl.int64
        shift = (tl.arange(0, PARTS) * BITS)[:, None, None].to(WORD)
        packed = tl.sum(active.to(WORD) << shift, axis=0, keep_dims=True)
        before = ((tl.cumsum(packed, axis=1) - packed) >> shift) & FIELD
        total = (tl.sum(packed, axis=1, keep_dims=True) >> shift) & FIELD
        return before.to(tl.int32), total.to(tl.int32)
    else:
        count = active.to(tl.int32)
        return tl.cumsum(count, axis=1) - count, tl.sum(count, axis=1, keep_dims=True)


@triton.jit
def at_chosen(table, chosen, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The int32 table's entries at the chosen experts, slots by round.

    Not tl.gather: of a tile on several warps it takes shared memory, and Triton 3.8 aborts the
    process for small ones of rank two.
    """
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    found = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    for j in range(K):
        entry = sum_over_experts(tl.where(chosen == j, table, 0))
        found = tl.where(offs_k == j, entry[:, None], found)
    return found
