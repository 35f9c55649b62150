"""Methods to compare with, on networks with heat-map heads."""

from __future__ import annotations

import copy

import pytest
import torch
from support.maps import L, alive, experts, images, loss
from torch import nn

from hubpath_fast.baselines import (
    DistillObjective,
    SingleModel,
    ZooTuning,
    difference,
    reestimate_batchnorm,
    uniform_soup,
)
from hubpath_fast.baselines.knowledge_flow import KnowledgeFlow, KnowledgeFlowObjective
from hubpath_fast.baselines.zoo_layers import MixedConv2d
from hubpath_fast.baselines.zoo_tuning import zoo_tuning_groups
from hubpath_fast.compare.digits_hub import DigitsHub, Pretraining
from hubpath_fast.data import DigitsTask
from hubpath_fast.hub.expert import network
from hubpath_fast.training import TrainerConfig

GROUPS = TrainerConfig(steps=10, lr_expert=0.1, lr_head=0.3, lr_router=0.5)


class Plain:
    """What distillation and Knowledge Flow ask of a task, of maps."""

    loss = staticmethod(loss)

    @staticmethod
    def ensemble(outputs, temperature=1.0):
        return outputs.mean(0)

    @staticmethod
    def distance(student, teacher, temperature=1.0):
        return loss(student, teacher.detach())


def equal_hub(names=("test_resnet",) * 3):
    return alive(experts(list(names)))


def test_zoo_tuning_mixes_the_bodies_and_keeps_the_first_head():
    hub, (x, _) = equal_hub(), images(dtype=torch.float32)
    model = ZooTuning(hub, lite=True)
    head = network(model.module).head
    assert not any(isinstance(layer, MixedConv2d) for layer in head.modules())
    theirs = hub[0].body.head.state_dict()
    assert all(
        torch.equal(new, theirs[key])
        for key, new in head.state_dict().items()
        if "running" not in key
    )
    mixed = [layer for layer in model.modules() if isinstance(layer, MixedConv2d)]
    plain = [m for m in hub[0].body.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert len(mixed) == len(plain) > 10
    groups = {group.name: group for group in zoo_tuning_groups(model, GROUPS)}
    assert {id(p) for p in groups["heads"].params} == {id(p) for p in head.parameters()}
    model.train()(x)
    merged = model.merged()
    with torch.no_grad():
        expected = model.eval()(x)
        # Mixed kernels are summed in float32, in one order or another.
        tolerance = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=tolerance)
    ZooTuning(hub)(x).sum().backward()


@pytest.mark.parametrize("name", ["test_resnet", "torchvision/resnet18"])
def test_knowledge_flows_through_the_stages_of_the_body(name):
    hub, (x, y) = equal_hub([name] * 2), images(4, torch.float32)
    model = KnowledgeFlow(hub)
    first = "act1" if name == "test_resnet" else "relu"
    stages = (first, "layer1", "layer2", "layer3", "layer4")
    assert model.layers == tuple(f"backbone.{stage}" for stage in stages)
    objective = KnowledgeFlowObjective(Plain, steps=10)
    losses = objective(model.train(), x, y)
    losses.total.backward()
    torch.testing.assert_close(losses.parts["task"], loss(model.flow(x, model.teach(x)), y).mean(),
                               rtol=1e-3, atol=1e-6)  # fmt: skip
    assert all(p.grad is not None for p in model.flow.parameters())
    model.eval()
    assert model(x).shape == (4, L, 16, 16)


def test_soups_and_distillation_of_maps():
    hub, (x, y) = equal_hub(), images(6, torch.float32)
    assert difference([expert.module for expert in hub]) is None
    others = experts(["test_resnet", "test_nfnet"])
    assert "have different architectures" in difference([e.module for e in others])
    states = [expert.module.state_dict() for expert in hub]
    soup = copy.deepcopy(hub[0].module)
    soup.load_state_dict(uniform_soup(states))
    weights = [expert.body.head.final.weight.double() for expert in hub]
    assert torch.equal(soup.head.final.weight, (sum(weights) / 3).float())
    reestimate_batchnorm(soup, [x])
    assert soup(x).shape == y.shape

    teachers = [SingleModel(expert) for expert in hub[1:]]
    student = SingleModel(hub[0])
    losses = DistillObjective(Plain, teachers, weight=0.25)(student.eval(), x, y)
    with torch.no_grad():
        said = student(x)
        mean = (teachers[0](x) + teachers[1](x)) / 2
    expected = 0.75 * loss(said, y).mean() + 0.25 * loss(said, mean).mean()
    torch.testing.assert_close(losses.total.detach(), expected)


def test_the_digits_hubs_bodies_fit_under_the_heads(tmp_path):
    """They are pre-trained as classifiers, and loaded once the heads of maps are there."""
    hub = DigitsHub(DigitsTask(0), Pretraining(epochs=1), ["test_resnet"], tmp_path)
    [expert] = experts(["test_resnet"])
    hub.load(0, expert)
    state = hub._state(0)
    body = expert.body.backbone.state_dict()
    assert {*state} - {*body} == {"fc.weight", "fc.bias"}
    assert all(torch.equal(body[key], state[key]) for key in body)
