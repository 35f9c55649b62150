"""The router's forward kernels: scores to weights, experts, and the plan or what it is made from.

``route`` takes blocks of consecutive samples and leaves each block's counts for _row_plan.py;
``route_and_plan`` takes the few samples of a small batch and does it all in one launch.

Shapes: N samples, M experts, K active experts per sample, R = N*K rows, B blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._scores import (
    experts_of_tile,
    exponentials,
    load_scores,
    of_samples,
    perturbed,
    rows_of_tile,
)
from ._selection import choose, counts_at, every_count


@triton.jit(do_not_specialize=["N"])
def route_kernel(
    # inputs
    clean_ptr,  # [N, M]
    noise_ptr,  # [N, M]; not read when NOISE is 0
    eps_ptr,  # [N, M]; seed and first sample, int64 [2], when NOISE is 2; not read when NOISE is 0
    # outputs
    weights_ptr,  # [N, K], largest first
    experts_ptr,  # [N, K] int64
    ranks_ptr,  # [N, K] int32, earlier samples of this block with the same expert
    counts_ptr,  # [B, M] int32, rows of each expert in this block
    sums_ptr,  # [B, M], sum of p over this block
    # sizes
    N,
    STRIDE_C: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_E: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr,
    NOISE: tl.constexpr, RENORMALIZE: tl.constexpr,
    # tunables
    TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr, FIELDS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Grid (B,). A program owns TILES * BLOCK_N consecutive samples, BLOCK_N at a time."""
    DTYPE: tl.constexpr = sums_ptr.dtype.element_ty
    PARTS: tl.constexpr = BLOCK_M // WIDTH
    block = tl.program_id(0).to(tl.int64)
    row, column = rows_of_tile(BLOCK_N, BLOCK_M, WIDTH)
    m = experts_of_tile(BLOCK_M, WIDTH)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    count = tl.zeros((PARTS // FIELDS, 1, WIDTH), tl.int32)
    total = tl.zeros((PARTS, BLOCK_N, WIDTH), DTYPE)

    first = block * TILES * BLOCK_N
    # Beyond the block's last sample it is read again, with its noise, if that is drawn: what it
    # gives there is not used, and is no number only where the sample's own is none.
    last = tl.minimum(first + TILES * BLOCK_N, N) - 1
    mask = None if M == BLOCK_M else column < M
    clean, noise, eps = load_scores(
        clean_ptr, noise_ptr, eps_ptr, STRIDE_C, STRIDE_N, STRIDE_E,
        tl.minimum(first + row, last), column, mask, NOISE,
    )  # fmt: skip
    for _ in range(TILES):
        sample = first + offs_n
        z, _, _ = perturbed(
            clean, noise, eps, eps_ptr, tl.minimum(sample, last)[None, :, None], DTYPE, NOISE,
            BLOCK_N, BLOCK_M, WIDTH,
        )  # fmt: skip
        first += BLOCK_N
        if TILES > 1:
            # In flight while this tile is worked on. Not before z: with clean, noise and eps of
            # two tiles in registers at once, a quarter fewer programs fit on a multiprocessor.
            clean, noise, eps = load_scores(
                clean_ptr, noise_ptr, eps_ptr, STRIDE_C, STRIDE_N, STRIDE_E,
                tl.minimum(first + row, last), column, mask, NOISE,
            )  # fmt: skip
        e, size = exponentials(z, m < M)
        p = e * of_samples(tl.where(sample < N, 1.0 / size, 0.0))
        total += p
        weights, experts, here = choose(
            p, size, sample < N, m, K, RENORMALIZE, BLOCK_N, BLOCK_K, PARTS, WIDTH, FIELDS, BITS
        )  # fmt: skip
        earlier = tl.cumsum(here, axis=1) - here
        rank = counts_at(earlier + count, experts, K, BLOCK_K, PARTS, WIDTH, FIELDS, BITS)
        count += tl.sum(here, axis=1, keep_dims=True)

        slot = sample[:, None] * K + offs_k
        slots = (sample < N)[:, None] & (offs_k < K)
        tl.store(weights_ptr + slot, weights, slots)
        tl.store(experts_ptr + slot, experts.to(tl.int64), slots)
        tl.store(ranks_ptr + slot, rank, slots)

    tl.store(counts_ptr + block * M + m, every_count(count, PARTS, WIDTH, FIELDS, BITS), m < M)
    tl.store(sums_ptr + block * M + m, tl.sum(total, axis=1)[:, None, :], m < M)


@triton.jit(do_not_specialize=["N"])
def route_and_plan_kernel(
    # inputs
    clean_ptr, noise_ptr, eps_ptr,  # as in route_kernel
    # outputs
    weights_ptr, experts_ptr,  # as in route_kernel
    positions_ptr,  # [N, K] int32
    rows_ptr,  # [R] int32
    offsets_ptr,  # [M + 1] int32
    mean_ptr,  # [M]
    # sizes
    N,
    STRIDE_C: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_E: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr,
    NOISE: tl.constexpr, RENORMALIZE: tl.constexpr,
    # tunables
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
    FIELDS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Grid (1,). The program owns all N <= BLOCK_N samples.

    Nothing that it writes is read again: between the two there would be no barrier.
    """
    DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
    PARTS: tl.constexpr = BLOCK_M // WIDTH
    row, column = rows_of_tile(BLOCK_N, BLOCK_M, WIDTH)
    m = experts_of_tile(BLOCK_M, WIDTH)
    sample = tl.arange(0, BLOCK_N).to(tl.int64)
    clean, noise, eps = load_scores(
        clean_ptr, noise_ptr, eps_ptr, STRIDE_C, STRIDE_N, STRIDE_E, row.to(tl.int64), column,
        (row < N) & (column < M), NOISE,
    )  # fmt: skip
    z, _, _ = perturbed(
        clean, noise, eps, eps_ptr, sample[None, :, None], DTYPE, NOISE, BLOCK_N, BLOCK_M, WIDTH
    )
    e, size = exponentials(z, m < M)
    p = e * of_samples(tl.where(sample < N, 1.0 / size, 0.0))
    weights, experts, here = choose(
        p, size, sample < N, m, K, RENORMALIZE, BLOCK_N, BLOCK_K, PARTS, WIDTH, FIELDS, BITS
    )  # fmt: skip
    earlier = tl.cumsum(here, axis=1) - here
    count = every_count(tl.sum(here, axis=1, keep_dims=True), PARTS, WIDTH, FIELDS, BITS)
    count = tl.reshape(count, (BLOCK_M,))
    end = tl.cumsum(count, axis=0)
    start = tl.gather(end - count, tl.reshape(experts, (BLOCK_N * BLOCK_K,)), axis=0)
    position = counts_at(earlier, experts, K, BLOCK_K, PARTS, WIDTH, FIELDS, BITS)
    position += tl.reshape(start, (BLOCK_N, BLOCK_K))

    offs_k = tl.arange(0, BLOCK_K)[None, :]
    slot = sample[:, None] * K + offs_k
    mask = (sample < N)[:, None] & (offs_k < K)
    tl.store(weights_ptr + slot, weights, mask)
    tl.store(experts_ptr + slot, experts.to(tl.int64), mask)
    tl.store(positions_ptr + slot, position, mask)
    tl.store(rows_ptr + position, slot.to(tl.int32), mask)
    offs_m = tl.arange(0, BLOCK_M)
    tl.store(offsets_ptr + 1 + offs_m, end, offs_m < M)
    tl.store(offsets_ptr, 0)
    # Not p itself, a product: a compiler may join it and the sum's first step into one fma, which
    # rounds the other lane's product and not its own, so that the lanes disagree about their sum.
    total = tl.sum(tl.where((sample < N)[None, :, None], p, 0.0), axis=1)[:, None, :]
    tl.store(mean_ptr + m, total / N, m < M)
