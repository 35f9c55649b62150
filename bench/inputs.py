"""What operations are timed and checked on: sizes, and random tensors of any of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hubpath_fast import Routing
from hubpath_fast import functional as HF

ROUTINGS = ("balanced", "skewed")


class Norm(NamedTuple):
    """What a BatchNorm has besides its rows: how many are valid, what it is followed by."""

    valid: int
    activation: str | None = None
    residual: bool = False
    layout: str = "channels_last"  # or "contiguous"

    @property
    def followers(self) -> str:
        return "+".join(["residual"] * self.residual + [self.activation or "identity"])


class Size(NamedTuple):
    """N samples, M experts, K active, C outputs (features for gather), and how rows spread.

    trailing: of maps, which aggregate takes: height and width, or a length. norm: of
    masked_batch_norm, whose rows and channels are N and C; see ``batch_norm``.
    """

    n: int
    m: int
    k: int
    c: int
    routing: str = "balanced"
    dtype: str = "float32"
    trailing: tuple[int, ...] = ()
    norm: Norm | None = None

    @property
    def positions(self) -> int:
        """Of a map; 1 without."""
        return math.prod(self.trailing)

    @property
    def numbers(self) -> str:
        """``48,5,2,100``, or ``20/24,256,56x56,residual+relu`` of a BatchNorm."""
        if self.norm is None:
            return ",".join(map(str, self[:4]))
        maps = ["x".join(map(str, self.trailing))] * bool(self.trailing)
        layout = [self.norm.layout] * (self.norm.layout != "channels_last")
        rows = f"{self.norm.valid}/{self.n}"
        return ",".join([rows, str(self.c), *maps, self.norm.followers, *layout])

    def __str__(self) -> str:
        if self.norm is not None:
            return f"{self.numbers} {self.dtype}"
        maps = f" {'x'.join(map(str, self.trailing))}" if self.trailing else ""
        text = f"N={self.n} M={self.m} K={self.k} C={self.c}{maps} {self.routing}"
        return text if self.dtype == "float32" else f"{text} {self.dtype}"


def batch_norm(
    valid: int,
    capacity: int,
    channels: int,
    *trailing: int,
    dtype: str = "float32",
    **options: object,
) -> Size:
    """Of a BatchNorm over the valid rows of [capacity, channels, *trailing]. options: ``Norm``'s"""
    return Size(capacity, 1, 1, channels, "balanced", dtype, trailing, Norm(valid, **options))


class Inputs:
    """Makes the tensors of one size. seed: None leaves them uninitialised, for who only compiles.

    Parameters are scaled so that results are of size one.
    """

    def __init__(self, size: Size, device: str, seed: int | None = 0):
        self.size, self.device, self.values = size, device, seed is not None
        self.dtype = getattr(torch, size.dtype)
        self.random = torch.Generator(device).manual_seed(seed or 0)

    def normal(self, *shape: int) -> Tensor:
        if not self.values:
            return torch.empty(shape, device=self.device)
        return torch.randn(shape, generator=self.random, device=self.device)

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = self.normal(*shape)
        if self.values:
            values.mul_(scale)
        return values.to(self.dtype).requires_grad_()

    def upstream(self, *shape: int) -> Tensor:
        return self.normal(*shape).to(self.dtype)

    def target(self) -> Tensor:
        if not self.values:
            return torch.zeros(self.size.n, dtype=torch.int64, device=self.device)
        shape = (self.size.n,)
        return torch.randint(self.size.c, shape, generator=self.random, device=self.device)

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        n, m, k = self.size[:3]
        if not self.values:
            clean, noise, eps = (self.normal(n, m) for _ in range(3))
            return clean, noise, eps
        return scores(n, m, k, self.device, self.random, self.size.routing == "skewed")

    def routing(self) -> Routing:
        n, m, k = self.size[:3]
        clean, noise, eps = self.scores()
        if self.values:
            return HF.noisy_topk(clean, noise, k, eps, backend="torch")
        integers = ((m + 1,), (n * k,), (n, k))
        plan = [torch.empty(s, dtype=torch.int32, device=self.device) for s in integers]
        experts = torch.empty((n, k), dtype=torch.int64, device=self.device)
        return Routing(self.normal(n, k), self.normal(m), experts, *plan)


def scores(
    n: int, m: int, k: int, device: str, random: torch.Generator, skewed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """clean, noise and eps [N, M] whose K largest p are clearly apart, and apart from the rest.

    Float32 may order two almost equal probabilities otherwise than float64, and both be right;
    one such sample among many would look like a wrong result. Such samples are drawn again.
    """

    def normal() -> Tensor:
        return torch.randn((n, m), generator=random, device=device)

    noise, eps = normal(), normal()
    # Skewed: the first expert is e^6 times as likely as the last.
    favour = torch.linspace(6, 0, m, device=device) if skewed else 0.0
    clean = normal() + favour
    while True:
        z = clean.double() + eps.double() * F.softplus(noise.double())
        largest = z.topk(min(k + 1, m), dim=1).values
        close = (largest.diff(dim=1) > -1e-4).any(dim=1)
        if not close.any():
            return clean, noise, eps
        clean[close] = (normal() + favour)[close]
