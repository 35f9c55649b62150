"""Gather's kernels against plain indexing in float64: values, layouts, gradients, determinism."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hubpath_fast.kernels import gather, gather_into
from support.operations import implementations
from support.output_cases import INTERPRETED

from hubpath_fast import kernels, reference

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
SHAPES = [
    pytest.param((48, 10), 5, 2, id="rows-of-features"),
    pytest.param((7, 3, 5, 3), 3, 1, id="odd-image"),
    pytest.param((100, 8), 64, 8, id="ragged-last-tile-many-experts"),
    pytest.param((5, 13, 3), 3, 3, id="three-dimensions-all-experts"),
    pytest.param((1, 2), 2, 2, id="one-sample"),
    pytest.param((6,), 4, 2, id="scalars"),
    pytest.param((3, 2100), 2, 1, id="a-sample-longer-than-a-tile"),
    pytest.param((3, 4, 16, 16), 5, 2, id="planes"),
    pytest.param((2, 5, 3, 2, 2), 18, 18, id="volumes-K-beyond-16"),
]


def plan(n, m, k, device, skew=False):
    clean = torch.randn(n, m, generator=torch.Generator().manual_seed(0))
    if skew:
        clean[:, m - 1] += 1e3  # all choose the last expert
        clean[:, 0] -= 1e3  # and none the first
    return reference.noisy_topk(clean.to(device), torch.zeros(n, m, device=device), k)


def values(shape, dtype, device, layout=CONTIGUOUS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        x = torch.randint(0, 256, shape, generator=generator, dtype=dtype)
    else:
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x.to(device).contiguous(memory_format=layout)


def expected_rows(x, routing, k, scale=None, shift=None):
    """In float64: each row's sample, times and plus what its expert says for the channel."""
    rows = x.double()[routing.rows.long() // k]
    expert = routing.experts.flatten()[routing.rows.long()]
    trailing = (1,) * (x.dim() - 2)
    if scale is not None:
        rows = rows * scale.double()[expert].unflatten(1, (-1, *trailing))
    if shift is not None:
        rows = rows + shift.double()[expert].unflatten(1, (-1, *trailing))
    return rows


def run(x, routing, scale=None, shift=None, dtype=None, layout=CONTIGUOUS, ops=kernels):
    return ops.gather(x, routing, scale, shift, dtype or x.dtype, layout)


@pytest.mark.parametrize("skew", [False, True], ids=["balanced", "an-expert-with-none"])
@pytest.mark.parametrize("affine", [False, True], ids=["copy", "affine"])
@pytest.mark.parametrize(("shape", "m", "k"), SHAPES)
@implementations
def test_values_and_gradient(ops, shape, m, k, affine, skew, device):
    routing = plan(shape[0], m, k, device, skew)
    x = values(shape, torch.float64, device).requires_grad_()
    affine = affine and len(shape) > 1
    scale, shift = (
        values((m, shape[1]), torch.float64, device, seed=s) if affine else None for s in (2, 3)
    )
    got = run(x, routing, scale, shift, ops=ops)
    expected = expected_rows(x, routing, k, scale, shift)
    # one product and one sum in float64, which a device may fuse
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    grad = values(got.shape, torch.float64, device, seed=4)
    a, b = (torch.autograd.grad(y, x, grad)[0] for y in (got, expected))
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)  # sums of at most 18 terms


LAYOUTS = list(itertools.product([CONTIGUOUS, LAST], repeat=2))
IMAGES = [
    pytest.param((3, 3, 24, 20), id="few-channels-in-planes"),
    pytest.param((3, 3, 5, 5), id="few-channels-odd"),
    pytest.param((2, 16, 12, 12), id="whole-tiles"),
    pytest.param((1, 70, 9, 7), id="channels-past-a-tile"),
    pytest.param((1, 9, 20, 17), id="positions-past-a-tile"),
    pytest.param((3, 12, 1, 1), id="layouts-that-coincide"),
    pytest.param((3, 1, 6, 6), id="one-channel"),
]


@pytest.mark.parametrize("layouts", LAYOUTS, ids=lambda pair: f"{pair[0]}-to-{pair[1]}"[6:])
@pytest.mark.parametrize("shape", IMAGES)
def test_layouts_change_in_the_same_launch(shape, layouts, launches, device):
    routing = plan(shape[0], 5, 2, device)
    scale, shift = (values((5, shape[1]), torch.float64, device, seed=s) for s in (2, 3))
    x = values(shape, torch.float64, device, layouts[0]).requires_grad_()
    for parts in ((None, shift), (scale, None), (scale, shift)):
        got = run(x, routing, *parts, layout=layouts[1])
        assert got.is_contiguous(memory_format=layouts[1])
        expected = expected_rows(x, routing, 2, *parts)
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    assert len(launches) == 3
    grad = values(got.shape, torch.float64, device, layouts[1], seed=4)
    a, b = (torch.autograd.grad(y, x, grad)[0] for y in (got, expected))
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert len(launches) == 4


def expected_buffers(out, rows, routing):
    """``out`` with each expert's rows at the start of its part."""
    out, capacity = out.clone(), len(out) // (routing.offsets.numel() - 1)
    bounds = routing.offsets.tolist()
    for expert, (begin, end) in enumerate(itertools.pairwise(bounds)):
        out[expert * capacity : expert * capacity + end - begin] = rows[begin:end].to(out.dtype)
    return out


