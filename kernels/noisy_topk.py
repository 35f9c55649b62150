"""The router: noise, softmax, the K largest experts, the batch mean, and the plan that moves rows.

    z = clean + eps * softplus(noise),   p = softmax(z),   the K largest p are active (equation 1)

One launch for a batch of up to 512 samples (fewer for a wide hub), two up to 4,096, three above,
one backward; work linear in N, nothing sorted, no atomics, no host read. Above one launch, samples
are cut into blocks of consecutive samples, one program each: the first launch, ``route``, leaves
per block the sum of p and the number of rows of each expert, and _row_plan.py turns these into the
mean and the plan. Backward computes p again: reading a saved p costs as much as reading the clean
score, and writing it comes on top.

No kernel compiles again for another N, unless N passes a limit: 64 samples, those between one, two
and three launches, and the powers of two at which the blocks grow.

Shapes: N samples, M experts, K active experts per sample, R = N*K rows, B blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _row_plan
from ._common import TRITON_DTYPE, accumulator, cdiv, next_power_of_2
from ._launch import Launch, Plan, apply, once_differentiable, register
from ._route import route_and_plan_kernel, route_kernel
from ._scores import (
    as_tile,
    experts_of_tile,
    exponentials,
    load_scores,
    of_samples,
    perturbed,
    rows_of_tile,
    sum_over_experts,
)

TILE = 512  # elements of p that one warp holds: 16 a lane. 32 a lane spills for M = 1000
BACKWARD_TILE = 8  # samples, for programs enough at the paper's 48; forward has one for those
SMALL_BATCH = 64  # samples; one warp holds them for a hub of up to 8
# What one program routes and plans, in samples and in elements of p. It has one multiprocessor,
# which takes about 4 us for the 1,900 to 2,700 instructions of 8 warps (estimated, at 2.5 a cycle):
# as long as a second launch. Registers would allow 16 warps.
ONE_LAUNCH, ONE_LAUNCH_ELEMENTS = 512, 8 * TILE
NO_NOISE, GIVEN, DRAWN = 0, 1, 2  # where eps comes from


@triton.jit(do_not_specialize=["N"])
def _route_backward_kernel(
    # inputs
    clean_ptr, noise_ptr, eps_ptr,  # as in route_kernel
    experts_ptr,  # [N, K] int64
    grad_weights_ptr,  # [N, K] or nothing
    grad_mean_ptr,  # [M] or nothing
    # outputs
    grad_clean_ptr,  # [N, M]
    grad_noise_ptr,  # [N, M]; not written when NOISE is 0
    # sizes
    N,
    STRIDE_C: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_E: tl.constexpr,
    STRIDE_WN: tl.constexpr, STRIDE_WK: tl.constexpr, STRIDE_M: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr,
    NOISE: tl.constexpr, RENORMALIZE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, HAS_MEAN: tl.constexpr,
    # tunables
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (N / BLOCK_N,). A program owns BLOCK_N samples and computes their p again."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    row, column = rows_of_tile(BLOCK_N, BLOCK_M, WIDTH)
    row += first
    m = experts_of_tile(BLOCK_M, WIDTH)
    offs_n = first + tl.arange(0, BLOCK_N)
    mask = (row < N) & (column < M)
    clean, noise, eps = load_scores(
        clean_ptr, noise_ptr, eps_ptr, STRIDE_C, STRIDE_N, STRIDE_E, row, column, mask, NOISE
    )
    z, noise, eps = perturbed(
        clean, noise, eps, eps_ptr, offs_n[None, :, None], DTYPE, NOISE, BLOCK_N, BLOCK_M, WIDTH
    )  # fmt: skip
    e, size = exponentials(z, m < M)
    p = tl.where(m < M, e * of_samples(1.0 / size), 0.0)

    grad_p = p * 0.0  # not tl.zeros: what is computed from p lies where p does
    if HAS_WEIGHTS:
        offs_k = tl.arange(0, BLOCK_K)[None, :]
        sample = offs_n[:, None]
        slots = (sample < N) & (offs_k < K)
        experts = tl.load(experts_ptr + sample * K + offs_k, slots, other=0).to(tl.int32)
        at = sample * STRIDE_WN + offs_k * STRIDE_WK
        grads = tl.load(grad_weights_ptr + at, slots, other=0.0).to(DTYPE)
        active = p < 0.0
        for j in range(K):
            expert = tl.sum(tl.where(offs_k == j, experts, 0), axis=1)
            grad = tl.sum(tl.where(offs_k == j, grads, 0.0), axis=1)
            # Not of_samples: from slots, not from a sum over the tile; two warps convert it more.
            here = m == expert[None, :, None]
            grad_p = tl.where(here, grad[None, :, None], grad_p)
            active = active | here
        if RENORMALIZE:
            # w = p / S with S the sum of the active p: dL/dp = (dL/dw - sum(dL/dw * w)) / S
            chosen = tl.where(active, p, 0.0)
            size = of_samples(sum_over_experts(chosen))
            slope = of_samples(sum_over_experts(grad_p * chosen)) / size
            grad_p = tl.where(active, (grad_p - slope) / size, 0.0)
    if HAS_MEAN:
        # as wide as the scores, so that it is loaded to where p lies
        grad_mean = tl.load(grad_mean_ptr + column * STRIDE_M, column < M, other=0.0)
        grad_p += as_tile(grad_mean, DTYPE, BLOCK_N) / N
    grad_z = p * (grad_p - of_samples(sum_over_experts(p * grad_p)))

    at = row * M + column
    tl.store(grad_clean_ptr + at, tl.reshape(grad_z, at.shape), mask)
    if NOISE != 0:
        sigmoid = 1.0 / (1.0 + tl.exp(-noise))
        tl.store(grad_noise_ptr + at, tl.reshape(grad_z * eps * sigmoid, at.shape), mask)


def _tile(m: int, samples: int = SMALL_BATCH) -> tuple[int, int]:
    """(BLOCK_N, BLOCK_M): so many samples, or as many as one warp holds, at least one."""
    block_m = max(4, next_power_of_2(m))
    return min(samples, max(1, TILE // block_m)), block_m


def _width(m: int, block_m: int, lanes: int, itemsize: int) -> int:
    """WIDTH for a sample on so many lanes, each with as many adjacent experts as one load takes."""
    return min(block_m, lanes * min(16 // itemsize, m & -m))


def _fields(samples: int, block_m: int, width: int) -> dict[str, int]:
    """FIELDS and BITS with which up to so many samples are counted, see _selection.py."""
    bits = next(bits for bits in (4, 8, 16, 32) if samples < 2**bits)
    return {"FIELDS": min(32 // bits, block_m // width), "BITS": bits}


def _blocks(n: int, m: int) -> tuple[int, int]:
    """(B, TILES): blocks of TILES * BLOCK_N samples; powers of two, so that few kernels compile."""
    block_n, _ = _tile(m)
    tiles = next_power_of_2(cdiv(n, block_n * _row_plan.max_blocks(n, m)))
    return cdiv(n, block_n * tiles), tiles


def _options(m, k, itemsize, noise, renormalize, strides, tile) -> dict:
    """Compile-time arguments that ``route`` and backward share, for tiles of that shape.

    Strides are among them: they are M or 2M in practice, and a known one makes loads wide that
    Triton would leave narrow for a stride that is not a multiple of 16.
    """
    block_n, block_m = tile
    warps = max(1, block_n * block_m // TILE)
    names = ("STRIDE_C", "STRIDE_N", "STRIDE_E")
    return dict(zip(names, strides, strict=True)) | {
        "M": m,
        "K": k,
        "NOISE": noise,
        "RENORMALIZE": renormalize,
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "BLOCK_K": next_power_of_2(k),
        "WIDTH": _width(m, block_m, max(1, 32 * warps // block_n), itemsize),
        "num_warps": warps,
    }


def _one_launch(n: int, m: int, itemsize: int) -> dict | None:
    """Compile-time arguments of ``route_and_plan`` unlike those of ``route``; None if too large.

    Two sizes of tile, not one for each power of two: a last, smaller batch compiles nothing. A
    sample of up to 16 experts is one lane's, which needs no shuffle to reduce it.
    """
    block_m = max(4, next_power_of_2(m))
    limit = min(ONE_LAUNCH, ONE_LAUNCH_ELEMENTS // block_m)
    if n > limit or limit < SMALL_BATCH:
        return None
    block_n = SMALL_BATCH if n <= SMALL_BATCH else limit
    width = _width(m, block_m, 1 if block_m <= 16 else 4, itemsize)
    warps = max(1, block_n * block_m // TILE)
    return {"BLOCK_N": block_n, "WIDTH": width, "num_warps": warps} | _fields(
        block_n, block_m, width
    )


def _rows(x: Tensor | None) -> Tensor | None:
    """Any distance between samples will do, such as in the two halves of one [N, 2M] tensor."""
    return x if x is None or x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _inputs(clean, noise, eps, seed):
    """What a kernel reads, by name, the strides between samples, and where eps is from."""
    read = {"clean_ptr": clean, "noise_ptr": noise}
    if seed is not None:  # with the first sample's number
        return read | {"eps_ptr": seed}, (clean.stride(0), noise.stride(0), 0), DRAWN
    if eps is not None:
        strides = (clean.stride(0), noise.stride(0), eps.stride(0))
        return read | {"eps_ptr": eps}, strides, GIVEN
    return read | {"eps_ptr": clean}, (clean.stride(0), 0, 0), NO_NOISE


def _forward_fake(clean, noise, eps, seed, k, renormalize):
    n, m = clean.shape
    return (
        clean.new_empty((n, k), dtype=accumulator(clean.dtype)),
        clean.new_empty((m,), dtype=accumulator(clean.dtype)),
        clean.new_empty((n, k), dtype=torch.int64),
        clean.new_empty((m + 1,), dtype=torch.int32),
        clean.new_empty((n * k,), dtype=torch.int32),
        clean.new_empty((n, k), dtype=torch.int32),
    )


def _forward_settle(clean, noise, eps, seed, k, renormalize):
    return _rows(clean), _rows(noise), _rows(eps), seed, k, renormalize


def plan_forward(clean, noise, eps, seed, k, renormalize) -> Plan:
    outputs = _forward_fake(clean, noise, eps, seed, k, renormalize)
    weights, mean, experts, offsets, rows, positions = outputs
    n, m = clean.shape
    inputs, strides, source = _inputs(clean, noise, eps, seed)
    options = _options(m, k, clean.element_size(), source, renormalize, strides, _tile(m))
    small = _one_launch(n, m, clean.element_size())
    written = {"weights_ptr": weights, "experts_ptr": experts}
    if small is not None:
        written |= {"positions_ptr": positions, "rows_ptr": rows}
        written |= {"offsets_ptr": offsets, "mean_ptr": mean}
        route = Launch(route_and_plan_kernel, 1, **inputs, **written, N=n, **options | small)
        return Plan(outputs, [route])
    blocks, tiles = _blocks(n, m)
    counts = clean.new_empty((blocks, m), dtype=torch.int32)
    sums = clean.new_empty((blocks, m), dtype=mean.dtype)
    written |= {"ranks_ptr": positions, "counts_ptr": counts, "sums_ptr": sums}
    samples = tiles * options["BLOCK_N"]
    options |= _fields(samples, options["BLOCK_M"], options["WIDTH"])
    route = Launch(route_kernel, blocks, **inputs, **written, N=n, TILES=tiles, **options)
    planned = _row_plan.plan_rows(counts, sums, experts, positions, rows, offsets, mean, samples)
    return Plan(outputs, [route, *planned])


def _backward_fake(clean, noise, eps, seed, experts, grad_weights, grad_mean, renormalize):
    silent = eps is None and seed is None
    return clean.new_empty(clean.shape), noise.new_empty((0,) if silent else noise.shape)


def _regular(grad: Tensor | None) -> Tensor | None:
    """An incoming gradient, copied unless it is dense or one number repeated, as a sum sends it
    back: its strides are compile-time and must not follow N."""
    return grad.contiguous() if grad is not None and any(grad.stride()) else grad


def _strides(grad: Tensor | None, *shape: int) -> tuple[int, ...]:
    if grad is None or not grad.is_contiguous():
        return (0,) * len(shape)
    return *shape[1:], 1


def _backward_settle(clean, noise, eps, seed, experts, grad_weights, grad_mean, renormalize):
    scores = (_rows(clean), _rows(noise), _rows(eps), seed)
    return *scores, experts, _regular(grad_weights), _regular(grad_mean), renormalize


def plan_backward(clean, noise, eps, seed, experts, grad_weights, grad_mean, renormalize) -> Plan:
    outputs = _backward_fake(clean, noise, eps, seed, experts, grad_weights, grad_mean, renormalize)
    n, m = clean.shape
    k = experts.shape[1]
    inputs, strides, source = _inputs(clean, noise, eps, seed)
    tile = _tile(m, BACKWARD_TILE)
    options = _options(m, k, clean.element_size(), source, renormalize, strides, tile)
    stride_wn, stride_wk = _strides(grad_weights, n, k)
    (stride_m,) = _strides(grad_mean, m)
    backward = Launch(
        _route_backward_kernel, cdiv(n, options["BLOCK_N"]), **inputs,
        experts_ptr=experts, grad_weights_ptr=grad_weights, grad_mean_ptr=grad_mean,
        grad_clean_ptr=outputs[0], grad_noise_ptr=outputs[1], N=n,
        STRIDE_WN=stride_wn, STRIDE_WK=stride_wk, STRIDE_M=stride_m,
        DTYPE=TRITON_DTYPE[accumulator(clean.dtype)],
        HAS_WEIGHTS=grad_weights is not None, HAS_MEAN=grad_mean is not None, **options,
    )  # fmt: skip
    return Plan(outputs, [backward])


_forward = register(
    "noisy_topk(Tensor clean, Tensor noise, Tensor? eps, Tensor? seed, int k, bool renormalize)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    plan_forward,
    _forward_fake,
    _forward_settle,
)
_backward = register(
    "noisy_topk_backward(Tensor clean, Tensor noise, Tensor? eps, Tensor? seed, Tensor experts,"
    " Tensor? grad_weights, Tensor? grad_mean, bool renormalize) -> (Tensor, Tensor)",
    plan_backward,
    _backward_fake,
    _backward_settle,
)


class _NoisyTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, clean, noise, eps, seed, k, renormalize):
        outputs = _forward(clean, noise, eps, seed, k, renormalize)
        ctx.save_for_backward(clean, noise, eps, seed, outputs[2])
        ctx.renormalize = renormalize
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weights, grad_mean, *_):
        clean, noise, eps, seed, experts = ctx.saved_tensors
        if grad_weights is None and grad_mean is None:
            return None, None, None, None, None, None
        grad_clean, grad_noise = _backward(
            clean, noise, eps, seed, experts, grad_weights, grad_mean, ctx.renormalize
        )
        silent = eps is None and seed is None
        return grad_clean, None if silent else grad_noise, None, None, None, None


def noisy_topk(
    clean: Tensor,
    noise: Tensor,
    eps: Tensor | tuple[int, int] | str | None,
    k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(weights, mean, experts, offsets, rows, positions)``, as the contract's ``noisy_topk``.

    clean, noise: [N, M], any float dtype; eps: [N, M], None for no noise, ``"draw"`` to draw it
    inside from torch's generator of the device (one more, tiny launch: an int64 seed; a captured
    graph draws again at each replay), or ``(seed, first)`` to draw that of the samples ``first``,
    ``first + 1``, ... (a copy of two numbers to the device, which nothing waits for).
    Differentiable: weights and mean, by clean and noise.
    """
    seed = None
    if isinstance(eps, str):
        # Also where its samples start is drawn: one launch makes both numbers.
        seed, eps = torch.randint(2**48, (2,), device=clean.device), None
    elif isinstance(eps, tuple):
        seed, eps = torch.tensor(eps, dtype=torch.int64), None
        if clean.is_cuda:
            seed = seed.pin_memory().to(clean.device, non_blocking=True)
    return apply(_NoisyTopK, clean, noise, eps, seed, k, renormalize)
