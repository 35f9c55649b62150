"""What the kernels of a cross-entropy share.

    CE(x, y) = logsumexp(x) - (1 - a) * x[y] - (a / C) * sum_c x[c]      a: label smoothing

An item has C channels, each ``step`` elements from the one before.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Partial sums come in multiples of this, a few of them zeros of programs without items: whoever
# adds them up can read 128 bits at a time.
PARTIALS = 16


@triton.jit
def cross_entropy(
    x_ptr,
    base,  # [BLOCK_T] addresses of the items' channel 0
    step,
    y,  # [BLOCK_T] int64 classes
    mask_t,
    ignore_index,
    C: tl.constexpr,
    SMOOTHING: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(losses, 0 where ignored; logsumexp). Each item is read once, with a running maximum and sum;
    nothing waits for the class before the loop ends, and x[y] is in the cache by then."""
    highest = tl.full([BLOCK_T], -float("inf"), dtype=COMPUTE)
    total = tl.zeros([BLOCK_T], dtype=COMPUTE)
    sum_x = tl.zeros([BLOCK_T], dtype=COMPUTE)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = mask_t[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + base[:, None] + c[None, :] * step, mask=mask, other=-float("inf")).to(
            COMPUTE
        )
        new = tl.maximum(highest, tl.max(x, axis=1))
        # Nothing finite so far: subtract 0, for -inf - (-inf) would make a NaN that stays.
        shift = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)
        highest = new
        if SMOOTHING > 0:
            sum_x += tl.sum(tl.where(mask, x, 0.0), axis=1)
    logsumexp = highest + tl.log(tl.where(mask_t, total, 1.0))

    counts = mask_t & (y != ignore_index)
    inside = (y >= 0) & (y < C)
    x_y = tl.load(x_ptr + base + y * step, mask=counts & inside, other=0.0).to(COMPUTE)
    tl.device_assert(inside | ~counts, "cross-entropy: target out of range")
    loss = logsumexp - (1.0 - SMOOTHING) * x_y
    if SMOOTHING > 0:
        loss -= (SMOOTHING / C) * sum_x
    return tl.where(counts, loss, 0.0), logsumexp


@triton.jit
def loss_gradient(
    x, logsumexp, target, channel, ignore_index, C: tl.constexpr, SMOOTHING: tl.constexpr
):
    """d CE / d x[channel]; 0 where the target is ignored. Arguments broadcast."""
    d_x = tl.exp(x - logsumexp) - SMOOTHING / C
    d_x = tl.where(channel == target, d_x - (1.0 - SMOOTHING), d_x)
    return tl.where(target == ignore_index, 0.0, d_x)


@triton.jit
def sum_of_partials(
    partials_ptr,  # [num_partials]
    num_partials,
    COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The sum of what programs left, in a fixed order, as one program of another launch."""
    total = tl.zeros([BLOCK_P], dtype=COMPUTE)
    for start in range(0, num_partials, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        total += tl.load(partials_ptr + offs_p, mask=offs_p < num_partials, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def sum_partials(
    loss_ptr,  # [], written
    partials_ptr,  # [partial_units * PARTIALS]
    partial_units,
    COMPUTE: tl.constexpr,
    PARTIALS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Add up the partial sums in a fixed order, as one program of another launch."""
    tl.store(loss_ptr, sum_of_partials(partials_ptr, partial_units * PARTIALS, COMPUTE, BLOCK_P))
