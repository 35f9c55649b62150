"""Device code of the router's choice: the K largest p, and which samples chose an expert before.

Tiles are [PARTS, BLOCK_N, WIDTH], see _scores.py; slots are [BLOCK_N, BLOCK_K], BLOCK_K >= K.

How often experts were chosen is counted in fields of BITS bits, FIELDS = 32 / BITS parts (at most
PARTS) to an integer: tiles of counts are [PARTS / FIELDS, BLOCK_N, WIDTH]. So a chosen expert is
one integer's bit, not a comparison with every expert, and a scan over samples shuffles few numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._scores import max_over_experts, of_samples, sum_over_experts


@triton.jit
def field_of(expert, WIDTH: tl.constexpr, FIELDS: tl.constexpr, BITS: tl.constexpr):
    """Where an expert is counted: the integer, of PARTS / FIELDS * WIDTH, and the field's shift."""
    part = expert // WIDTH
    return part // FIELDS * WIDTH + expert % WIDTH, part % FIELDS * BITS


@triton.jit
def _field(integer, shift, BITS: tl.constexpr):
    MASK: tl.constexpr = 2**BITS - 1 if BITS < 32 else -1
    return (integer >> shift) & MASK


@triton.jit
def integers_of_tile(PARTS: tl.constexpr, WIDTH: tl.constexpr, FIELDS: tl.constexpr):
    """The number of each integer, [PARTS / FIELDS, 1, WIDTH]."""
    group = tl.arange(0, PARTS // FIELDS)[:, None, None]
    return group * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def choose(
    p, size, mask_n, m, K: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, FIELDS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The K largest p of each sample, ties to the lowest expert.

    Returns weights and experts, slots, and counts: one for each expert of the samples in mask_n.

    A round takes the largest p, then the lowest expert that has it: two reductions of one 32-bit
    number. One reduction of an integer made of both would need 64 bits (30 of p, 10 of the
    expert): as many shuffles, and four instructions for each maximum. As integers, p have the same
    order (none is negative), and sm_90 takes the largest of three of them in one instruction.
    Experts beyond M have p = 0 and the highest numbers, so that none is chosen.
    """
    LAST: tl.constexpr = 2147483647
    INTEGER: tl.constexpr = tl.int64 if p.dtype == tl.float64 else tl.int32
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    sound = size == size
    key = p.to(INTEGER, bitcast=True)  # -1 where taken
    weights = tl.zeros((BLOCK_N, BLOCK_K), p.dtype)
    experts = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    counts = tl.zeros((PARTS // FIELDS, BLOCK_N, WIDTH), tl.int32)
    at = integers_of_tile(PARTS, WIDTH, FIELDS)
    for j in range(K):
        largest = max_over_experts(key)
        backwards = tl.where(key == of_samples(largest), LAST - m, 0)
        lowest = max_over_experts(backwards)
        key = tl.where(backwards == of_samples(lowest), -1, key)
        # A row of NaN chooses 0..K-1, as a stable descending sort would.
        expert = tl.where(sound, LAST - lowest, j)
        place, shift = field_of(expert, WIDTH, FIELDS, BITS)
        one = tl.where(mask_n, 1 << shift, 0)
        counts += tl.where(at == of_samples(place), of_samples(one), 0)
        weights = tl.where(offs_k == j, largest.to(p.dtype, bitcast=True)[:, None], weights)
        experts = tl.where(offs_k == j, expert[:, None], experts)
    weights = tl.where(sound[:, None], weights, size[:, None])
    if RENORMALIZE:
        weights /= tl.sum(weights, axis=1)[:, None]
    return weights, experts, counts


@triton.jit
def counts_at(
    counts, experts, K: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, FIELDS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """What is counted at each sample's experts, slots.

    Not tl.gather: of a tile on several warps it takes shared memory, and Triton 3.8 aborts the
    process for small ones of rank two.
    """
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    at = integers_of_tile(PARTS, WIDTH, FIELDS)
    found = tl.zeros(experts.shape, tl.int32)
    for j in range(K):
        expert = tl.sum(tl.where(offs_k == j, experts, 0), axis=1)
        place, shift = field_of(expert, WIDTH, FIELDS, BITS)
        integer = sum_over_experts(tl.where(at == of_samples(place), counts, 0))
        found = tl.where(offs_k == j, _field(integer, shift, BITS)[:, None], found)
    return found


@triton.jit
def every_count(
    counts, PARTS: tl.constexpr, WIDTH: tl.constexpr, FIELDS: tl.constexpr, BITS: tl.constexpr
):
    """[PARTS / FIELDS, 1, WIDTH] to one count of each expert, [PARTS, 1, WIDTH]."""
    shift = (tl.arange(0, FIELDS) * BITS)[None, :, None]
    return tl.reshape(_field(counts, shift, BITS), (PARTS, 1, WIDTH))
