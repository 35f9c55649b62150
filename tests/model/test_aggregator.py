"""The default aggregator: linear, and from a stated size on the weighted sum that it starts as."""

from __future__ import annotations

import copy

import pytest
import torch
from support.pathway import CLOSE, TableGenerator, assert_equal_step, build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hubpath_fast as hp
from hubpath_fast import reference
from hubpath_fast.model import LARGEST_DEFAULT, make_aggregator
from hubpath_fast.recipes.fit import _aggregator
from hubpath_fast.runs.config import FitConfig

MANY = 10_000


class Largest(TorchDispatchMode):
    """Notes the most elements of a tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        return found


def hub(num_outputs, m=5, **options):
    return hp.HubPathway(
        [nn.Linear(2, num_outputs) for _ in range(m)],
        TableGenerator(torch.zeros(9, m), torch.zeros(9, m)),
        num_outputs=num_outputs,
        **options,
    )


def test_at_ten_thousand_outputs_it_is_the_sum_and_nothing_large_is_made():
    with Largest() as largest:
        model = hub(MANY)
        out = model(torch.randn(3, 2), target=torch.tensor([0, 9_999, 5]))
        hp.HubPathwayLoss()(out, torch.tensor([0, 9_999, 5])).total.backward()
    assert isinstance(model.aggregator, hp.SumAggregator)
    assert list(model.aggregator.parameters()) == []
    assert out.prediction.shape == (3, MANY)
    assert largest.elements == 3 * 5 * MANY  # the concatenation
    made = hp.create_model(["test_resnet", "test_efficientnet"], MANY, 1, False, 32)
    assert isinstance(made.aggregator, hp.SumAggregator)


@pytest.mark.parametrize(
    ("m", "c", "kind"),
    [
        (5, 1_000, hp.LinearAggregator),
        (5, 3_162, hp.LinearAggregator),  # 49,991,220 weights
        (5, 3_163, hp.SumAggregator),  # 50,022,845
        (1, 7_071, hp.LinearAggregator),
        (1, 7_072, hp.SumAggregator),
    ],
)
def test_the_line_lies_at_fifty_million_weights(m, c, kind):
    assert LARGEST_DEFAULT == 50_000_000
    with torch.device("meta"):
        assert type(hub(c, m, k=1).aggregator) is kind
        assert type(make_aggregator("auto", m, c)) is kind


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("linear", 500_010_000), ("sum", 0), ("mlp", 500_010_000 + 2_000_040_000 + 400_010_000)],
)
def test_what_is_asked_for_is_made_whatever_its_size(kind, weights):
    with torch.device("meta"):
        assert sum(p.numel() for p in make_aggregator(kind, 5, MANY).parameters()) == weights


@pytest.mark.parametrize("tail", [(), (4, 3)], ids=["vectors", "maps"])
def test_the_sum_is_what_the_linear_map_starts_as(tail):
    concat = torch.randn(6, 3 * 7, *tail, dtype=torch.float64)
    expected = hp.LinearAggregator(3, 7).double()(concat)
    torch.testing.assert_close(hp.SumAggregator(3, 7)(concat), expected, **CLOSE)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_with_the_sum_equals_the_reference(fused):
    ours, _, x, y, eps = build(20, 5, 2)
    ours.aggregator = hp.SumAggregator(5, 7)
    truth = reference.ReferenceHubPathway(
        *copy.deepcopy((list(ours.experts), ours.generator, ours.aggregator)), k=2
    )
    assert_equal_step(ours, truth, x, y, eps, fused)


def settings(**options):
    return FitConfig(data="x", hub=("a", "b", "c", "d", "e"), **options)


def test_runs_made_before_the_sum_are_the_same_runs():
    assert settings().aggregator == "auto"
    assert settings().identity() == settings(aggregator="linear").identity()
    for other in ("sum", "mlp"):
        assert settings(aggregator=other).identity()["aggregator"] == other


def test_the_banner_says_what_is_unusual():
    with torch.device("meta"):
        small, large, asked = hub(10), hub(MANY), hub(MANY, aggregator=hp.LinearAggregator(5, MANY))
        mlp = hub(10, aggregator=hp.MLPAggregator(5, 10))
    assert _aggregator(settings(), small) == _aggregator(settings(aggregator="linear"), small) == ""
    assert "the weighted sum, since a linear one would have 500 M weights" in _aggregator(
        settings(), large
    )
    assert _aggregator(settings(aggregator="linear"), asked).endswith("linear, 500.0 M of them")
    assert _aggregator(settings(aggregator="mlp"), mlp).startswith("; the aggregator is mlp")
