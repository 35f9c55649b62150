"""noisy_topk as compiled, against the reference in float64: plan equal, values and gradients near.

u = 2^-24 is float32's largest relative error of one rounding.
"""

from __future__ import annotations

from functools import partial

import torch
from support.output_cases import assert_within, double, leaves, poisoned
from torch import Tensor
from torch.nn.functional import softplus

from hubpath_fast import kernels, reference

U = 2.0**-24


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def error_of_p(z: Tensor, roundings: int = 4) -> float:
    """Relative: an exponent is off by ``roundings`` of z and of its distance to its row's largest;
    the exponential itself by 2^-22, twice, for p is a quotient; M exponentials are added up."""
    return 2 * roundings * 2 * z.abs().max().item() * U + (16 + z.shape[1]) * U


def assert_plan(plan, expected) -> None:
    for name, got in zip(("experts", "offsets", "rows", "positions"), plan, strict=True):
        wanted = getattr(expected, name)
        assert torch.equal(got.long(), wanted.long()), f"{name}: {got} for {wanted}"


def route(n: int, m: int, k: int, noisy: bool = True, renormalize: bool = False) -> None:
    clean, noise, eps = (normal(n, m, seed=s) for s in range(3))
    eps = eps if noisy else torch.zeros(n, m)
    upstream = normal(n, k, seed=3), normal(m, seed=4)
    tensors = leaves(clean, noise)[: 1 + noisy]
    with poisoned():
        given = (*tensors, noise)[:2], eps if noisy else None
        weights, mean, *plan = kernels.noisy_topk(*given[0], given[1], k, renormalize)
        gradients = torch.autograd.grad((weights, mean), tensors, upstream)

    exact = double(clean, noise)
    expected = reference.noisy_topk(*exact, k, eps.double(), renormalize)
    assert_plan(plan, expected)
    z = (exact[0] + eps * softplus(exact[1])).detach()
    relative = error_of_p(z)
    scale = 2 if renormalize else 1  # then p is divided by a sum of others
    assert_within(weights, expected.weights, scale * relative * expected.weights, "weights")
    assert_within(mean, expected.mean, (relative + n * U) * expected.mean, "mean")

    wanted = torch.autograd.grad(expected[:2], exact, [g.double() for g in upstream])
    terms = gradient_terms(torch.softmax(z, dim=1), expected, *upstream, renormalize)
    # A product of three numbers as wrong as p, and some roundings; dz/dnoise = eps sigmoid(noise).
    bounds = [(4 * relative + 16 * U) * terms]
    bounds.append(bounds[0] * (eps * torch.sigmoid(exact[1])).abs().detach())
    for name, got, right, bound in zip(("clean", "noise"), gradients, wanted, bounds, strict=False):
        assert_within(got, right, bound, f"d_{name}")


def gradient_terms(p: Tensor, routing, d_weights: Tensor, d_mean: Tensor, renormalize: bool):
    """p (|dL/dp| + sum p |dL/dp|): what the gradient of the scores is made of, without signs."""
    d_weights = d_weights.double().abs()
    terms = torch.zeros_like(p).scatter(1, routing.experts, d_weights)
    if renormalize:
        size = p.gather(1, routing.experts).sum(1, keepdim=True)
        slope = (d_weights * routing.weights.detach()).sum(1, keepdim=True)
        terms = terms.scatter_add(1, routing.experts, slope.expand_as(d_weights)) / size
    terms = terms + d_mean.double().abs() / len(p)
    return p * (terms + (p * terms).sum(1, keepdim=True))


def drawn(n: int, m: int, k: int) -> None:
    """eps drawn in the kernels: the same ones forward and backward, and standard normal."""
    noise = normal(n, m, seed=1)
    tensors = leaves(torch.zeros(n, m), noise)
    torch.manual_seed(0)
    with poisoned():
        weights, _, *plan = kernels.noisy_topk(*tensors, "draw", k, False)
        d_clean, d_noise = torch.autograd.grad(weights[:, 0].sum(), tensors)
    # d_noise = d_clean eps sigmoid(noise): this gives eps up to some 8 roundings.
    eps = d_noise.double() / (d_clean.double() * torch.sigmoid(noise.double()))
    expected = reference.noisy_topk(torch.zeros(n, m).double(), noise.double(), k, eps)
    assert_plan(plan, expected)
    relative = error_of_p(eps * softplus(noise.double()), roundings=4 + 8)
    assert_within(weights, expected.weights, relative * expected.weights, "weights")
    # Beyond five standard deviations, N*M normal numbers' mean and variance would be wrong ones.
    assert abs(eps.mean()) < 5 / (n * m) ** 0.5
    assert abs(eps.var() - 1) < 5 * (2 / (n * m)) ** 0.5


CASES = {
    "route 48,5,2": partial(route, 48, 5, 2),
    "route 48,5,2 drawn": partial(drawn, 48, 5, 2),
    "route 37,13,3 no noise, renormalised": partial(route, 37, 13, 3, False, True),
    "route 130,64,8 renormalised": partial(route, 130, 64, 8, True, True),
    "route 200,16,2 a sample in one lane": partial(route, 200, 16, 2),
    "route 600,7,2": partial(route, 600, 7, 2),
    "route 2060,64,2 two tiles a block": partial(route, 2060, 64, 2),
    "route 300,32,32 counts of all experts": partial(route, 300, 32, 32),
    "route 6,600,3 two warps": partial(route, 6, 600, 3),
    "route 4099,6,2 scan": partial(route, 4099, 6, 2),
}
