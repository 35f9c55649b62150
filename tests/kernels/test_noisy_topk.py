"""The router's kernels against the float64 reference: values, plan, gradients, determinism."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
import triton
import triton.language as tl
from hubpath_fast.kernels import noisy_topk
from hubpath_fast.kernels._scores import _log1p, _normal_pair
from support.noise import assert_standard_normal, read_noise

from hubpath_fast import _torch_ops, reference

router = sys.modules["hubpath_fast.kernels.noisy_topk"]
plan = sys.modules["hubpath_fast.kernels._row_plan"]

# Both sides round in float64; 1e-12 leaves room for sums of 64 terms in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
SHAPES = [
    pytest.param((48, 5, 2), id="paper"),
    pytest.param((7, 3, 1), id="fewer-samples-than-a-tile"),
    pytest.param((100, 64, 8), id="ragged-last-tile"),
    pytest.param((129, 13, 3), id="one-sample-past-a-tile-and-M-not-a-power-of-two"),
    pytest.param((1, 2, 2), id="one-sample-all-experts"),
    pytest.param((5, 1, 1), id="one-expert"),
    pytest.param((9, 20, 20), id="K-equals-M-beyond-16"),
    pytest.param((2, 1000, 16), id="widest-hub-two-warps"),
]


def scores(n, m, device, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, m, generator=generator, dtype=dtype).to(device) for _ in range(3)]


@pytest.fixture(params=["one-launch", "blocks", "torch"])
def route(request, monkeypatch):
    """The kernels as one program, and as for a batch too large for it; and torch's."""
    if request.param == "blocks":
        monkeypatch.setattr(router, "ONE_LAUNCH", 0)
    return _torch_ops.noisy_topk if request.param == "torch" else noisy_topk


def assert_same(got, expected, **tolerance):
    assert torch.equal(got[2], expected.experts)
    for index, name in ((3, "offsets"), (4, "rows"), (5, "positions")):
        assert torch.equal(got[index], getattr(expected, name)), name
        assert got[index].dtype == torch.int32
    torch.testing.assert_close(got[0], expected.weights, equal_nan=True, **tolerance)
    torch.testing.assert_close(got[1], expected.mean, equal_nan=True, **tolerance)


