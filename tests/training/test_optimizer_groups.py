import copy

import pytest
import torch
from support.graphs import assert_same
from support.training import Expert, pathway, single
from torch import nn

from hubpath_fast.training import (
    ParameterGroup,
    TrainerConfig,
    build_optimizer,
    default_groups,
    head_parameters,
    pathway_groups,
    single_groups,
)

CONFIG = TrainerConfig(lr_expert=0.1, lr_head=0.2, lr_router=0.3)


def names(model, group):
    ids = {id(p) for p in group.params}
    return [name for name, p in model.named_parameters() if id(p) in ids]


def test_a_pathway_has_bodies_heads_and_router_each_with_its_rate():
    model = pathway()
    groups = pathway_groups(model, CONFIG)
    assert [(g.name, g.lr) for g in groups] == [("experts", 0.1), ("heads", 0.2), ("router", 0.3)]
    assert names(model, groups[0]) == [
        f"experts.{i}.body.{j}.{kind}"
        for i in range(3) for j in (0, 1) for kind in ("weight", "bias")
    ]  # fmt: skip
    assert names(model, groups[1]) == [
        f"experts.{i}.head.{kind}" for i in range(3) for kind in ("weight", "bias")
    ]
    assert names(model, groups[2]) == [
        f"{part}.{kind}"
        for part in ("generator.heads", "aggregator")
        for kind in ("weight", "bias")
    ]


def test_a_single_model_has_body_and_head_and_no_rate_of_its_own_means_the_bodys():
    model = single()
    groups = default_groups(model, TrainerConfig(lr_expert=0.1, lr_head=None))
    assert [(g.name, g.lr, len(g.params)) for g in groups] == [
        ("experts", 0.1, 4),
        ("heads", 0.1, 2),
    ]


def test_heads_are_found_by_get_classifier_by_name_and_inside_wrappers():
    import timm
    import torchvision

    net = timm.create_model("test_resnet", num_classes=5)
    assert {p.shape[0] for p in head_parameters(net)} == {5}
    wrapped = nn.ModuleDict({"network": net})
    assert [id(p) for p in head_parameters(wrapped)] == [id(p) for p in head_parameters(net)]
    mobile = torchvision.models.mobilenet_v3_small(weights=None)
    assert {id(p) for p in head_parameters(mobile)} == {
        id(p) for p in mobile.classifier.parameters()
    }
    two = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, depth=1)
    heads = {id(p) for head in (two.head, two.head_dist) for p in head.parameters()}
    assert {id(p) for p in head_parameters(two)} == heads
    headless = timm.create_model("test_resnet", num_classes=0)
    assert head_parameters(headless) == []
    assert [g.name for g in single_groups(headless, CONFIG)] == ["experts"]


def test_frozen_parameters_are_left_out_and_all_frozen_is_an_error():
    model = single()
    model.body.requires_grad_(False)
    optimizer = build_optimizer(model, default_groups(model, CONFIG), CONFIG)
    assert [g["name"] for g in optimizer.param_groups] == ["heads"]
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(model.requires_grad_(False), default_groups(model, CONFIG), CONFIG)


def test_a_forgotten_or_repeated_parameter_is_an_error():
    model = single()
    body = ParameterGroup("body", list(model.body.parameters()), 0.1)
    with pytest.raises(ValueError, match=r"in no group: head\.weight, head\.bias"):
        build_optimizer(model, [body], CONFIG)
    rest = ParameterGroup("rest", list(model.parameters()), 0.1)
    with pytest.raises(ValueError, match=r"body\.0\.weight is in the groups 'body' and 'rest'"):
        build_optimizer(model, [body, rest], CONFIG)


def test_biases_and_norms_can_be_spared_from_weight_decay():
    model = single()
    config = TrainerConfig(weight_decay=0.5, decay_bias_and_norm=False)
    optimizer = build_optimizer(model, default_groups(model, config), config)
    decayed = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        matrix = name in ("body.0.weight", "head.weight")
        assert decayed[id(p)] == (0.5 if matrix else 0.0), name


def test_experts_that_share_a_trunk_are_updated_once():
    model = pathway()
    trunk = Expert().body
    for expert in model.experts:
        expert.body = trunk
    optimizer = build_optimizer(model, default_groups(model, CONFIG), CONFIG)
    params = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert len(params) == len(set(params)) == len(list(model.parameters()))


@pytest.mark.parametrize("settings", [{"nesterov": True}, {"nesterov": False}, {}])
def test_the_fused_update_is_that_of_the_plain_optimizer_also_after_first_rows_that_come_late(
    settings,
):
    """Fused SGD fails where only some parameters have a momentum."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]).double()
    twin = copy.deepcopy(model)
    groups = [ParameterGroup("all", list(model.parameters()), 0.05)]
    options = {"lr": 0.05, "weight_decay": 0.1, "foreach": False}
    if settings:
        config = TrainerConfig(optimizer="sgd", weight_decay=0.1, **settings)
        plain = torch.optim.SGD(twin.parameters(), momentum=0.9, **settings, **options)
    else:
        config = TrainerConfig(weight_decay=0.1)
        plain = torch.optim.AdamW(twin.parameters(), **options)
    fused = build_optimizer(model, groups, config)
    for active in ([0], [0, 1], [1]):
        fused.zero_grad()
        plain.zero_grad()
        for i in active:
            for p, q in zip(model[i].parameters(), twin[i].parameters(), strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
        fused.step()
        plain.step()
        # A few roundings of float64 per step, on values of order 1.
        assert_same(model.state_dict(), twin.state_dict(), atol=1e-14)
