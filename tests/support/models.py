"""A small Hub-Pathway, its batches and its training."""

from __future__ import annotations

import torch
from torch import nn

import hubpath_fast as hp

M, C = 4, 6


def conv_expert(channels=8):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Dropout(0.2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, C),
    )  # fmt: skip


def build(executor="auto", device="cpu", seed=0):
    torch.manual_seed(seed)
    generator = hp.PathwayGenerator(M, width=4)
    model = hp.HubPathway([conv_expert() for _ in range(M)], generator, k=2, executor=executor)
    return model.to(device)


def without_dropout(model):
    """The model, which draws no random numbers any more but for its routing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch(n=24, seed=0, device="cpu"):
    random = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 8, 8, generator=random)
    return x.to(device), torch.randint(C, (n,), generator=random).to(device)


def train(model, steps, device="cpu", amp=False):
    """Parameters and buffers after some steps of SGD with momentum, from a fixed random state.

    amp: forward in bfloat16 autocast.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(1)
    for step in range(steps):
        x, y = batch(seed=step, device=device)
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            loss = hp.HubPathwayLoss()(model(x, target=y), y).total
        loss.backward()
        optimizer.step()
    return model.state_dict()


class Faulty(nn.Module):
    """An expert that raises while ``broken``."""

    def __init__(self):
        super().__init__()
        self.body, self.broken = conv_expert(), True

    def forward(self, x):
        out = self.body(x)
        if self.broken:
            raise RuntimeError("out of luck")
        return out