@pytest.mark.parametrize("renormalize", [False, True], ids=["plain", "renormalized"])
@pytest.mark.parametrize("noisy", [True, False], ids=["eps", "no-eps"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_match_the_reference(route, shape, noisy, renormalize, device):
    n, m, k = shape
    clean, noise, eps = scores(n, m, device)
    eps = eps if noisy else None
    clean.requires_grad_()
    noise.requires_grad_()
    got = route(clean, noise, eps, k, renormalize)
    expected = reference.noisy_topk(clean, noise, k, eps, renormalize)
    assert_same(got, expected, **EXACT)

    # The weights' gradient is dense in another order than the weights.
    grads = scores(k, n, device, seed=1)[0].T, scores(1, m, device, seed=2)[0][0]
    inputs = [clean, noise] if noisy else [clean]
    got = torch.autograd.grad(got[:2], inputs, grads)
    expected = torch.autograd.grad(expected[:2], inputs, grads)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("part", [0, 1], ids=["weights-only", "mean-only"])
def test_gradient_of_one_output_alone(part, device):
    clean, noise, eps = scores(11, 5, device)
    clean.requires_grad_()
    noise.requires_grad_()
    got = noisy_topk(clean, noise, eps, 2, False)[part]
    expected = reference.noisy_topk(clean, noise, 2, eps)[part]
    # expand: a gradient with strides of zero, as a sum sends it back
    grad = torch.ones((), dtype=torch.float64, device=device).expand(got.shape)
    for a, b in zip(
        torch.autograd.grad(got.cumsum(0), [clean, noise], grad),
        torch.autograd.grad(expected.cumsum(0), [clean, noise], grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **EXACT)
    got = torch.autograd.grad(noisy_topk(clean, noise, eps, 2, False)[part], clean, grad)[0]
    # the weights' sum moves with the scores, the mean's is always one
    assert (got.abs().max() < 1e-12) == (part == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(route, dtype, device):
    clean, noise, eps = (x.to(dtype) for x in scores(33, 16, device))
    clean.requires_grad_()
    noise.requires_grad_()
    got = route(clean, noise, eps, 2, False)
    wide = [x.detach().double().requires_grad_() for x in (clean, noise)]
    expected = reference.noisy_topk(*wide, 2, eps.double())
    assert got[0].dtype == got[1].dtype == torch.float32
    assert torch.equal(got[2], expected.experts)
    # exp of an argument up to 10 with 2^-24 relative error, and a few roundings more
    torch.testing.assert_close(got[0].double(), expected.weights, rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(got[1].double(), expected.mean, rtol=3e-6, atol=1e-7)
    a = torch.autograd.grad(got[0].square().sum() + got[1].square().sum(), [clean, noise])
    b = torch.autograd.grad(expected[0].square().sum() + expected[1].square().sum(), wide)
    # the gradient is rounded once, to the input's precision
    step = torch.finfo(dtype).eps
    for x, y in zip(a, b, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, rtol=max(step, 1e-5), atol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_ties_go_to_the_lowest_index(route, k, device):
    clean = torch.zeros(9, 7, device=device)
    clean[3:, 5] = 1.0
    noise = torch.zeros_like(clean)
    got = route(clean, noise, None, k, False)
    assert got[2][0].tolist() == [0, 1, 2][:k]
    assert got[2][8].tolist() == [5, 0, 1][:k]
    assert_same(got, reference.noisy_topk(clean, noise, k), rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("k", [1, 5])
def test_rows_of_nan_choose_distinct_experts_in_range(route, k, device):
    clean, noise, eps = scores(21, 7, device)
    clean[2, 4] = math.nan
    clean[3] = math.inf
    clean[4] = -math.inf
    clean[5, 1] = math.inf
    clean[6, :4] = -math.inf  # no NaN: four experts of probability zero
    noise[20] = math.nan
    got = route(clean, noise, eps, k, False)
    assert_same(got, reference.noisy_topk(clean, noise, k, eps), **EXACT)
    for row in (2, 3, 4, 5, 20):
        assert got[0][row].isnan().all()
        assert got[2][row].tolist() == [0, 1, 2, 3, 4][:k]
    assert not got[0][6].isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_mean_is_a_number_where_all_weights_are(device):
    """Endless noise sets a score to -inf, which is a score of 0, or to +inf, which is no number;
    the tile has a place for one sample more."""
    found = []
    for seed in range(6):
        clean, noise, _ = scores(3, 100, device, dtype=torch.float32)
        noise[2, 5] = math.inf
        weights, mean, *_ = noisy_topk(clean, noise, (seed, 0), 2, False)
        found.append((bool(weights.isnan().any()), bool(mean.isnan().any())))
    assert set(found) == {(False, False), (True, True)}


@pytest.mark.parametrize("scale", [-100.0, 100.0])
def test_extreme_noise_scales_are_stable(route, scale, device):
    clean, noise, eps = scores(12, 5, device)
    clean.requires_grad_()
    noise = (noise + scale).requires_grad_()
    got = route(clean, noise, eps, 2, False)
    expected = reference.noisy_topk(clean, noise, 2, eps)
    assert_same(got, expected, **EXACT)
    for a, b in zip(
        torch.autograd.grad(got[0].sum(), [clean, noise]),
        torch.autograd.grad(expected[0].sum(), [clean, noise]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("n", [9, 70])
def test_all_to_one_expert_and_none_to_the_others(route, n, device):
    clean = torch.zeros(n, 6, device=device)
    clean[:, 4] = 9.0
    got = route(clean, clean, None, 1, False)
    assert got[3].tolist() == [0, 0, 0, 0, 0, n, n]
    assert torch.equal(got[4], torch.arange(n, dtype=torch.int32, device=device))


def test_fields_hold_every_count():
    for samples, parts in itertools.product((1, 8, 15, 16, 64, 255, 256, 512, 65536), (1, 4, 8)):
        fields = router._fields(samples, parts * 16, 16)
        assert samples < 2 ** fields["BITS"]
        assert fields["FIELDS"] * fields["BITS"] <= 32
        assert parts % fields["FIELDS"] == 0


@pytest.mark.parametrize("bits", [8, 32])
def test_counts_up_to_the_last_bit_of_a_field(bits, device, monkeypatch):
    """A block's 128 samples, all to the expert of the highest field, and to that of the lowest."""
    monkeypatch.setattr(router, "ONE_LAUNCH", 0)
    monkeypatch.setattr(plan, "max_blocks", lambda n, m: 1)
    if bits == 32:
        monkeypatch.setattr(router, "_fields", lambda *sizes: {"FIELDS": 1, "BITS": 32})
    clean = torch.zeros(128, 64, device=device)
    clean[:, 63], clean[:, 0] = 9.0, 5.0
    got = noisy_topk(clean, clean, None, 2, False)
    assert_same(got, reference.noisy_topk(clean, clean, 2), rtol=1e-6, atol=1e-7)
    assert got[3].tolist() == [0, *[128] * 63, 256]


@pytest.mark.parametrize("launches_of_forward", [1, 2, 3])
def test_launch_counts_and_many_tiles_a_block(launches_of_forward, launches, device, monkeypatch):
    """Blocks of several tiles and a plan across many blocks, without thousands of samples."""
    if launches_of_forward > 1:
        monkeypatch.setattr(router, "ONE_LAUNCH", 0)
    if launches_of_forward > 2:
        monkeypatch.setattr(plan, "TWO_LAUNCHES", 0)
    monkeypatch.setattr(plan, "max_blocks", lambda n, m: 4)
    monkeypatch.setattr(plan, "SCAN_BLOCKS", 2)
    clean, noise, eps = scores(90, 6, device)
    clean.requires_grad_()
    got = noisy_topk(clean, noise, eps, 3, False)
    assert (
        launches
        == {
            1: ["route_and_plan_kernel"],
            2: ["route_kernel", "_plan_kernel"],
            3: ["route_kernel", "_scan_kernel", "_plan_kernel"],
        }[launches_of_forward]
    )
    assert_same(got, reference.noisy_topk(clean, noise, 3, eps), **EXACT)
    launches.clear()
    torch.autograd.grad(got[0].sum() + got[1].sum(), clean)
    assert launches == ["_route_backward_kernel"]


@pytest.mark.parametrize(
    ("m", "limit"), [(2, 512), (5, 512), (8, 512), (9, 256), (20, 128), (64, 64), (65, -1)]
)
def test_one_launch_holds_as_many_samples_as_fit_in_registers(m, limit):
    for n in (0, 1, 64, 65, 128, 256, 512, 513):
        options = router._one_launch(n, m, 4)
        assert (options is not None) == (n <= limit)
        if options is not None:
            assert n <= options["BLOCK_N"]
            block_m = max(4, router.next_power_of_2(m))
            assert options["BLOCK_N"] * block_m <= 512 * options["num_warps"] <= 8 * 512


def test_one_launch_at_its_limits(device):
    for n, m, k in ((65, 5, 2), (512, 3, 1), (64, 64, 9), (128, 20, 20)):
        clean, noise, eps = scores(n, m, device)
        got = noisy_topk(clean, noise, eps, k, False)
        assert_same(got, reference.noisy_topk(clean, noise, k, eps), **EXACT)


def test_work_is_linear_in_blocks():
    for n, m in itertools.product((1, 48, 4096, 4097, 262144, 3_000_000), (2, 64, 1000, 1024)):
        block_n, block_m = router._tile(m)
        blocks, tiles = router._blocks(n, m)
        assert blocks <= (256 if n <= 4096 else 2048)
        assert (blocks - 1) * tiles * block_n < n <= blocks * tiles * block_n
        assert block_m >= m


def test_halves_of_one_tensor_are_read_in_place(device):
    both = scores(20, 10, device)[0].requires_grad_()
    clean, noise = both.chunk(2, dim=1)
    eps = scores(20, 5, device, seed=3)[0].t().contiguous().t()  # columns apart: copied first
    assert router._rows(clean) is clean
    assert router._rows(noise) is noise
    got = noisy_topk(clean, noise, eps, 2, False)
    expected = reference.noisy_topk(clean, noise, 2, eps)
    assert_same(got, expected, **EXACT)
    a, b = (torch.autograd.grad(x[0].sum(), both)[0] for x in (got, expected))
    torch.testing.assert_close(a, b, **EXACT)


@triton.jit
def _pair_kernel(bits_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a = tl.load(bits_ptr + offs).to(tl.uint32, bitcast=True)
    b = tl.load(bits_ptr + BLOCK + offs).to(tl.uint32, bitcast=True)
    first, second = _normal_pair(a, b)
    tl.store(out_ptr + offs, first)
    tl.store(out_ptr + BLOCK + offs, second)


def test_box_muller_is_exact_on_every_part_of_the_circle(device):
    bits = torch.randint(-(2**31), 2**31, (2, 1024), generator=torch.Generator().manual_seed(0))
    eighths = torch.arange(-8, 8) * 2**28  # the borders of the polynomials' ranges
    bits[1, :16] = eighths
    bits[1, 16:31] = eighths[1:] - 1
    bits[0, :2] = torch.tensor([0, -1])  # the largest radius, and none
    out = torch.empty(2, 1024, device=device)
    _pair_kernel[(1,)](bits.int().to(device), out, 1024)
    radius = (-2 * ((bits[0] % 2**32 + 0.5).double() / 2**32).log()).sqrt()
    angle = bits[1].double() * (2 * math.pi / 2**32)
    expected = torch.stack([radius * angle.cos(), radius * angle.sin()])
    # radius up to 6.8, each factor good to two roundings; near u = 1 the radius is sqrt(2^-24)
    # off, as float32 has no numbers between there
    assert (out.cpu().double() - expected)[:, bits[0] % 2**32 < 2**31].abs().max() < 2e-6
    assert (out.cpu().double() - expected).abs().max() < 5e-4


@triton.jit
def _log1p_kernel(t_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, _log1p(tl.load(t_ptr + offs)))


def test_the_polynomial_of_softplus_is_good_to_its_rounding(device):
    t = torch.cat([torch.linspace(0, 1, 4096), torch.logspace(-30, 0, 4096)]).to(device)
    out = torch.empty_like(t)
    _log1p_kernel[(1,)](t, out, t.numel())
    # the fit's 1e-8, and roundings of 2^-24 of the last sum and product, both below 1, and of the
    # sum before
    assert (out.double() - t.double().log1p()).abs().max() < 1e-8 + 2.5 * 2**-24
    assert (out.double() / t.double().log1p())[1:].sub(1).abs().max() < 4e-7


def drawn(n, m, device, seed):
    """The eps that "draw" takes after ``torch.manual_seed(seed)``."""

    def route(clean, noise):
        torch.manual_seed(seed)
        return noisy_topk(clean, noise, "draw", m, False)

    return read_noise(route, n, m, device)


def test_draw_is_the_same_in_backward_and_new_each_time(device):
    n, m, k = 13, 6, 2
    eps = drawn(n, m, device, seed=5)
    assert not torch.allclose(eps, drawn(n, m, device, seed=6))
    clean, noise, _ = scores(n, m, device)
    clean.requires_grad_()
    noise.requires_grad_()
    torch.manual_seed(5)
    got = noisy_topk(clean, noise, "draw", k, False)
    second = noisy_topk(clean, noise, "draw", k, False)
    assert not torch.allclose(got[1], second[1])
    expected = reference.noisy_topk(clean, noise, k, eps)
    # eps was read off through a logarithm and a difference
    assert_same(got, expected, rtol=1e-10, atol=1e-10)
    a, b = (torch.autograd.grad(x[0].sum() + x[1][0], [clean, noise]) for x in (got, expected))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_draw_is_standard_normal(device):
    assert_standard_normal(drawn(32, 128, device, seed=1))
