"""Heads of a task's own, and networks split into what comes before the head and the head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from hubpath_fast.hub import (
    HubError,
    Resized,
    build_experts,
    create_model,
    head_parameters,
    split_parameters,
)
from hubpath_fast.model.heads import mark_head

RESNET, MOBILENET = "timm/test_resnet", "torchvision/mobilenet_v3_small"


class MapHead(nn.Module):
    """[n, F, h, w], or [n, F*h*w] of a square map, -> [n, C, h, w]."""

    def __init__(self, features: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(features, outputs, 1)

    def forward(self, x):
        if x.dim() == 2:
            side = math.isqrt(x.shape[1] // self.conv.in_channels)
            x = x.unflatten(1, (-1, side, side))
        return self.conv(x)


@dataclass(frozen=True)
class Maps:
    """A map of numbers for each output, a 32nd of the image's side."""

    num_outputs: int

    def expected_shape(self, size):
        return (self.num_outputs, size // 32, size // 32)

    def attach_head(self, network):
        if isinstance(network, models.MobileNetV3):
            network.avgpool, network.classifier = nn.Identity(), MapHead(576, self.num_outputs)
            mark_head(network, ("classifier",))
        else:
            network.reset_classifier(0, "")
            network.fc = MapHead(network.num_features, self.num_outputs)
            mark_head(network, ("fc",))


@pytest.fixture
def files(tmp_path):
    """Names of two networks whose weights are in local files, and those weights."""
    torch.manual_seed(0)
    found = {}
    for name, network in (
        (RESNET, timm.create_model("test_resnet")),
        (MOBILENET, models.mobilenet_v3_small()),
    ):
        path = tmp_path / f"{name.rpartition('/')[2]}.safetensors"
        save_file(network.state_dict(), path)
        found[f"file/{path}?arch={name}"] = network.state_dict()
    return found


def test_a_tasks_own_head_is_new_on_a_loaded_body(files):
    torch.manual_seed(7)
    loaded = build_experts([*files], 6, input_size=64, task=Maps(6))
    torch.manual_seed(7)
    random = build_experts([*files], 6, pretrained=False, input_size=64, task=Maps(6))
    for expert, unloaded, state in zip(loaded, random, files.values(), strict=True):
        assert expert.module.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 6, 2, 2)
        body, head = split_parameters(expert.module)
        own = dict(expert.body.named_parameters())
        names = {id(parameter): name for name, parameter in own.items()}
        assert all(torch.equal(p, state[names[id(p)]]) for p in body)
        assert [p.shape[0] for p in head] == [6, 6]
        buffers = dict(expert.body.named_buffers())
        assert all(torch.equal(tensor, state[name]) for name, tensor in buffers.items())
        assert all(map(torch.equal, head, head_parameters(unloaded.module)))


def test_a_frozen_body_has_a_tasks_head_that_learns():
    names = [f"{RESNET}?freeze=body", MOBILENET]
    model = create_model(names, 6, k=2, pretrained=False, input_size=64, task=Maps(6)).eval()
    body, head = split_parameters(model.experts[0])
    assert all(p.requires_grad for p in head)
    assert not any(p.requires_grad for p in body)
    with torch.no_grad():
        assert model(torch.zeros(3, 3, 64, 64, dtype=torch.uint8)).shape == (3, 6, 2, 2)


def test_outputs_of_another_shape_are_refused():
    @dataclass(frozen=True)
    class Finer(Maps):
        def expected_shape(self, size):
            return (self.num_outputs, size // 8, size // 8)

    problem = r"its output for an image is \[6, 2, 2\], and the task needs \[6, 8, 8\]"
    with pytest.raises(HubError, match=problem):
        build_experts([RESNET], 6, pretrained=False, input_size=64, task=Finer(6))
    with pytest.raises(HubError, match=r"does not map images .* to \[n, 6, 2, 2\]"):
        build_experts([timm.create_model("test_resnet", num_classes=6)], 6, input_size=64,
                      task=Maps(6))  # fmt: skip
    with pytest.raises(HubError, match="num_outputs: expected the task's 6, got 5"):
        build_experts([RESNET], 5, pretrained=False, task=Maps(6))


SPLIT = ["test_resnet?size=48&bn=running", "test_efficientnet", "test_byobnet", "test_nfnet",
         "test_vit", "test_convnext", MOBILENET, "torchvision/resnet18",
         "torchvision/shufflenet_v2_x0_5"]  # fmt: skip


@pytest.mark.parametrize("name", SPLIT)
def test_the_head_of_the_features_is_the_network(name):
    [expert] = build_experts([name], 5, pretrained=False, input_size=160)
    assert isinstance(expert.module, Resized) == (expert.size == 48)
    x = torch.randn(2, 3, 160, 160)
    expert.module.eval()
    with torch.no_grad():
        features = expert.features(x)
        assert torch.equal(expert.head(features), expert.module(x))
        expected = expert.body.forward_features(x) if "timm" in expert.name else None
    if name == "torchvision/resnet18":
        assert features.shape == (2, 512)
    if expected is not None and expert.size == 160:
        assert torch.equal(features, expected)


def test_a_network_that_does_not_end_with_its_head_cannot_be_split():
    [expert] = build_experts(["torchvision/squeezenet1_1"], 5, pretrained=False, input_size=64)
    with pytest.raises(
        HubError, match=r"squeezenet1_1.*expected a network that ends with its head"
    ):
        expert.features(torch.zeros(1, 3, 64, 64))
    [expert] = build_experts([nn.Sequential(nn.Flatten(), nn.Linear(192, 5))], 5, input_size=8)
    with pytest.raises(HubError, match="Sequential: expected a network that ends with its head"):
        expert.head(torch.zeros(1, 192))
