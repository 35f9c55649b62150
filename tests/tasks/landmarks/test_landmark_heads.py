"""Heads of heat maps: their layers, and hubs of networks that have them."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from support.graphs import fixed_routing, grads
from support.maps import SIZE, L, Maps, alive, experts, images, loss
from support.pathway import CLOSE
from support.tape_backend import TapeBackend
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors.graphs import MIN_SEEN, GraphsExecutor
from hubpath_fast.hub import HubError, build_experts, create_model, split_parameters
from hubpath_fast.hub.costs import count_flops, expert_flops
from hubpath_fast.hub.dense import DenseNetwork
from hubpath_fast.hub.expert import network
from hubpath_fast.hub.router import generator_size
from hubpath_fast.model.features import OnFeatures
from hubpath_fast.reference import ReferenceHubPathway
from hubpath_fast.reference import losses as reference_losses
from hubpath_fast.tasks.landmarks import HeatmapHead
from hubpath_fast.training import TrainerConfig
from hubpath_fast.training.optimizer import pathway_groups


@pytest.mark.parametrize(("stride", "deconvolutions"), [(4, 0), (8, 1), (16, 2), (32, 3), (64, 4)])
def test_a_head_doubles_the_map_until_a_cell_is_four_pixels(stride, deconvolutions):
    torch.manual_seed(0)
    head = HeatmapHead(48, L, stride, width=16)
    x = torch.randn(2, 48, 128 // stride, 128 // stride)
    assert head(x).shape == (2, L, 32, 32)
    layers = [layer for layer in head.modules() if isinstance(layer, nn.ConvTranspose2d)]
    widths = [48, *[16] * deconvolutions]
    assert [(layer.in_channels, layer.out_channels) for layer in layers] == [
        (width, 16) for width in widths[:-1]
    ]
    for layer in layers:
        assert (layer.kernel_size, layer.stride, layer.padding) == ((4, 4), (2, 2), (1, 1))
        assert layer.bias is None
    assert tuple(head.final.weight.shape) == (L, widths[-1], 1, 1)
    assert torch.equal(head.final.bias, torch.zeros(L))
    for layer in head.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert torch.equal(layer.weight, torch.ones(16))
            assert not layer.bias.any()
    drawn = torch.cat([layer.weight.flatten() for layer in (*layers, head.final)])
    # Of n draws the mean is within 4 std / sqrt(n), the deviation within 4 std / sqrt(2 n).
    assert abs(drawn.mean().item()) < 4e-3 / len(drawn) ** 0.5
    assert abs(drawn.std().item() - 1e-3) < 4e-3 / (2 * len(drawn)) ** 0.5


@pytest.mark.parametrize("stride", [1, 2, 12, 0])
def test_a_stride_that_cannot_become_four_is_refused(stride):
    with pytest.raises(HubError, match=rf"stride: expected .* 4, 8, 16, 32 or 64 .* got {stride}:"):
        HeatmapHead(8, L, stride)


def test_a_hub_has_heads_of_maps_that_are_new_and_bodies_that_are_not():
    names = ["test_resnet", "torchvision/resnet18?freeze=body"]
    for expert, plain in zip(experts(names), ["test_resnet", None], strict=True):
        assert isinstance(expert.body, DenseNetwork)
        x = torch.randn(2, 3, SIZE, SIZE)
        maps = expert.module.train()(x)
        assert maps.shape == (2, L, 16, 16)
        body, head = split_parameters(expert.module)
        assert [id(p) for p in head] == [id(p) for p in expert.body.head.parameters()]
        assert len(head) == 3 * 3 + 2
        maps.square().mean().backward()
        assert all(p.grad is not None for p in head)
        assert all((p.grad is not None) == (plain is not None) for p in body)
        if plain is not None:  # the classifier's weights are gone
            counted = sum(p.numel() for p in timm.create_model(plain, num_classes=0).parameters())
            assert sum(p.numel() for p in body) == counted


CPU = torch.device("cpu")
GROUPS = TrainerConfig(steps=10, lr_expert=0.1, lr_head=0.3, lr_router=0.5)
MIXED = ["test_resnet", "test_nfnet", "test_efficientnet?freeze=body"]


def pathway(executor="sequential", names=MIXED, **options):
    model = create_model(
        alive(experts(names)), L, k=2, input_size=SIZE, executor=executor,
        generator_width=4, generator_stride=4, **options,
    )  # fmt: skip
    nn.init.normal_(model.generator.clean.weight)
    return model.double()


def step(model, x, y, routing=None):
    """Losses and gradients of a training step, by name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    output = model(x) if routing is None else model(x, routing=routing)
    losses = hp.HubPathwayLoss(loss)(output, y)
    losses.total.backward()
    return output, losses, grads(model)


