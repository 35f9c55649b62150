"""Modules of your own as experts and generator: the interface is two signatures and a loss.

    python examples/own_experts.py --steps 300

Nothing is an image here: a sample is 16 numbers, the signs of its first two say which of four
linear maps made its target, and each expert is a small network that predicts 3 numbers.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import hubpath_fast as hp

FEATURES, OUTPUTS, EXPERTS = 16, 3, 4


class Scores(nn.Module):
    """A generator: x [N, 16] -> (clean [N, 4], noise [N, 4]), a score and a noise scale each."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 2 * EXPERTS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x).chunk(2, dim=1)


def expert() -> nn.Module:
    """x [n, 16] -> [n, 3]; all experts of a hub give outputs of one shape."""
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, OUTPUTS))


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """[N]: a loss for each sample, for the prediction and for each expert's own rows."""
    return (prediction - target).square().mean(dim=1)


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--steps", type=int, default=300)
steps = parser.parse_args().steps
torch.manual_seed(0)
maps = torch.randn(EXPERTS, FEATURES, OUTPUTS) / FEATURES**0.5
model = hp.HubPathway([expert() for _ in range(EXPERTS)], Scores(), k=2, num_outputs=OUTPUTS)
criterion = hp.HubPathwayLoss(squared_error, explore=0.1)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for step in range(1, steps + 1):
    x = torch.randn(256, FEATURES)
    kind = 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0)  # the map that makes a sample's target
    out = model(x)
    losses = criterion(out, torch.einsum("nf,nfo->no", x, maps[kind]))
    optimizer.zero_grad()
    losses.total.backward()
    optimizer.step()
    if step % 100 == 0 or step == steps:
        print(f"step {step}: error {losses.task:.3f}, rows per expert {out.routing.counts()}")
