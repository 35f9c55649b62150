"""Heads of heat maps: their layers, and hubs of networks that have them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import timm
import torch
from torch import nn

from hubpath_fast.hub import HubError, build_experts, head_parameters, split_parameters
from hubpath_fast.hub.dense import DenseNetwork
from hubpath_fast.tasks.landmarks import HeatmapHead, attach_heatmap_head

L, SIZE = 5, 64


@dataclass(frozen=True)
class Maps:
    """A map of a quarter of the image's side for each of five outputs."""

    num_outputs: int = L
    width: int = 8

    def expected_shape(self, size):
        return (self.num_outputs, size // 4, size // 4)

    def attach_head(self, network):
        return attach_heatmap_head(network, self.num_outputs, self.width)


TASK = Maps()


def experts(names, size=SIZE, **options):
    torch.manual_seed(0)
    return build_experts(names, L, False, size, task=TASK, **options)


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
    assert head_parameters(expert.module)
