"""What a model says of where it comes from, and what it is."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import hubpath_fast as hp
from hubpath_fast.hub import ExpertSpec
from hubpath_fast.model import Origin, describe

TINY = "timm/test_resnet"


def named_hub(**options) -> hp.HubPathway:
    names = [TINY, "timm/test_efficientnet", f"{TINY}?freeze=body&size=48"]
    return hp.create_model(names, 3, pretrained=False, input_size=64, **options)


def test_a_hub_of_names_keeps_them_with_their_options_and_labels():
    origin = named_hub().origin
    assert [expert.spec for expert in origin.experts] == [
        TINY,
        "timm/test_efficientnet",
        f"{TINY}?freeze=body&size=48",
    ]
    assert origin.labels == ("test_resnet", "test_efficientnet", "test_resnet (freeze=body)")
    assert origin.input_size == 64
    assert origin.router == "image"


def test_the_size_that_a_network_works_at_is_written_down():
    """Which size an architecture falls back to may change with its library."""
    model = hp.create_model([TINY, TINY], 3, pretrained=False, input_size=64, resize_to_native=True)
    sizes = [ExpertSpec.parse(expert.spec).size for expert in model.origin.experts]
    assert sizes == [160, 160]


def test_modules_of_ones_own_have_no_name_and_a_class():
    model = hp.HubPathway([nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)], hp.PathwayGenerator(2))
    assert [expert.spec for expert in model.origin.experts] == [None, None]
    assert model.origin.labels == ("Conv2d #1", "Conv2d #2")
    mixed = hp.create_model([TINY, nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))], 3,
                            pretrained=False, input_size=32)  # fmt: skip
    assert [expert.spec for expert in mixed.origin.experts] == [TINY, None]
    assert mixed.origin.labels == ("test_resnet", "Sequential")


def test_the_origin_follows_experts_that_come_and_go():
    model = named_hub(router="expert:2")
    assert model.origin.router == "expert:2"
    removed = model.origin.experts[0]
    model.remove_expert(0)
    assert removed not in model.origin.experts
    assert model.origin.router == "expert:1"
    model.add_expert(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 3)), [0.5] * 3, [0.5] * 3)
    assert [expert.module for expert in model.origin.experts[-1:]] == ["Sequential"]
    assert len(model.origin.experts) == len(model.experts) == 3


def test_the_cheapest_expert_is_written_down_by_its_number():
    router = named_hub(router="expert").origin.router
    assert router.partition(":")[2].isdecimal()


def test_removing_an_expert_renumbers_only_a_router_behind_it():
    origin = Origin.of_modules([nn.Identity()] * 4)
    for router, removed, expected in (
        ("expert:2", 0, "expert:1"),
        ("expert:2", 3, "expert:2"),
        ("network:resnet18", 0, "network:resnet18"),
        ("image", 0, "image"),
        (None, 0, None),
    ):
        moved = Origin(origin.experts, None, router).without(removed)
        assert moved.router == expected


@pytest.mark.parametrize("kind", ["linear", "sum", "mlp"])
def test_a_description_is_json_and_says_what_the_parts_are(kind):
    aggregators = {
        "linear": hp.LinearAggregator(3, 3),
        "sum": hp.SumAggregator(3, 3),
        "mlp": hp.MLPAggregator(3, 3, hidden=5),
    }
    model = named_hub(aggregator=aggregators[kind], generator_width=4, generator_stride=2)
    described = describe(model)
    assert json.loads(json.dumps(described)) == described
    assert described["aggregator"] == {"kind": kind, **({"hidden": 5} if kind == "mlp" else {})}
    assert described["generator"] == {
        "kind": "image", "in_channels": 3, "width": 4, "stride": 2,
    }  # fmt: skip
    assert (described["k"], described["num_outputs"], described["normalized"]) == (2, 3, True)
    assert described["channels_last"] is False
    assert describe(model.to(memory_format=torch.channels_last))["channels_last"] is True


def test_other_generators_are_described_too():
    model = named_hub(router="network:test_resnet")
    assert describe(model)["generator"] == {
        "kind": "features", "num_features": 96, "own": True, "size": 64,
    }  # fmt: skip
    model.generator = hp.FixedRoutes([1, 0], [0.25, 0.5], 3)
    assert describe(model)["generator"] == {
        "kind": "fixed", "experts": [0, 1], "weights": [0.5, 0.25],
    }  # fmt: skip
    model.generator = nn.Identity()
    assert describe(model)["generator"] == {"kind": "module", "module": "Identity"}


def test_copies_keep_the_origin():
    model = named_hub()
    assert copy.deepcopy(model).origin == model.origin
