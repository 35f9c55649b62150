"""Noise by (seed, sample, expert): a part of a batch has that of the whole, on both backends."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from hubpath_fast.kernels import noisy_topk  # noqa: F401  so that its module is there
from support.noise import assert_standard_normal, assert_uncorrelated, read_noise

from hubpath_fast import functional as HF
from hubpath_fast import reference

SEED = 2**62 + 12345  # both halves of the seed and of the counter take part
router = sys.modules["hubpath_fast.kernels.noisy_topk"]


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    return request.param


def scores(n, m, device):
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(2, n, m, generator=generator, dtype=torch.float64)
    return drawn.to(device).unbind()


def noise_of(backend, device, n, m, seed, first=0):
    def route(clean, noise):
        routing = HF.noisy_topk(clean, noise, m, HF.NoiseDraw(seed, first), backend=backend)
        return routing.weights, routing.mean, routing.experts

    return read_noise(route, n, m, device)


def test_a_noise_draw_is_standard_normal_and_other_for_each_seed(backend, device):
    for m in (16, 13):
        drawn = [noise_of(backend, device, 128, m, seed) for seed in (SEED, SEED + 1, SEED - 2**40)]
        for eps in drawn:
            assert_standard_normal(eps)
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert_uncorrelated(drawn[a], drawn[b], f"seeds {a} and {b}")


# More experts than one tile of a warp, one expert, and blocks of numbers that are not full.
@pytest.mark.parametrize("m", [5, 8, 1, 70])
@pytest.mark.parametrize("first", [0, 37, 2**34 - 20, 2**48 - 40])
def test_parts_of_a_batch_have_the_noise_of_the_whole_to_the_bit(
    backend, device, m, first, monkeypatch
):
    n, k = 40, min(m, 2)
    clean, noise = scores(n, m, device)
    route = partial(HF.noisy_topk, k=k, backend=backend)
    whole = route(clean, noise, eps=HF.NoiseDraw(SEED, first))
    for start, stop in ((0, 1), (0, 13), (13, 14), (14, 40), (39, 40)):
        own = slice(start, stop)
        part = route(clean[own], noise[own], eps=HF.NoiseDraw(SEED, first + start))
        assert torch.equal(part.experts, whole.experts[own])
        # torch's functions of few numbers may round otherwise than of many; the kernels' do not
        exact = {"rtol": 1e-14 if backend == "torch" else 0, "atol": 0}
        torch.testing.assert_close(part.weights, whole.weights[own], **exact)
    normals = HF.NoiseDraw(SEED, first).normals(n, m)
    assert torch.equal(normals[13:], HF.NoiseDraw(SEED, first + 13).normals(n - 13, m))
    assert torch.equal(normals[39:], HF.NoiseDraw(SEED, first + 39).normals(1, m))
    if backend == "triton":  # and however the kernel tiles the batch
        monkeypatch.setattr(router, "ONE_LAUNCH", 0)
        blocks = route(clean, noise, eps=HF.NoiseDraw(SEED, first))
        assert torch.equal(blocks.experts, whole.experts)
        torch.testing.assert_close(blocks.weights, whole.weights, rtol=1e-12, atol=0)


def test_samples_beyond_32_bits_of_the_counter_do_not_repeat_the_first(backend, device):
    near, far = (noise_of(backend, device, 64, 8, SEED, first) for first in (0, 2**33))
    assert_uncorrelated(near, far, "first 0 and 2**33")


def test_values_and_gradients_with_a_noise_draw_are_those_of_its_noise(backend, device):
    n, m, k, draw = 29, 6, 2, HF.NoiseDraw(SEED, 11)
    eps = noise_of(backend, device, n, m, *draw)
    clean, noise = (x.requires_grad_() for x in scores(n, m, device))
    got = HF.noisy_topk(clean, noise, k, draw, backend=backend)
    expected = reference.noisy_topk(clean, noise, k, eps)
    assert torch.equal(got.experts, expected.experts)
    a, b = (
        [x.weights, x.mean, *torch.autograd.grad(x.weights.sum() + x.mean[0], [clean, noise])]
        for x in (got, expected)
    )
    for x, y in zip(a, b, strict=True):  # eps was read off through a logarithm and a difference
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_narrow_scores_get_the_noise_rounded_once(device):
    eps = HF.NoiseDraw(SEED, 5).normals(20, 7)
    clean, noise = (x.float() for x in scores(20, 7, device))
    route = partial(HF.noisy_topk, clean, noise, 2, backend="torch")
    drawn, given = route(HF.NoiseDraw(SEED, 5)), route(eps.float().to(device))
    assert torch.equal(drawn.weights, given.weights)


def test_torchs_generator_neither_matters_nor_moves(backend, device):
    clean, noise = scores(9, 5, device)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = HF.noisy_topk(clean, noise, 2, HF.NoiseDraw(SEED), backend=backend)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    b = HF.noisy_topk(clean, noise, 2, HF.NoiseDraw(SEED), backend=backend)
    assert torch.equal(a.weights, b.weights)


def test_the_noise_of_a_draw_is_the_same_in_every_version():
    """A run that is resumed under another version of numpy or torch goes on with its noise."""
    eps = HF.NoiseDraw(1, 2).normals(2, 5)
    expected = [
        [-0.49836495056, 0.29830608651, 0.71564877430, 1.39220218792, 1.90980408588],
        [-1.59530044466, -0.57247803727, -1.05000019164, -1.40032159079, -0.39646233548],
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(eps, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (HF.NoiseDraw(-1), r"eps: expected NoiseDraw.seed in 0..9223372036854775807, got -1"),
        (HF.NoiseDraw(2**63), "NoiseDraw.seed"),
        (HF.NoiseDraw(0.5), "NoiseDraw.seed in .* got 0.5"),
        (HF.NoiseDraw(1, -1), r"NoiseDraw.first in 0..281474976710655, got -1"),
        (HF.NoiseDraw(1, 2**48), "NoiseDraw.first"),
        (HF.NoiseDraw(1, True), "NoiseDraw.first in .* got True"),
        ((1, 2), r'a tensor, a NoiseDraw, None or "draw", got \(1, 2\)'),
    ],
)
def test_a_draw_out_of_range_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        HF.noisy_topk(torch.zeros(3, 2), torch.zeros(3, 2), 1, draw)