@pytest.mark.parametrize("skew", [False, True], ids=["balanced", "an-expert-with-none"])
@pytest.mark.parametrize("affine", [False, True], ids=["copy", "affine"])
@pytest.mark.parametrize(("shape", "m", "k"), SHAPES)
def test_static_buffers_take_the_same_rows_and_nothing_else_changes(
    shape, m, k, affine, skew, launches, device
):
    routing = plan(shape[0], m, k, device, skew)
    x = values(shape, torch.float32, device)
    affine = affine and len(shape) > 1
    scale, shift = (
        values((m, shape[1]), torch.float32, device, seed=s) if affine else None for s in (2, 3)
    )
    rows = run(x, routing, scale, shift)
    for capacity in (shape[0], shape[0] + 3):
        out = torch.full((m * capacity, *shape[1:]), 7.0, device=device)
        expected = expected_buffers(out, rows, routing)
        gather_into(out, x, routing, scale, shift)
        assert torch.equal(out, expected)
    assert launches == ["_gather_kernel"] * 3


@pytest.mark.parametrize("layouts", LAYOUTS, ids=lambda pair: f"{pair[0]}-to-{pair[1]}"[6:])
@pytest.mark.parametrize("shape", IMAGES)
@implementations
def test_static_buffers_in_each_layout(ops, shape, layouts, device):
    routing = plan(shape[0], 5, 2, device)
    scale, shift = (values((5, shape[1]), torch.float32, device, seed=s) for s in (2, 3))
    for dtype in (torch.uint8, torch.float32):
        x = values(shape, dtype, device, layouts[0])
        out = torch.full((5 * (shape[0] + 1), *shape[1:]), 7.0, device=device)
        out = out.contiguous(memory_format=layouts[1])
        rows = run(x, routing, scale, shift, torch.float32, layouts[1], ops)
        expected = expected_buffers(out, rows, routing)
        ops.gather_into(out, x, routing, scale, shift)
        assert torch.equal(out, expected)


def test_any_strides_are_right(device):
    whole = values((8, 6, 5, 9), torch.float64, device).requires_grad_()
    x = whole.transpose(2, 3)[::2, :, 1:]
    routing = plan(4, 3, 2, device)
    for layout in (CONTIGUOUS, LAST):
        got = run(x, routing, layout=layout)
        assert torch.equal(got, expected_rows(x, routing, 2))
        grad = values(got.shape[::-1], torch.float64, device).permute(3, 2, 1, 0)
        a = torch.autograd.grad(got, whole, grad)[0]
        b = torch.autograd.grad(expected_rows(x, routing, 2), whole, grad)[0]
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8], ids=str)
@implementations
def test_computes_in_float32_and_rounds_once(ops, dtype, out, device):
    routing = plan(9, 4, 2, device)
    scale = values((4, 6), torch.float32, device, seed=2)
    shift = values((4, 6), torch.float32, device, seed=3)
    x = values((9, 6, 4), dtype, device)
    got = run(x, routing, scale, shift, out, ops=ops)
    expected = expected_rows(x, routing, 2, scale, shift)
    assert got.dtype == out
    # float32's roundings of a product and a sum, terms up to 255 * 3, then one to the result's
    slack = 2.0**-22 * (768 if dtype == torch.uint8 else 8)
    cut = (
        out == torch.bfloat16 and ops is kernels and INTERPRETED
    )  # Triton's interpreter does not round here
    step = torch.finfo(out).eps / (1 if cut else 2)
    torch.testing.assert_close(got.double(), expected, rtol=step, atol=slack)
    got, expected = run(x, routing, dtype=out, ops=ops), expected_rows(x, routing, 2)
    torch.testing.assert_close(got.double(), expected, rtol=step, atol=1e-7)
    if not cut:
        assert torch.equal(got, expected.to(out))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradient_is_summed_in_float32(dtype, device):
    routing = plan(6, 8, 8, device)
    scale = values((8, 3), torch.float32, device, seed=2)
    x = values((6, 3, 5), torch.float32, device).requires_grad_()
    grad = values((48, 3, 5), dtype, device, seed=4)
    got = torch.autograd.grad(run(x, routing, scale, None, dtype), x, grad)[0]
    wide = x.detach().double().requires_grad_()
    expected = torch.autograd.grad(expected_rows(wide, routing, 8, scale), wide, grad.double())[0]
    assert got.dtype == torch.float32
    # eight products below 10, each rounded in float32, and their sum
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=16 * 10 * 2.0**-24)


def test_bytes_are_copied_as_they_are(device):
    routing = plan(5, 3, 2, device)
    x = values((5, 3, 6, 6), torch.uint8, device)
    for layout in (CONTIGUOUS, LAST):
        got = run(x, routing, layout=layout)
        assert got.dtype == torch.uint8
        assert torch.equal(got, x[routing.rows.long() // 2])


def test_nan_stays_in_its_rows(device):
    routing = plan(6, 3, 2, device)
    x = values((6, 4), torch.float32, device)
    x[2] = float("nan")
    nan = run(x, routing).isnan()
    assert torch.equal(nan.all(1), routing.rows // 2 == 2)
    assert torch.equal(nan.all(1), nan.any(1))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 2)], ids=["no-samples", "no-elements"])
def test_nothing_to_move(shape, launches, device):
    n = shape[0]
    positions = torch.arange(2 * n, dtype=torch.int32, device=device).view(n, 2)
    offsets = torch.tensor([0, n, 2 * n], dtype=torch.int32, device=device)
    x = torch.empty(shape, device=device, requires_grad=True)
    rows = torch.arange(2 * n, dtype=torch.int32, device=device)
    routing = SimpleNamespace(rows=rows, positions=positions, offsets=offsets)
    got = gather(x, routing, None, None, x.dtype, CONTIGUOUS)
    assert got.shape == (2 * n, *shape[1:])
    assert torch.autograd.grad(got.sum(), x)[0].shape == shape
    assert launches == []
