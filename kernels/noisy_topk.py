"""The router: noise, softmax, the K largest experts, the batch mean, and the plan that moves rows.

    z = clean + eps * softplus(noise),   p = softmax(z),   the K largest p are active (equation 1)

Two launches up to 4,096 samples, three above, one backward; work linear in N, nothing sorted, no
atomics, no host read. Samples are cut into blocks of consecutive samples, one program each: the
first launch, ``route``, leaves per block the sum of p and the number of rows of each expert, and
_row_plan.py turns these into the mean and the plan. Backward computes p again: reading a saved p
costs as much as reading the clean score, and writing it comes on top.

Shapes: N samples, M experts, K active experts per sample, R = N*K rows, B blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _row_plan
from ._common import CompileCase, cdiv, next_power_of_2, on_device_of, register
from ._scores import load_scores, softmax_of

TILE = 512  # elements of p that one warp holds: 16 a lane. 32 a lane spills for M = 1000
NO_NOISE, GIVEN, DRAWN = 0, 1, 2  # where eps comes from


@triton.jit
def _route_kernel(
    # inputs
    clean_ptr,  # [N, M]
    noise_ptr,  # [N, M]; not read when NOISE is 0
    eps_ptr,  # [N, M]; the seed, int64 [1], when NOISE is 2; not read when NOISE is 0
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
):  # fmt: skip
    """Grid (B,). A program owns TILES * BLOCK_N consecutive samples, BLOCK_N at a time."""
    DTYPE: tl.constexpr = sums_ptr.dtype.element_ty
    block = tl.program_id(0).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = (offs_m < M)[None, :]
    mask_k = (offs_k < K)[None, :]
    count = tl.zeros((BLOCK_M,), tl.int32)
    total = tl.zeros((BLOCK_M,), DTYPE)

    for tile in range(TILES):
        n = (block * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = (n < N)[:, None]
        clean, noise, eps = load_scores(
            clean_ptr, noise_ptr, eps_ptr, STRIDE_C, STRIDE_N, STRIDE_E, n, mask_n & mask_m,
            offs_m, DTYPE, NOISE, BLOCK_N, BLOCK_M,
        )  # fmt: skip
        p = softmax_of(clean, noise, eps, mask_m, NOISE)
        total += tl.sum(tl.where(mask_n, p, 0.0), axis=0)

        # K rounds of argmax on p, -1 where taken. All are alike in a row of NaN, which so chooses
        # 0..K-1, as a stable descending sort would; no round finds the same expert again.
        key = tl.where(mask_m, tl.where(p == p, p, 1.0), -1.0)
        top_p = tl.zeros((BLOCK_N, BLOCK_K), DTYPE)
        top_m = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
        for j in range(K):
            value, index = tl.max(key, axis=1, return_indices=True)  # leftmost among equals
            top_p = tl.where(offs_k[None, :] == j, value[:, None], top_p)
            top_m = tl.where(offs_k[None, :] == j, index[:, None], top_m)
            key = tl.where(offs_m[None, :] == index[:, None], -1.0, key)
        # The sum is NaN exactly where the row is, else it is 1.
        nan = tl.sum(p, axis=1)[:, None]
        top_p = tl.where(nan == nan, top_p, nan)
        if RENORMALIZE:
            top_p /= tl.sum(top_p, axis=1)[:, None]

        active = ((key < 0.0) & mask_m & mask_n).to(tl.int32)
        rank = tl.cumsum(active, axis=0) - active + count[None, :]
        count += tl.sum(active, axis=0)
        slot = n[:, None] * K + offs_k[None, :]
        tl.store(weights_ptr + slot, top_p, mask_n & mask_k)
        tl.store(experts_ptr + slot, top_m.to(tl.int64), mask_n & mask_k)
        tl.store(ranks_ptr + slot, tl.gather(rank, top_m, axis=1), mask_n & mask_k)

    tl.store(counts_ptr + block * M + offs_m, count, offs_m < M)
    tl.store(sums_ptr + block * M + offs_m, total, offs_m < M)


@triton.jit
def _route_backward_kernel(
    # inputs
    clean_ptr, noise_ptr, eps_ptr,  # as in _route_kernel
    experts_ptr,  # [N, K] int64
    grad_weights_ptr,  # [N, K] or nothing
    grad_mean_ptr,  # [M] or nothing
    # outputs
    grad_clean_ptr,  # [N, M]
    grad_noise_ptr,  # [N, M]; not written when NOISE is 0
    # sizes
    N, stride_wn, stride_wk, stride_m,
    STRIDE_C: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_E: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr,
    NOISE: tl.constexpr, RENORMALIZE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, HAS_MEAN: tl.constexpr,
    # tunables
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid (N / BLOCK_N,). A program owns BLOCK_N samples and computes their p again."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = (offs_m < M)[None, :]
    mask_n = n < N
    mask = mask_n[:, None] & mask_m
    clean, noise, eps = load_scores(
        clean_ptr, noise_ptr, eps_ptr, STRIDE_C, STRIDE_N, STRIDE_E, n, mask, offs_m,
        DTYPE, NOISE, BLOCK_N, BLOCK_M,
    )  # fmt: skip
    p = tl.where(mask_m, softmax_of(clean, noise, eps, mask_m, NOISE), 0.0)

    grad_p = tl.zeros((BLOCK_N, BLOCK_M), DTYPE)
    if HAS_WEIGHTS:
        active = tl.zeros((BLOCK_N, BLOCK_M), tl.int1)
        for j in range(K):
            expert = tl.load(experts_ptr + n * K + j, mask_n, other=0).to(tl.int32)
            grad = tl.load(grad_weights_ptr + n * stride_wn + j * stride_wk, mask_n, other=0.0)
            here = offs_m[None, :] == expert[:, None]
            grad_p = tl.where(here, grad.to(DTYPE)[:, None], grad_p)
            active = active | here
        if RENORMALIZE:
            # w = p / S with S the sum of the active p: dL/dp = (dL/dw - sum(dL/dw * w)) / S
            chosen = tl.where(active, p, 0.0)
            size = tl.sum(chosen, axis=1)[:, None]
            slope = tl.sum(grad_p * chosen, axis=1)[:, None] / size
            grad_p = tl.where(active, (grad_p - slope) / size, 0.0)
    if HAS_MEAN:
        grad_mean = tl.load(grad_mean_ptr + offs_m * stride_m, offs_m < M, other=0.0).to(DTYPE)
        grad_p += (grad_mean / N)[None, :]
    grad_z = p * (grad_p - tl.sum(p * grad_p, axis=1)[:, None])

    at = n[:, None] * M + offs_m[None, :]
    tl.store(grad_clean_ptr + at, grad_z, mask)
    if NOISE != 0:
        sigmoid = 1.0 / (1.0 + tl.exp(-noise))
        tl.store(grad_noise_ptr + at, grad_z * eps * sigmoid, mask)


def _tile(m: int) -> tuple[int, int]:
    """(BLOCK_N, BLOCK_M): 8 samples, or as many of a wide hub as one warp holds, at least one."""
    block_m = max(4, next_power_of_2(m))
    return min(8, max(1, TILE // block_m)), block_m


def _blocks(n: int, m: int) -> tuple[int, int]:
    """(B, TILES): blocks of TILES * BLOCK_N samples; powers of two, so that few kernels compile."""
    block_n, _ = _tile(m)
    tiles = next_power_of_2(cdiv(n, block_n * _row_plan.max_blocks(n, m)))
    return cdiv(n, block_n * tiles), tiles


def _options(m, k, noise, renormalize, strides) -> dict:
    """Compile-time arguments that forward and backward share.

    Strides are among them: they are M or 2M in practice, and a known one makes loads wide that
    Triton would leave narrow for a stride that is not a multiple of 16.
    """
    block_n, block_m = _tile(m)
    names = ("STRIDE_C", "STRIDE_N", "STRIDE_E")
    return dict(zip(names, strides, strict=True)) | {
        "M": m,
        "K": k,
        "NOISE": noise,
        "RENORMALIZE": renormalize,
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "num_warps": max(1, block_n * block_m // TILE),
    }


def _inputs(clean, noise, eps, seed):
    """What a kernel reads, ``(clean, noise, eps or seed)``, their strides, and where eps is from.

    Any distance between samples will do, such as in the two halves of one [N, 2M] tensor.
    """

    def rows(x):
        return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()

    clean, noise = rows(clean), rows(noise)
    if seed is not None:
        return (clean, noise, seed), (clean.stride(0), noise.stride(0), 0), DRAWN
    if eps is not None:
        eps = rows(eps)
        return (clean, noise, eps), (clean.stride(0), noise.stride(0), eps.stride(0)), GIVEN
    return (clean, noise, clean), (clean.stride(0), 0, 0), NO_NOISE


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward_fake(clean, noise, eps, seed, k, renormalize):
    n, m = clean.shape
    return (
        clean.new_empty((n, k), dtype=_accumulator(clean)),
        clean.new_empty((m,), dtype=_accumulator(clean)),
        clean.new_empty((n, k), dtype=torch.int64),
        clean.new_empty((m + 1,), dtype=torch.int32),
        clean.new_empty((n * k,), dtype=torch.int32),
        clean.new_empty((n, k), dtype=torch.int32),
    )


def _forward_launch(clean, noise, eps, seed, k, renormalize):
    outputs = _forward_fake(clean, noise, eps, seed, k, renormalize)
    weights, mean, experts, offsets, rows, positions = outputs
    n, m = clean.shape
    blocks, tiles = _blocks(n, m)
    counts = clean.new_empty((blocks + 1, m), dtype=torch.int32)
    sums = clean.new_empty((blocks, m), dtype=mean.dtype)
    inputs, strides, source = _inputs(clean, noise, eps, seed)
    options = _options(m, k, source, renormalize, strides)
    with on_device_of(clean):
        if n > 0:
            _route_kernel[(blocks,)](
                *inputs, weights, experts, positions, counts, sums, n,
                TILES=tiles, BLOCK_K=next_power_of_2(k), **options,
            )  # fmt: skip
        samples = tiles * options["BLOCK_N"]
        _row_plan.plan_rows(counts, sums, experts, positions, rows, offsets, mean, samples)
    return outputs


def _backward_fake(clean, noise, eps, seed, experts, grad_weights, grad_mean, renormalize):
    silent = eps is None and seed is None
    return clean.new_empty(clean.shape), noise.new_empty((0,) if silent else noise.shape)


def _backward_launch(clean, noise, eps, seed, experts, grad_weights, grad_mean, renormalize):
    outputs = _backward_fake(clean, noise, eps, seed, experts, grad_weights, grad_mean, renormalize)
    n, m = clean.shape
    inputs, strides, source = _inputs(clean, noise, eps, seed)
    options = _options(m, experts.shape[1], source, renormalize, strides)
    strides_w = (0, 0) if grad_weights is None else grad_weights.stride()
    stride_m = 0 if grad_mean is None else grad_mean.stride(0)
    with on_device_of(clean):
        if n > 0:
            _route_backward_kernel[(cdiv(n, options["BLOCK_N"]),)](
                *inputs, experts, grad_weights, grad_mean, *outputs, n, *strides_w, stride_m,
                DTYPE=tl.float64 if clean.dtype == torch.float64 else tl.float32,
                HAS_WEIGHTS=grad_weights is not None, HAS_MEAN=grad_mean is not None, **options,
            )  # fmt: skip
    return outputs


_forward = register(
    "noisy_topk(Tensor clean, Tensor noise, Tensor? eps, Tensor? seed, int k, bool renormalize)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_launch,
    _forward_fake,
)
_backward = register(
    "noisy_topk_backward(Tensor clean, Tensor noise, Tensor? eps, Tensor? seed, Tensor experts,"
    " Tensor? grad_weights, Tensor? grad_mean, bool renormalize) -> (Tensor, Tensor)",
    _backward_launch,
    _backward_fake,
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
    @torch.autograd.function.once_differentiable
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
    clean: Tensor, noise: Tensor, eps: Tensor | str | None, k: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(weights, mean, experts, offsets, rows, positions)``, as the contract's ``noisy_topk``.

    clean, noise: [N, M], any float dtype; eps: [N, M], None for no noise, or ``"draw"`` to draw it
    inside from torch's generator of the device (one more, tiny launch: an int64 seed; a captured
    graph draws anew at each replay). Differentiable: weights and mean, by clean and noise.
    """
    seed = None
    if isinstance(eps, str):
        seed = torch.randint(2**63 - 1, (1,), device=clean.device)
        eps = None
    return _NoisyTopK.apply(clean, noise, eps, seed, k, renormalize)


