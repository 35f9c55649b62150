"""A tiny run that one process or several ranks train, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

import hubpath_fast as hp
from hubpath_fast.data.tensors import TensorBatches, TensorSet, TensorStream
from hubpath_fast.parallel import Ranks
from hubpath_fast.tasks import Classification
from hubpath_fast.training import PathwayObjective, Reporting, Trainer, TrainerConfig

CLASSES, SIDE = 4, 6
TASK = Classification(("a", "b", "c", "d"))
QUIET = Reporting(tensorboard=False, progress=False)


class Hub(NamedTuple):
    """bias: of the scores, so large that it decides; None: the router decides. batch_norm: of
    experts. router_norm: whether the router has BatchNorm. owners: see ``distribute``."""

    num_experts: int = 4
    k: int = 2
    bias: tuple[float, ...] | None = None
    batch_norm: bool = True
    router_norm: bool = False
    owners: tuple[int, ...] | None = None


DEFAULT = Hub()


class Router(nn.Module):
    def __init__(self, num_experts, bias, norm):
        super().__init__()
        layers = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh()
        self.first = nn.Sequential(*(layers if norm else ()))
        self.heads = nn.Linear(3 * SIDE * SIDE, 2 * num_experts)
        self.register_buffer("bias", torch.tensor(bias or [0.0] * num_experts))

    def forward(self, x):
        clean, noise = self.heads(self.first(x).flatten(1)).chunk(2, dim=1)
        return clean + 20 * self.bias, noise


def expert(batch_norm):
    norm = nn.BatchNorm2d(5) if batch_norm else nn.GroupNorm(1, 5)
    # BatchNorm takes a bias away again: its gradient would be rounding, of which AdamW makes steps.
    first = nn.Conv2d(3, 5, 3, bias=not batch_norm)
    return nn.Sequential(first, norm, nn.ReLU(), nn.Flatten(), nn.Linear(80, CLASSES))


def build(hub=DEFAULT, ranks=Ranks()):
    torch.manual_seed(3)
    experts = [expert(hub.batch_norm) for _ in range(hub.num_experts)]
    mean = torch.rand(hub.num_experts, 3)
    router = Router(hub.num_experts, hub.bias, hub.router_norm)
    model = hp.HubPathway(experts, router, k=hub.k, normalization=(mean, mean + 0.5)).double()
    return model.distribute(ranks, hub.owners)


def samples(count=50, seed=5):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=draw)
    return TensorSet(images, torch.randint(0, CLASSES, (count,), generator=draw))


def make(model, out, ranks=Ranks(), **settings):
    """A trainer; settings of ``TrainerConfig`` and of ``Trainer`` may be mixed."""
    own = {"objective", "validation", "run", "resume", "reporting"}
    options = {key: settings.pop(key) for key in own & set(settings)}
    config = TrainerConfig(
        **{"steps": 10, "batch_size": 20, "log_every": 1, "save_every": 0, **settings}
    )
    share = ranks.share(config.accumulate)
    stream = TensorStream(samples(), config.batch_size, seed=1, augment=False, share=share)
    validation = TensorBatches(samples(23, seed=6), 10, share=ranks.share())
    objective = options.pop("objective", PathwayObjective(TASK.criterion(0.5)))
    return Trainer(
        model,
        objective,
        stream,
        config,
        out,
        **{"task": TASK, "reporting": QUIET, "validation": validation, "ranks": ranks, **options},
    )


def state_of(model):
    """Parameters and buffers that are here."""
    return {name: t.clone() for name, t in model.state_dict().items() if not t.is_meta}


def history_of(result):
    """The lines of the log without their times."""
    return [{k: v for k, v in line.items() if k != "time"} for line in result.history]
