"""Device code of the router's scores: drawing the noise, loading, softplus and softmax.

Shared by the router's forward and backward, which must find the same p and the same draw.

Shapes: N samples, M experts. A tile of BLOCK_N samples and BLOCK_M >= M experts has three axes,
[PARTS, BLOCK_N, WIDTH] with expert = part * WIDTH + column, but is loaded and stored as two,
[PARTS * BLOCK_N, WIDTH]: this decides where its elements lie, as Triton assigns lanes along the
last axis first, then along the rows. Of a plain [8, 64] tile, 16 lanes would hold four experts of
a sample each, for four samples, and a sum over experts would take 4 * 4 shuffles. As [4 * 8, 16],
4 lanes hold all 64 experts of one sample, and two shuffles do.
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
def max_over_experts(x):
    """[PARTS, BLOCK_N, WIDTH] to [BLOCK_N]; the parts first, as they lie in one lane."""
    return tl.max(tl.max(x, axis=0), axis=1)


@triton.jit
def sum_over_experts(x):
    """[PARTS, BLOCK_N, WIDTH] to [BLOCK_N]; the parts first, as they lie in one lane."""
    return tl.sum(tl.sum(x, axis=0), axis=1)


@triton.jit
def of_samples(x):
    """[BLOCK_N] to [1, BLOCK_N, 1], for use with a tile.

    In this order of axes: from a sum over experts, Triton then knows that it lies where its tile
    does, and so does all that is computed from it. x[None, :, None] it would convert.
    """
    return x[:, None][None, :, :]


@triton.jit
def rows_of_tile(BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """Sample within the tile [PARTS * BLOCK_N, 1] and expert [PARTS * BLOCK_N, WIDTH]."""
    row = tl.arange(0, BLOCK_N * BLOCK_M // WIDTH)[:, None]
    return row % BLOCK_N, row // BLOCK_N * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def experts_of_tile(BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """Expert [PARTS, 1, WIDTH]."""
    part = tl.arange(0, BLOCK_M // WIDTH)[:, None, None]
    return part * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def draw(seed_ptr, n, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """Normals [PARTS, BLOCK_N, WIDTH] for the samples n [1, BLOCK_N, 1].

    seed_ptr has the seed and the number of the call's first sample. Each normal depends on the
    seed, its sample's number and its expert alone: so backward finds it again however it is tiled,
    and a part of a batch gets what it has in the whole.
    One Philox block makes those of four adjacent experts.
    """
    # No max(): of Triton 3.4 it would be no constant.
    COLUMNS: tl.constexpr = WIDTH // 4 if WIDTH > 4 else 1
    BLOCKS: tl.constexpr = BLOCK_M // 4 // COLUMNS
    block = tl.arange(0, BLOCKS)[:, None, None] * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    n += tl.load(seed_ptr + 1)
    a, b, c, d = tl.randint4x(tl.load(seed_ptr), n * (BLOCK_M // 4) + block)
    x0, x1 = _normal_pair(a, b)
    x2, x3 = _normal_pair(c, d)
    x = tl.join(tl.join(x0, x2), tl.join(x1, x3))  # [BLOCKS, BLOCK_N, COLUMNS, 2, 2]
    if WIDTH == 2:
        x = tl.permute(x, (0, 3, 1, 2, 4))
    elif WIDTH == 1:
        x = tl.permute(x, (0, 3, 4, 1, 2))
    return tl.reshape(x, (BLOCK_M // WIDTH, BLOCK_N, WIDTH))


@triton.jit
def _load(ptr, mask):
    # With a mask the registers are zeroed first, as many instructions as some loads.
    if mask is None:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask, other=0.0)


@triton.jit
def load_scores(
    clean_ptr, noise_ptr, eps_ptr, stride_cn, stride_nn, stride_en, n, m, mask, NOISE: tl.constexpr
):  # fmt: skip
    """Clean score, noise and eps at rows_of_tile, in the inputs' precision; zero outside mask.

    mask: None for all. What NOISE says is not to be read is the clean score again.
    """
    clean = _load(clean_ptr + n * stride_cn + m, mask)
    noise = clean
    eps = clean
    if NOISE != 0:
        noise = _load(noise_ptr + n * stride_nn + m, mask)
    if NOISE == 1:
        eps = _load(eps_ptr + n * stride_en + m, mask)
    return clean, noise, eps


@triton.jit
def as_tile(x, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr):
    """[PARTS * BLOCK_N, WIDTH] to [PARTS, BLOCK_N, WIDTH]."""
    return tl.reshape(x.to(DTYPE), (x.shape[0] // BLOCK_N, BLOCK_N, x.shape[1]))


@triton.jit
def _log1p(t):
    """log(1 + t) for t in [0, 1]; in float32 to 2e-7.

    The library's logarithm takes any argument, and some twenty instructions; a polynomial for this
    range, fitted to 1e-8, takes nine.
    """
    if t.dtype == tl.float64:
        return tl.log(1.0 + t)
    else:
        y = -0.0265961539 + t * 0.00454936627
        y = -0.131885268 + t * (0.0731251215 + t * y)
        y = -0.247672289 + t * (0.188542884 + t * y)
        y = -0.49998625 + t * (0.333069993 + t * y)
        return t * (0.999999788 + t * y)


@triton.jit
def _exp_of_negative(x):
    """exp(-|x|). In float32 what is below 2^-126 becomes 0, which takes two instructions, not five:
    softplus, a sum, is the same to the bit but where it is so small itself."""
    if x.dtype == tl.float64:
        return tl.exp(-tl.abs(x))
    else:
        return tl.exp2(tl.abs(x) * -1.4426950408889634)


@triton.jit
def perturbed(
    clean, noise, eps, seed_ptr, n, DTYPE: tl.constexpr, NOISE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(z, noise, eps), tiles in DTYPE, from what load_scores returned for the samples n."""
    clean = as_tile(clean, DTYPE, BLOCK_N)
    noise = as_tile(noise, DTYPE, BLOCK_N)
    if NOISE == 2:
        eps = draw(seed_ptr, n, BLOCK_N, BLOCK_M, WIDTH).to(DTYPE)
    else:
        eps = as_tile(eps, DTYPE, BLOCK_N)
    z = clean
    if NOISE != 0:
        # softplus without overflow
        z += eps * (tl.maximum(noise, 0.0) + _log1p(_exp_of_negative(noise)))
    return z, noise, eps


@triton.jit
def exponentials(z, mask_m):
    """exp(z - its sample's largest), and the sum [BLOCK_N], which p is their quotient with.

    The sum is NaN where p is and nowhere else: a NaN anywhere in a sample's z, or +inf, makes all
    of its p NaN.
    """
    z = tl.where(mask_m, z, float("-inf"))
    e = tl.exp(z - of_samples(max_over_experts(z)))
    return e, sum_over_experts(e)
