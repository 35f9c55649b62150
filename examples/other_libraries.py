"""What other libraries put around a model works around a Hub-Pathway: here timm's learning-rate
schedule and average of the weights, and torch's average beside it.

    python examples/other_libraries.py --steps 200

Both averages are deep copies of the model. Each predicts as the model does, with experts, routing
and executor of its own.
"""

from __future__ import annotations

import argparse

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hubpath_fast as hp
from hubpath_fast.data import DigitsTask, TensorBatches, TensorStream


@torch.no_grad()
def accuracy(model: nn.Module, batches: TensorBatches) -> float:
    model.eval()
    right = sum((model(images).argmax(dim=1) == targets).sum() for images, targets in batches)
    return right.item() / batches.num_samples


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--decay", type=float, default=0.95, help="of the averages, a step")
args = parser.parse_args()
torch.manual_seed(0)
digits = DigitsTask(seed=0, num_validation=100)
names = ["test_resnet", "test_efficientnet", "test_byobnet"]
model = hp.create_model(names, num_outputs=10, k=2, pretrained=False, input_size=32)
criterion = hp.HubPathwayLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
warmup = args.steps // 10
schedule = CosineLRScheduler(optimizer, t_initial=args.steps, warmup_t=warmup, t_in_epochs=False)
timm_average = ModelEmaV3(model, decay=args.decay)
update = get_ema_multi_avg_fn(args.decay)
torch_average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
batches = TensorStream(digits.target, batch_size=48).batches()
for step, (images, targets) in zip(range(1, args.steps + 1), batches, strict=False):
    optimizer.zero_grad()
    criterion(model(images), targets).total.backward()
    optimizer.step()
    schedule.step_update(step)
    timm_average.update(model)
    torch_average.update_parameters(model)
validation = TensorBatches(digits.validation)
for name, scored in (("model", model), ("timm", timm_average.module), ("torch", torch_average)):
    print(f"{name}: validation accuracy {accuracy(scored, validation):.3f}")
