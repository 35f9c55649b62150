"""A small task of maps: tiny networks with heat-map heads at 64 pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hubpath_fast.hub import build_experts
from hubpath_fast.tasks.landmarks import attach_heatmap_head

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


def alive(experts):
    """Statistics that are no batch's, and heads whose maps are not nearly 0."""
    for expert in experts:
        nn.init.normal_(expert.body.head.final.weight)
        for layer in expert.module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 1.5)
        for layer in expert.body.head.modules():
            if isinstance(layer, nn.ConvTranspose2d):
                nn.init.normal_(layer.weight, std=0.1)
    return experts


def images(n=12, dtype=torch.float64):
    torch.manual_seed(3)
    return torch.rand(n, 3, SIZE, SIZE, dtype=dtype), torch.rand(n, L, 16, 16, dtype=dtype)


def loss(outputs, targets):
    """[n]: the mean of squares of each sample's maps."""
    return (outputs - targets).square().flatten(1).mean(1)