def test_a_hub_of_maps_trains_as_the_reference_does():
    """Frozen bodies, BatchNorm and groups of many sizes, in float64."""
    hub = alive(experts(MIXED))
    x, y = images()
    generator = hp.PathwayGenerator(3, width=4, stride=4)
    nn.init.normal_(generator.clean.weight)
    model = hp.HubPathway([e.module for e in hub], generator, k=2, num_outputs=L).double()
    nn.init.normal_(model.aggregator.weight)
    parts = copy.deepcopy((list(model.experts), model.generator, model.aggregator))
    truth = ReferenceHubPathway(*parts, k=2, min_group=model.min_group)
    eps = torch.randn(12, 3, dtype=torch.float64)
    output, expected = model(x, eps), truth(x, eps)
    assert output.expert_outputs.shape == (24, L, 16, 16)
    assert output.prediction.shape == (12, L, 16, 16)
    torch.testing.assert_close(output.prediction, expected.prediction, **CLOSE)
    hp.HubPathwayLoss(loss, explore=0.7)(output, y).total.backward()
    reference_losses(expected, y, explore=0.7, task_loss=loss)[0].backward()
    torch.testing.assert_close(grads(model), grads(truth), **CLOSE)
    frozen = {f"experts.2.body.backbone.{n}" for n, _ in hub[2].body.backbone.named_parameters()}
    assert {name for name, grad in grads(model).items() if grad is None} == frozen


@pytest.mark.parametrize("executor", ["threads", "graphs"])
def test_executors_agree(executor):
    model, (x, y) = pathway(names=MIXED[:2]), images()
    twin = copy.deepcopy(model)
    model.executor = "threads" if executor == "threads" else GraphsExecutor(TapeBackend)
    for _ in range(MIN_SEEN + 2 if executor == "graphs" else 1):
        routings = [fixed_routing(each, 12, [4, 8]) for each in (model, twin)]
        found, expected = (
            step(each, x, y, routing) for each, routing in zip((model, twin), routings, strict=True)
        )
        torch.testing.assert_close(found[2], expected[2], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[0].prediction, expected[0].prediction, **CLOSE)
    assert executor == "threads" or model.executor_report().hits > 0


def test_an_expert_of_one_row_keeps_its_statistics_head_and_all():
    model, (x, y) = pathway(names=MIXED[:2]), images()
    before = copy.deepcopy(model.state_dict())
    step(model, x, y, fixed_routing(model, 12, [1, 11]))
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("experts.0.") for name in moved)
    assert {name for name in moved if "head" in name} == {
        f"experts.1.head.deconvolutions.{i}.{kind}"
        for i in (1, 4, 7) for kind in ("running_mean", "running_var", "num_batches_tracked")
    }  # fmt: skip


def test_a_head_on_a_frozen_body_learns_its_statistics():
    """They start as those of no batch, and a body's are kept because they were learned."""
    [expert] = alive(experts(["test_resnet?freeze=body"]))
    module = expert.module.train().eval().train()
    before = copy.deepcopy(expert.body.state_dict())
    module(images(dtype=torch.float32)[0])
    moved = {n for n, t in expert.body.state_dict().items() if not torch.equal(before[n], t)}
    assert moved == {
        f"head.deconvolutions.{i}.{kind}"
        for i in (1, 4, 7) for kind in ("running_mean", "running_var", "num_batches_tracked")
    }  # fmt: skip


def test_optimiser_groups_know_the_head():
    model = pathway()
    groups = {group.name: group for group in pathway_groups(model, GROUPS)}
    heads = {id(p) for expert in model.experts for p in network(expert).head.parameters()}
    assert groups["heads"].lr == 0.3
    assert {id(p) for p in groups["heads"].params} == heads
    assert len(heads) == 3 * 11


def test_heads_are_warmed_up_on_kept_maps():
    model, (x, y) = pathway(names=MIXED[:2]), images()
    phase = OnFeatures(model)
    told = []
    kept = phase.keep(zip(x.split(5), y.split(5), strict=True), 12, CPU, room=told.append)
    assert torch.equal(kept, y)
    assert [head.kept.shape for head in phase.heads] == [(12, 96, 2, 2), (12, 192, 2, 2)]
    assert [head.row_shape for head in phase.heads] == [(L, 16, 16)] * 2
    for part in phase.trained.modules():  # batch statistics would be the rows' in the one
        part.training = False
    with torch.no_grad():
        numbers = torch.arange(12, dtype=torch.float64)
        torch.testing.assert_close(phase.trained(numbers), model.eval()(x), **CLOSE)


def test_a_router_looks_at_an_experts_map():
    model = create_model(experts(MIXED), L, k=2, input_size=SIZE, router="expert:1")
    assert model.generator.num_features == 192
    x = torch.rand(3, 3, SIZE, SIZE)
    with torch.no_grad():
        seen = model.generator.seen(x)
        source = model.generator.source
        shown = (x - model.generator.mean) / model.generator.std
        torch.testing.assert_close(seen, source.features(shown).mean((2, 3)), rtol=1e-4, atol=1e-5)
        assert model.eval()(x).shape == (3, L, 16, 16)


def test_the_routers_size_follows_what_experts_cost_with_their_heads():
    costs = []
    for width in (8, 256):
        task = Maps(width=width)
        hub = build_experts(["test_resnet"] * 2, L, False, SIZE, task=task)
        costs.append(expert_flops(hub[0], L, SIZE))
        assert costs[-1] == count_flops(hub[0].module, SIZE)
        model = create_model(hub, L, k=2, input_size=SIZE)
        assert (model.generator.width, model.generator.stride) == generator_size(
            2, SIZE, 2 * costs[-1], None, None
        )
    assert costs[1] > 2 * costs[0]
