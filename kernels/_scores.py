"""Device code of the router's scores: drawing the noise, loading, softplus and softmax.

Shared by the router's forward and backward, which must find the same p and the same draw.
Shapes: N samples, M experts; a program holds BLOCK_N samples of BLOCK_M >= M columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normal_pair(a, b):
    """Box-Muller on two blocks of uint32: two blocks of independent float32 normals.

    Sine and cosine of b/2^32 turns are polynomials on an eighth of a turn, good to float32's
    rounding: the library's cosine reduces arbitrary arguments, for which it needs a stack frame.
    """
    u = a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # in [2^-33, 1]
    radius = tl.sqrt(-2.0 * tl.log(u))
    turn = b.to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10  # in [-1/2, 1/2]
    quarter = tl.floor(4.0 * turn + 0.5)
    x = (turn - 0.25 * quarter) * 6.283185307179586  # within pi/4 of 0
    y = x * x
    sine = 1 / 120 + y * (-1 / 5040 + y * (1 / 362880))
    sine = x * (1.0 + y * (-1 / 6 + y * sine))
    cosine = 1 / 24 + y * (-1 / 720 + y * (1 / 40320))
    cosine = 1.0 + y * (-0.5 + y * cosine)
    odd = tl.abs(quarter) == 1.0
    half = tl.abs(quarter) > 1.0
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    first = tl.where(half | (quarter == 1.0), -first, first)
    second = tl.where(half | (quarter == -1.0), -second, second)
    return radius * first, radius * second


@triton.jit
def draw(seed_ptr, n, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Normals [BLOCK_N, BLOCK_M] for the samples n; each depends on (seed, n, m) alone, so that
    backward finds them again however it is tiled. One Philox block makes four of them."""
    group = tl.arange(0, BLOCK_M // 4)
    counter = n[:, None] * (BLOCK_M // 4) + group[None, :]
    a, b, c, d = tl.randint4x(tl.load(seed_ptr), counter)
    x0, x1 = _normal_pair(a, b)
    x2, x3 = _normal_pair(c, d)
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (BLOCK_N, BLOCK_M))


@triton.jit
def load_scores(
    clean_ptr, noise_ptr, eps_ptr, stride_cn, stride_nn, stride_en, n, mask, offs_m,
    DTYPE: tl.constexpr, NOISE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Clean score, noise and eps [BLOCK_N, BLOCK_M] of the samples n (int64); zero outside mask."""
    m = offs_m[None, :]
    clean = tl.load(clean_ptr + n[:, None] * stride_cn + m, mask, other=0.0).to(DTYPE)
    if NOISE == 0:
        noise = tl.zeros_like(clean)
        eps = tl.zeros_like(clean)
    else:
        noise = tl.load(noise_ptr + n[:, None] * stride_nn + m, mask, other=0.0).to(DTYPE)
        if NOISE == 1:
            eps = tl.load(eps_ptr + n[:, None] * stride_en + m, mask, other=0.0).to(DTYPE)
        else:
            eps = draw(eps_ptr, n, BLOCK_N, BLOCK_M).to(DTYPE)
    return clean, noise, eps


@triton.jit
def softmax_of(clean, noise, eps, mask_m, NOISE: tl.constexpr):
    """p [BLOCK_N, BLOCK_M]; a NaN anywhere in a row makes that whole row NaN."""
    z = clean
    if NOISE != 0:
        # softplus without overflow; what log(1 + t) loses for small t is far below z's rounding
        z += eps * (tl.maximum(noise, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(noise))))
    z = tl.where(mask_m, z, float("-inf"))
    e = tl.exp(z - tl.max(z, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]
