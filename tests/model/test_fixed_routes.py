"""FixedRoutes: the routing that noisy_topk would make, weights of any sum, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hubpath_fast as hp
from hubpath_fast import functional as HF

M, C, F = 5, 3, 6
EXPERTS, WEIGHTS = [0, 4, 2], [0.3, 0.25, 0.1]


def model(**options):
    torch.manual_seed(0)
    experts = [nn.Linear(F, C) for _ in range(M)]
    routes = hp.FixedRoutes(EXPERTS, WEIGHTS, M)
    return hp.HubPathway(experts, routes, k=3, num_outputs=C, **options)


@pytest.mark.parametrize("n", [1, 7])
def test_the_routing_is_as_noisy_topk_makes_it(n):
    x = torch.randn(n, F)
    routes = hp.FixedRoutes(EXPERTS, WEIGHTS, M)
    routing = routes.routing(x)
    other = HF.noisy_topk(*routes(x), k=3)
    for name in ("experts", "offsets", "rows", "positions"):
        own, expected = getattr(routing, name), getattr(other, name)
        assert own.dtype == expected.dtype
        assert torch.equal(own, expected), name
    assert routing.counts() == other.counts() == [n, 0, n, 0, n]
    assert routing.weights.tolist() == torch.tensor(WEIGHTS).expand(n, 3).tolist()
    assert other.weights[0].tolist() == pytest.approx([w / 0.65 for w in WEIGHTS])
    assert routing.mean.tolist() == torch.tensor([0.3, 0, 0.1, 0, 0.25]).tolist()


def test_predictions_are_the_weighted_sum_and_double_stays_double():
    x, made = torch.randn(7, F), model().eval()
    with torch.no_grad():
        pairs = zip(EXPERTS, WEIGHTS, strict=True)
        expected = sum(w * made.experts[i](x) for i, w in pairs)
        assert made(x).numpy() == pytest.approx(expected.numpy(), abs=1e-6)
        made, x = made.double(), x.double()
        expected = sum(w * made.experts[i](x) for i, w in zip(EXPERTS, WEIGHTS, strict=True))
        assert made(x).numpy() == pytest.approx(expected.numpy(), abs=1e-14)


def test_it_trains_without_noise_and_keeps_the_models_file():
    made = model().train()
    x, y = torch.randn(8, F), torch.randint(C, (8,))
    out = made(x)
    assert torch.equal(out.routing.weights, made.generator.routing(x).weights)
    losses = hp.HubPathwayLoss()(out, y)
    assert torch.isfinite(losses.total)
    losses.total.backward()
    assert made.experts[1].weight.grad is None
    assert made.experts[4].weight.grad.abs().sum() > 0
    assert not [name for name in made.state_dict() if name.startswith("generator")]


def test_what_every_expert_says_has_its_normalisation_and_mode():
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.Dropout(0.5),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten()) for _ in range(M)]  # fmt: skip
    mean, std = torch.rand(M, 3), torch.rand(M, 3) + 0.1
    generator = hp.PathwayGenerator(M, width=4)
    made = hp.HubPathway(experts, generator, k=2, num_outputs=C, normalization=(mean, std))
    x = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    made.train()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    found = made.ask_all(x)
    assert made.training
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())
    assert found.shape == (6, M, C)
    assert not found.requires_grad
    made.eval()
    for i, expert in enumerate(experts):
        unit = (x / 255 - mean[i].view(3, 1, 1)) / std[i].view(3, 1, 1)
        with torch.no_grad():
            assert found[:, i].numpy() == pytest.approx(expert(unit).numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("experts", "weights", "text"),
    [
        ([], [], "experts: expected different numbers in 0..4, got []"),
        ([0, 5], [0.5, 0.5], "experts: expected different numbers in 0..4, got [0, 5]"),
        ([1, 1], [0.5, 0.5], "experts: expected different numbers in 0..4, got [1, 1]"),
        ([1.0], [0.5], "experts: expected different numbers in 0..4, got [1.0]"),
        ([0, 1], [0.5], "weights: expected 2 finite numbers above 0"),
        ([0, 1], [0.5, 0.0], "weights: expected 2 finite numbers above 0"),
        ([0, 1], [0.5, float("nan")], "weights: expected 2 finite numbers above 0"),
        ([0, 1], [0.5, "a"], "weights: expected 2 finite numbers above 0"),
    ],
)
def test_what_is_refused(experts, weights, text):
    with pytest.raises(ValueError) as error:
        hp.FixedRoutes(experts, weights, M)
    assert str(error.value).startswith(text)
