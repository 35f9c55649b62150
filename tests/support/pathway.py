"""A Hub-Pathway in float64, and the reference with the same parameters."""

from __future__ import annotations

import copy

import torch
from torch import nn

import hubpath_fast as hp
from hubpath_fast import reference
from support.graphs import assert_same, grads

CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # float64 on both sides, see test_functional


class TableGenerator(nn.Module):
    """Scores that a test chooses: row n of the batch gets row n of the tables."""

    def __init__(self, clean, noise):
        super().__init__()
        self.clean, self.noise = nn.Parameter(clean), nn.Parameter(noise)

    def forward(self, x):
        return self.clean[: len(x)], self.noise[: len(x)]


def conv_expert(channels=4, num_outputs=7):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, num_outputs),
    )  # fmt: skip


def linear_expert(num_outputs=7):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, num_outputs))


class MapExpert(nn.Module):
    """[n, 3, 4, 4] -> [n, 7, 3, 2]: an expert whose outputs are maps."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 4, 7 * 3 * 2)

    def forward(self, x):
        return self.linear(x.flatten(1)).view(len(x), 7, 3, 2)


def build(n, m, k, clean=None, noise=None, expert=linear_expert, seed=0, **options):
    """Our model and the reference on copies of the same modules, in float64 training mode."""
    torch.manual_seed(seed)
    experts = [expert() for _ in range(m)]
    clean = torch.randn(n, m) if clean is None else clean
    noise = torch.randn(n, m) if noise is None else noise
    ours = hp.HubPathway(experts, TableGenerator(clean, noise), k=k, **options).double()
    nn.init.normal_(ours.aggregator.weight)
    parts = copy.deepcopy((list(ours.experts), ours.generator, ours.aggregator))
    truth = reference.ReferenceHubPathway(*parts, k=k, min_group=ours.min_group)
    x = torch.randn(n, 3, 4, 4, dtype=torch.float64)
    return ours, truth, x, torch.randint(0, 7, (n,)), torch.randn(n, m, dtype=torch.float64)


def assert_equal_step(ours, truth, x, y, eps, fused=False):
    """fused: the model computes the exploit loss along with the aggregation."""
    out, expected = ours(x, eps, target=y if fused else None), truth(x, eps)
    torch.testing.assert_close(out.prediction, expected.prediction, **CLOSE)
    torch.testing.assert_close(out.expert_outputs, expected.expert_outputs, **CLOSE)
    losses = hp.HubPathwayLoss(explore=0.7)(out, y)
    assert not fused or out.fused_exploit.loss(y, 0.0) is losses.exploit
    total, *parts = reference.losses(expected, y, explore=0.7)
    found = losses.total, losses.task, losses.explore, losses.exploit
    torch.testing.assert_close(found, (total, *parts), **CLOSE)
    losses.total.backward()
    total.backward()
    assert_same_state(ours, truth)


def assert_same_state(ours, truth):
    assert_same(grads(ours), grads(truth), **CLOSE)
    assert_same(dict(ours.named_buffers()), dict(truth.named_buffers()), **CLOSE)
