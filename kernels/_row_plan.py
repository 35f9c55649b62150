"""The row plan of the router: from ranks and counts of blocks to offsets, positions and rows.

``route`` left, for blocks of consecutive samples, how many rows each expert has, and in each slot
its rank: how many earlier samples of the same block chose the same expert. Then

    position = rows of lower experts + the expert's rows in earlier blocks + rank

orders rows by expert, then by sample, with no sort and no atomics. Up to TWO_LAUNCHES samples there
are few enough blocks for every program of ``plan`` to sum the counts itself, and ``plan`` is all;
above, ``scan`` does that first, so that the work stays linear in N.

Shapes: N samples, M experts, K active experts per sample, R = N*K rows, B blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, next_power_of_2
from ._launch import Launch

TWO_LAUNCHES = 4096
# A tile of the scan: all blocks, in one step. Counts are replaced in place: no two threads may hold
# the same one, as they would of a tile of fewer numbers than threads.
SCAN_EXPERTS, SCAN_BLOCKS = 1, 2048
SCAN_WARPS = 8  # with 4 a program of the scan takes 1.6 times as many instructions for each warp


@triton.jit(do_not_specialize=["N", "B"])
def _scan_kernel(
    counts_ptr,  # [B, M] int32, becomes the sum over the blocks before
    totals_ptr,  # [M] int32, sum over all blocks
    sums_ptr,  # [B, M]
    mean_ptr,  # [M]
    N, B,
    M: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Grid (M / BLOCK_E,). A program owns BLOCK_E experts over all blocks."""
    offs_m = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    before = tl.zeros((BLOCK_E,), tl.int32)
    total = tl.zeros((BLOCK_E,), mean_ptr.dtype.element_ty)
    for first in range(0, B, BLOCK_B):
        offs_b = first + tl.arange(0, BLOCK_B)
        mask = (offs_b < B)[:, None] & (offs_m < M)[None, :]
        at = offs_b[:, None] * M + offs_m[None, :]
        count = tl.load(counts_ptr + at, mask, other=0)
        total += tl.sum(tl.load(sums_ptr + at, mask, other=0.0), axis=0)
        tl.store(counts_ptr + at, tl.cumsum(count, axis=0) - count + before[None, :], mask)
        before += tl.sum(count, axis=0)
    tl.store(totals_ptr + offs_m, before, offs_m < M)
    tl.store(mean_ptr + offs_m, total / N, offs_m < M)


@triton.jit(do_not_specialize=["N", "B"])
def _plan_kernel(
    # inputs
    counts_ptr,  # [B, M] int32: rows of each block, or, if SCANNED, of the blocks before it
    totals_ptr,  # [M] int32, rows of each expert; read only if SCANNED
    sums_ptr,  # [B, M], sums of p; read only if not SCANNED
    experts_ptr,  # [N, K] int64
    # outputs
    positions_ptr,  # [N, K] int32, holds the ranks before
    rows_ptr,  # [R] int32
    offsets_ptr,  # [M + 1] int32
    mean_ptr,  # [M]; written only if not SCANNED
    # sizes
    N, B,
    M: tl.constexpr, SLOTS: tl.constexpr, K: tl.constexpr, SCANNED: tl.constexpr,
    # tunables
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (B + 1,). A program owns the SLOTS slots of one block, the last one offsets and mean."""
    block = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    if SCANNED:
        total = tl.load(totals_ptr + offs_m, mask_m, other=0)
        before = tl.load(counts_ptr + block * M + offs_m, mask_m & (block < B), other=0)
    else:
        total = tl.zeros((BLOCK_M,), tl.int32)
        before = tl.zeros((BLOCK_M,), tl.int32)
        for first in range(0, B, BLOCK_B):
            b = (first + tl.arange(0, BLOCK_B))[:, None]
            count = tl.load(
                counts_ptr + b * M + offs_m[None, :], (b < B) & mask_m[None, :], other=0
            )
            total += tl.sum(count, axis=0)
            before += tl.sum(tl.where(b < block, count, 0), axis=0)
    end = tl.cumsum(total, axis=0)

    if block == B:
        tl.store(offsets_ptr + 1 + offs_m, end, mask_m)
        tl.store(offsets_ptr, 0)
        if not SCANNED:
            p = tl.zeros((BLOCK_M,), mean_ptr.dtype.element_ty)
            for first in range(0, B, BLOCK_B):
                b = (first + tl.arange(0, BLOCK_B))[:, None]
                mask = (b < B) & mask_m[None, :]
                p += tl.sum(tl.load(sums_ptr + b * M + offs_m[None, :], mask, other=0.0), axis=0)
            tl.store(mean_ptr + offs_m, p / N, mask_m)
    else:
        base = end - total + before
        for first in range(0, SLOTS, BLOCK_S):
            within = first + tl.arange(0, BLOCK_S)
            slot = block * SLOTS + within
            mask = (within < SLOTS) & (slot < N * K)
            expert = tl.load(experts_ptr + slot, mask, other=0).to(tl.int32)
            rank = tl.load(positions_ptr + slot, mask, other=0)
            position = tl.gather(base, expert, axis=0) + rank
            tl.store(positions_ptr + slot, position, mask)
            tl.store(rows_ptr + position, slot, mask)


def max_blocks(n: int, m: int) -> int:
    """How many blocks ``route`` may cut N samples into.

    Without a scan every program of ``plan`` reads all [B, M] counts: few. With one, 2,048 one-warp
    programs fill a large GPU (132 multiprocessors hold 2,112 of 128 registers), and the scan of a
    fixed number of blocks costs the same for any N.
    """
    if n > TWO_LAUNCHES:
        return SCAN_BLOCKS
    return 256 if m <= 256 else 128


def plan_rows(
    counts: Tensor,  # [B, M] int32, overwritten
    sums: Tensor,  # [B, M]
    experts: Tensor,  # [N, K] int64
    positions: Tensor,  # [N, K] int32, the ranks; becomes the positions
    rows: Tensor,  # [R] int32, written
    offsets: Tensor,  # [M + 1] int32, written
    mean: Tensor,  # [M], written
    block_samples: int,
) -> list[Launch]:
    """One launch up to TWO_LAUNCHES samples, two above."""
    (n, k), (blocks, m) = experts.shape, sums.shape
    scanned, slots, block_m = n > TWO_LAUNCHES, block_samples * k, next_power_of_2(m)
    both = {"counts_ptr": counts, "sums_ptr": sums, "mean_ptr": mean, "N": n, "B": blocks, "M": m}
    both["totals_ptr"] = counts.new_empty((m,)) if scanned else None
    block_b = min(256, max(1, 4096 // block_m))  # whatever B, so that another N compiles nothing
    num_warps = 1 if scanned or block_m * block_b <= 1024 else 4
    launches = [Launch(
        _plan_kernel, blocks + 1, **both, experts_ptr=experts, positions_ptr=positions,
        rows_ptr=rows, offsets_ptr=offsets, SLOTS=slots, K=k, SCANNED=scanned,
        BLOCK_B=block_b, BLOCK_M=block_m,
        # A slot's rank is replaced in place: no two threads may hold the same slot.
        BLOCK_S=min(512, max(32 * num_warps, next_power_of_2(slots))), num_warps=num_warps,
    )]  # fmt: skip
    if scanned:
        launches.insert(0, Launch(
            _scan_kernel, cdiv(m, SCAN_EXPERTS), **both,
            BLOCK_B=SCAN_BLOCKS, BLOCK_E=SCAN_EXPERTS, num_warps=SCAN_WARPS,
        ))  # fmt: skip
    return launches
