"""gather, its gradient and gather_into as compiled, against indexing in float64."""

from __future__ import annotations

from functools import partial

import torch
from support.output_cases import ROUNDING, assert_within, double, poisoned
from torch import Tensor

from hubpath_fast import kernels, reference

from .router_cases import U, normal

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
UINT8, BF16, FP16, FP32 = torch.uint8, torch.bfloat16, torch.float16, torch.float32


def moved(
    shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype, m: int = 5, k: int = 2,
    affine: bool = True, x_last: bool = False, last: bool = False,
) -> None:  # fmt: skip
    """x of ``dtype`` to rows of ``out``; x_last, last: layouts of x and of the rows."""
    routing = reference.noisy_topk(normal(shape[0], m, seed=0), torch.zeros(shape[0], m), k)
    x = (normal(*shape, seed=1) * 100).abs().to(dtype) if dtype == UINT8 else normal(*shape, seed=1)
    x = x.to(dtype).contiguous(memory_format=LAST if x_last else CONTIGUOUS)
    x.requires_grad_(dtype != UINT8)
    scale, shift = (normal(m, shape[1], seed=s) if affine else None for s in (2, 3))
    layout = LAST if last else CONTIGUOUS
    with poisoned():
        rows = kernels.gather(x, routing, scale, shift, out, layout)
    assert rows.is_contiguous(memory_format=layout)
    expected = expected_rows(x, routing, scale, shift).detach()
    terms = expected_rows(x.detach().abs(), routing, *absolute(scale, shift))
    # A product and a sum in float32, then one rounding more; what is only copied is exact.
    bound = 2 * U * terms if affine else 0 * terms
    rounded = ROUNDING[out] * (expected.abs() + bound) if out != dtype or affine else 0.0
    assert_within(rows, expected, bound + rounded, "rows")
    check_into(x.detach(), routing, scale, shift, rows.detach(), layout)
    if x.requires_grad:
        check_gradient(x, routing, scale, rows, layout)


def check_into(x, routing, scale, shift, rows: Tensor, layout: torch.memory_format) -> None:
    """The same rows in static input buffers, with at least one to spare that is left alone."""
    m, capacity = routing.num_experts, max(routing.counts()) + 1
    buffers = torch.full((m * capacity, *x.shape[1:]), 7.0, dtype=rows.dtype)
    buffers = buffers.contiguous(memory_format=layout)
    wanted, begin = buffers.clone(), routing.offsets.tolist()
    for i, count in enumerate(routing.counts()):
        wanted[i * capacity : i * capacity + count] = rows[begin[i] : begin[i + 1]]
    kernels.gather_into(buffers, x, routing, scale, shift)
    assert torch.equal(buffers, wanted), "gather_into differs from gather"


def check_gradient(x, routing, scale, rows: Tensor, layout: torch.memory_format) -> None:
    """Sums of K products in float32, rounded once."""
    grad = normal(*rows.shape, seed=4).to(rows.dtype).contiguous(memory_format=layout)
    with poisoned():
        (got,) = torch.autograd.grad(rows, x, grad)
    (leaf,), (positive,) = double(x), double(x, absolute=True)
    (right,) = torch.autograd.grad(expected_rows(leaf, routing, scale, None), leaf, grad.double())
    size = expected_rows(positive, routing, *absolute(scale, None))
    (terms,) = torch.autograd.grad(size, positive, grad.double().abs())
    bound = (routing.k + 1) * U * terms
    assert_within(got, right, bound + ROUNDING[x.dtype] * (right.abs() + bound), "d_x")


def absolute(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.abs() for tensor in tensors]


def expected_rows(x: Tensor, routing, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """In float64: each row's sample, times and plus what its expert says for the channel."""
    slots = routing.rows.long()
    rows, expert = x.double()[slots // routing.k], routing.experts.flatten()[slots]
    per_channel = (-1, *[1] * (x.dim() - 2))
    if scale is not None:
        rows = rows * scale.double()[expert].unflatten(1, per_channel)
    if shift is not None:
        rows = rows + shift.double()[expert].unflatten(1, per_channel)
    return rows


IMAGES = (48, 3, 16, 16)
CASES = {
    "gather 48x3x16x16 uint8 to bf16 last": partial(moved, IMAGES, UINT8, BF16, last=True),
    "gather 48x3x16x16 uint8 last to bf16 last": partial(
        moved, IMAGES, UINT8, BF16, x_last=True, last=True
    ),
    "gather 48x3x16x16 fp32 copied": partial(moved, IMAGES, FP32, FP32, affine=False),
    "gather 7x3x5x3 uint8 to fp32": partial(moved, (7, 3, 5, 3), UINT8, FP32, 3, 1),
    "gather 5x20x7x9 fp32 to bf16 last": partial(moved, (5, 20, 7, 9), FP32, BF16, last=True),
    "gather 5x20x7x9 bf16 last to bf16": partial(moved, (5, 20, 7, 9), BF16, BF16, x_last=True),
    "gather 5x4x16x16 fp32 to fp16 by plane": partial(moved, (5, 4, 16, 16), FP32, FP16),
    "gather 13x37 fp32": partial(moved, (13, 37), FP32, FP32, 6, 3),
}
