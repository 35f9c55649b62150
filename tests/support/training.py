"""Tiny models and streams that the training tests share."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from hubpath_fast.reference import ReferenceHubPathway, losses
from hubpath_fast.tasks import Classification
from hubpath_fast.training import (
    Losses,
    Reporting,
    SingleObjective,
    Trainer,
    TrainerConfig,
    load_state,
    read_log,
)

FEATURES, CLASSES = 6, 3
TASK = Classification(("a", "b", "c"))
QUIET = Reporting(tensorboard=False, progress=False)


class Stream:
    """Batches that depend on the seed and the step alone; the class is the largest feature's."""

    def __init__(self, size=8, seed=0):
        self.size, self.seed = size, seed

    def batch(self, step):
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        x = torch.randn(self.size, FEATURES, generator=generator)
        return x, x[:, :CLASSES].argmax(1)

    def batches(self, start_step):
        torch.rand(1)  # as a DataLoader draws from the global generator when it starts
        step = start_step
        while True:
            yield self.batch(step)
            step += 1


class Generator(nn.Module):
    def __init__(self, num_experts):
        super().__init__()
        self.heads = nn.Linear(FEATURES, 2 * num_experts)

    def forward(self, x):
        return self.heads(x).chunk(2, dim=1)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.head(self.drop(self.body(x)))


def single(seed=0):
    torch.manual_seed(seed)
    return Expert()


def pathway(seed=0, num_experts=3):
    """BatchNorm, dropout and routing noise: all that a resumed run could get wrong."""
    torch.manual_seed(seed)
    experts = [Expert() for _ in range(num_experts)]
    aggregator = nn.Linear(num_experts * CLASSES, CLASSES)
    return ReferenceHubPathway(experts, Generator(num_experts), aggregator, k=2)


def pathway_objective(model, x, y):
    output = model(x)
    total, *parts = losses(output, y, explore=0.5)
    named = dict(zip(("task", "explore", "exploit"), parts, strict=True))
    return Losses(total, named, output.routing, output.expert_outputs)


def noisy_objective(model, x, y):
    """Draws from every generator whose state a checkpoint must hold."""
    x = x + 0.1 * random.random() + 0.1 * np.random.rand() + 0.1 * torch.randn_like(x)
    return pathway_objective(model, x, y)


VALIDATION = [Stream(seed=99).batch(step) for step in range(4)]


def make(model, out_dir, stream=None, objective=None, **settings):
    """A trainer of ``model``; settings of TrainerConfig and of Trainer may be mixed."""
    own = {"validation", "task", "run", "resume", "reporting", "groups"}
    options = {key: settings.pop(key) for key in own & set(settings)}
    config = TrainerConfig(**{"steps": 12, "batch_size": 8, "lr_expert": 0.01, **settings})
    if objective is None:
        objective = pathway_objective if hasattr(model, "experts") else SingleObjective(TASK.loss)
    return Trainer(
        model,
        objective,
        stream or Stream(),
        config,
        out_dir,
        **{"task": TASK, "reporting": QUIET, **options},
    )


def records(result):
    """A history without its timings, the one thing that differs between equal runs."""
    return [{k: v for k, v in record.items() if k != "time"} for record in result.history]


def before_step(trainer, step, act):
    """Has ``act(model)`` done just before update ``step`` (from 1)."""
    objective = trainer.objective

    def acting(model, x, y):
        if trainer.state.step + 1 == step:
            with torch.no_grad():
                act(model)
        return objective(model, x, y)

    trainer.objective = acting
    return trainer


def crash(model):
    raise RuntimeError("power cut")


def assert_same_run(one, two):
    """Weights, log, and all that a checkpoint holds."""
    found, expected = (
        {
            "model": trainer.model.state_dict(),
            "log": [r | {"time": None} for r in read_log(trainer.out_dir / "log.jsonl")],
            **load_state(trainer.out_dir / "last"),
        }
        for trainer in (one, two)
    )
    for state in (found, expected):
        state["run"].pop("seconds")
        state.pop("interval")
    leaves, others = (tree_flatten_with_path(state)[0] for state in (found, expected))
    for (path, a), (other_path, b) in zip(leaves, others, strict=True):
        assert path == other_path
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, keystr(path)
