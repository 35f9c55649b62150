"""A training loop of your own: a Hub-Pathway is a module, and its losses are one call.

    python examples/own_loop.py --steps 200

Three tiny networks learn 200 handwritten digits in five renderings. They start from random weights,
so that nothing is downloaded; with ``pretrained=True`` they start from those of their names.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import hubpath_fast as hp
from hubpath_fast.data import DigitsTask, TensorBatches, TensorStream


@torch.no_grad()
def accuracy(model: nn.Module, batches: TensorBatches) -> float:
    model.eval()  # no noise, and the prediction alone: a drop-in for any classifier
    right = sum((model(images).argmax(dim=1) == targets).sum() for images, targets in batches)
    model.train()
    return right.item() / batches.num_samples


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--steps", type=int, default=200)
steps = parser.parse_args().steps
torch.manual_seed(0)
digits = DigitsTask(seed=0, num_validation=100)
names = ["test_resnet", "test_efficientnet", "test_byobnet"]
model = hp.create_model(names, num_outputs=10, k=2, pretrained=False, input_size=32)
criterion = hp.HubPathwayLoss()  # task + 0.5 * explore + exploit
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
batches = TensorStream(digits.target, batch_size=48).batches()
for step, (images, targets) in zip(range(1, steps + 1), batches, strict=False):
    losses = criterion(model(images), targets)  # images uint8 [48, 3, 32, 32], targets int64 [48]
    optimizer.zero_grad()
    losses.total.backward()
    optimizer.step()
    if step % 20 == 0 or step == steps:
        parts = f"explore {losses.explore:.3f}, exploit {losses.exploit:.3f}"
        print(f"step {step}: task {losses.task:.3f}, {parts}")
print(f"validation accuracy {accuracy(model, TensorBatches(digits.validation)):.3f}")
