"""Reads off what noise a routing took, and tells whether it is standard normal."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def read_noise(route: Callable, n: int, m: int, device: torch.device | str = "cpu") -> Tensor:
    """float64 [N, M]: the eps that ``route(clean, noise)`` takes, with all M >= 2 experts active.

    route draws the same at each call. With one expert's noise switched off, log(w_i / w_off) is
    eps_i; sorting is undone by the experts' indices.
    """
    eps = torch.empty(n, m, dtype=torch.float64, device=device)
    for off in (0, 1):
        clean = torch.zeros(n, m, dtype=torch.float64, device=device)
        noise = torch.full_like(clean, math.log(math.e - 1.0))  # softplus of it is 1
        noise[:, off] = -1e4
        weights, _, experts, *_ = route(clean, noise)
        log_p = torch.empty_like(weights).scatter_(1, experts, weights.log())
        value = log_p - log_p[:, off : off + 1]
        keep = torch.arange(m, device=device) != off
        eps[:, keep] = value[:, keep]
    return eps


def assert_standard_normal(eps: Tensor) -> None:
    """eps: float64 [N, M], some thousand numbers."""
    columns, eps = eps.shape[1], eps.flatten()
    count = eps.numel()
    # five standard errors of each moment
    for moment, expected, variance in (
        (1, 0.0, 1.0),
        (2, 1.0, 2.0),
        (3, 0.0, 15.0),
        (4, 3.0, 96.0),
    ):
        error = (eps**moment).mean() - expected
        assert abs(error) < 5 * math.sqrt(variance / count), f"moment {moment}: {error}"
    # the largest gap to the normal distribution (Kolmogorov-Smirnov): 1.95 at p = 0.001
    cdf = torch.special.ndtr(eps.sort().values)
    steps = torch.arange(1, count + 1, dtype=cdf.dtype, device=cdf.device) / count
    assert (cdf - steps).abs().max() < 1.95 / math.sqrt(count)
    for lag in (1, 2, 3, columns):  # the parts of one Philox block, and the next sample's
        assert_uncorrelated(eps[lag:], eps[:-lag], f"lag {lag}")


def assert_uncorrelated(a: Tensor, b: Tensor, what: str) -> None:
    """Of independent standard normals the mean product is within five of its standard errors."""
    mean = (a * b).mean()
    assert abs(mean) < 5 / math.sqrt(a.numel()), f"{what}: {mean}"
