"""total_loss on random arguments against the definition in float64: values and every gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hubpath_fast import kernels
from support.output_cases import ROUNDING, assert_within, double, leaves

WEIGHT, SMOOTHING, UPSTREAM = 0.3, 0.1, (2.0, 3.0, 5.0)
NAMES = ("prediction", "mean", "exploit")
SIZES = {  # N, C, M
    "the paper's": (48, 100, 5),
    "one of each": (1, 1, 1),
    "ragged": (13, 37, 7),
    "two tiles of one program": (77, 130, 19),
    "two programs": (300, 130, 3),
    "rows beyond a tile": (3, 2500, 4),
}


def make(size, dtype=torch.float64, device="cpu") -> tuple[Tensor, ...]:
    """(prediction, target, mean, exploit); a sample is ignored, an expert's mean is 0."""
    n, c, m = size
    random = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    prediction = torch.randn(n, c, generator=random, dtype=torch.float64).to(dtype)
    target = torch.randint(c, (n,), generator=random)
    target[n // 2] = -100
    mean = torch.rand(m, generator=random, dtype=torch.float64)
    mean[-1] = 0
    exploit = torch.rand((), generator=random, dtype=torch.float64)
    given = prediction, target, (mean / mean.sum().clamp_min(1)).to(wide), exploit.to(wide)
    return tuple(tensor.to(device) for tensor in given)


def definition(prediction, target, mean, exploit, weight=WEIGHT, smoothing=SMOOTHING, tiny=None):
    losses = F.cross_entropy(prediction, target, reduction="none", label_smoothing=smoothing)
    task = losses.sum() / len(losses)
    explore = (mean * mean.clamp_min(tiny or torch.finfo(mean.dtype).tiny).log()).sum()
    return task + weight * explore + (0 if exploit is None else exploit), task, explore, losses


def check(given, ops=kernels, smoothing=SMOOTHING) -> None:
    prediction, target, mean, exploit = given
    tensors = leaves(prediction, mean, exploit)
    results = ops.total_loss(tensors[0], target, *tensors[1:], WEIGHT, smoothing)
    d_losses = torch.linspace(-1, 1, len(target), dtype=results[3].dtype, device=target.device)
    exact = double(*tensors)
    expected = definition(
        exact[0], target, *exact[1:], WEIGHT, smoothing, torch.finfo(mean.dtype).tiny
    )
    compute = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    assert all(result.dtype == compute for result in results)
    # A loss adds up to C exponentials in blocks of at most 128, then pairwise: below 160 roundings
    # of about 1 + max|x|. The others are sums of as many terms of at most |log tiny|.
    unit = ROUNDING[compute] * 160 * (1 + prediction.double().abs().max().item())
    of_explore = ROUNDING[compute] * (len(mean) + 8) * -math.log(torch.finfo(mean.dtype).tiny)
    for name, found, right in zip(
        ("total", "task", "explore", "losses"), results, expected, strict=True
    ):
        assert_within(found, right, 2 * unit + of_explore, name)

    every = [*(torch.tensor(u, dtype=compute, device=target.device) for u in UPSTREAM), d_losses]
    for asked in ((0,), (1,), (2,), (3,), (0, 1, 2, 3)):
        gradients, wanted = (
            torch.autograd.grad(
                [r[i] for i in asked], at, [every[i].to(r[i].dtype) for i in asked],
                retain_graph=True, allow_unused=True,
            )
            for r, at in ((results, tensors), (expected, exact))
        )  # fmt: skip
        for name, found, right in zip(NAMES, gradients, wanted, strict=True):
            if right is None or found is None:
                assert found is right, f"d_{name} of {asked}"
                continue
            stored = ROUNDING[found.dtype] * right.abs()
            bound = 8 * unit + of_explore if name == "prediction" else 8 * of_explore
            assert_within(found, right, bound + stored, f"d_{name} of {asked}")
