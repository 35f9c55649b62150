"""Small hubs whose routers choose among all their experts, to be exported."""

from __future__ import annotations

import torch
from torch import nn

import hubpath_fast as hp

M, C, SIZE = 3, 4, 32
MEAN = torch.tensor([[0.5, 0.4, 0.3], [0.45, 0.45, 0.45], [0.2, 0.3, 0.6]])
STD = torch.tensor([[0.2, 0.3, 0.25], [0.5, 0.5, 0.5], [0.3, 0.2, 0.4]])


def small_expert(channels: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, stride=2, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, C),
    )  # fmt: skip


def draw_images(n):
    random = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (n, 3, SIZE, SIZE), generator=random).to(torch.uint8)


class ByColour(nn.Module):
    """A router whose scores are differences of an image's mean colours: some images want any."""

    def __init__(self, num_experts: int = M):
        super().__init__()
        self.clean = nn.Linear(3, num_experts)
        with torch.no_grad():
            self.clean.weight.copy_(8 * torch.eye(num_experts, 3))
            self.clean.bias.copy_(torch.linspace(0, 0.3, num_experts))

    def forward(self, x):
        clean = self.clean(x.mean(dim=(2, 3)))
        return clean, torch.zeros_like(clean)


def small_hub(k: int = 2, experts=None, generator=None, **options) -> hp.HubPathway:
    """In training mode, on images of SIZE pixels; weights drawn from seed 0."""
    torch.manual_seed(0)
    experts = [small_expert(4 + i) for i in range(M)] if experts is None else experts
    generator = ByColour(len(experts)) if generator is None else generator
    options = {"normalization": (MEAN[: len(experts)], STD[: len(experts)]), **options}
    return hp.HubPathway(experts, generator, k=k, executor="sequential", **options)