def compile_cases() -> list[CompileCase]:
    """Every kernel of the router, as launched for the paper's step and at the benchmarks' ends."""
    cases = []
    sizes = [(48, 5, 2), (4096, 64, 8), (262144, 64, 2), (4096, 1000, 16), (300, 1024, 1024)]
    for n, m, k in sizes:
        blocks, tiles = _blocks(n, m)
        for source, name in ((NO_NOISE, "no eps"), (GIVEN, "eps"), (DRAWN, "draw")):
            options = _options(m, k, source, False, (m, m, m))
            launch = {"num_warps": options.pop("num_warps"), "wide": m % 4 == 0}
            size = f"{name} N={n} M={m} K={k}"
            scores = {
                "clean_ptr": "*fp32",
                "noise_ptr": "*fp32",
                "eps_ptr": "*i64" if source == DRAWN else "*fp32",
                "experts_ptr": "*i64",
                "N": "i32",
            }
            outputs = {"weights_ptr": "*fp32", "ranks_ptr": "*i32"}
            blockwise = {"counts_ptr": "*i32", "sums_ptr": "*fp32"}
            route = options | {"TILES": tiles, "BLOCK_K": next_power_of_2(k)}
            cases.append(
                CompileCase(
                    f"route {size}", _route_kernel, scores | outputs | blockwise, route, **launch
                )
            )
            names = ("grad_weights_ptr", "grad_mean_ptr", "grad_clean_ptr", "grad_noise_ptr")
            gradients = dict.fromkeys(names, "*fp32") | {"stride_wn": "i32"}
            backward = options | {"DTYPE": tl.float32, "HAS_WEIGHTS": True, "HAS_MEAN": True}
            backward |= {"stride_wk": 1, "stride_m": 1}
            cases.append(
                CompileCase(
                    f"route backward {size}",
                    _route_backward_kernel,
                    scores | gradients,
                    backward,
                    **launch,
                )
            )
        cases += _row_plan.compile_cases(n, m, k, blocks, tiles * options["BLOCK_N"])
    return cases
