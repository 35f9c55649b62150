"""A hub of 64 experts whose bytes count, its training, and the memory that a process takes for it.

As a program it opens such a hub with a room and does everything, and writes down what came out and
the most memory that each part took: ``python -m tests.support.large_hub FOLDER OUT``.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

import hubpath_fast as hp
from hubpath_fast.resting import release
from hubpath_fast.tasks import Classification
from hubpath_fast.training import PathwayObjective, Trainer, TrainerConfig

M, K, C, SIDE, WIDTH = 64, 2, 5, 8, 2600
STEPS, SAVE_EVERY, KILLED_AT = 4, 2, 3
ROOM = 4
FEW, MANY = 2, 8  # samples of a batch: with two, no more than four experts are asked


class Killed(Exception):
    pass


def expert(width: int = WIDTH) -> nn.Module:
    """2 MB."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * SIDE**2, width), nn.ReLU(), nn.Linear(width, C)
    )


def expert_bytes() -> int:
    with torch.device("meta"):
        return sum(p.nbytes for p in expert().parameters())


def save_hub(folder: Path, width: int = WIDTH) -> Path:
    torch.manual_seed(0)
    experts = [expert(width) for _ in range(M)]
    hp.HubPathway(experts, hp.PathwayGenerator(M, width=4), k=K).save_pretrained(folder)
    return folder


def open_hub(folder: Path, room: int | None) -> hp.HubPathway:
    with torch.device("meta"):
        modules = {index: expert(width_of(folder)) for index in range(M)}
    modules["generator"] = hp.PathwayGenerator(M, width=4)
    model = hp.from_pretrained(folder, modules=modules, room=room)
    if room is None:
        model.executor = "sequential"
    return model


def width_of(folder: Path) -> int:
    with safe_open(sorted((folder / "experts").iterdir())[0], "pt") as file:
        return file.get_slice("experts.0.1.bias").get_shape()[0]


class Stream:
    """Batches by step. killed: the step at which the run ends as if it was killed."""

    def __init__(self, samples: int, killed: int | None = None):
        self.samples, self.killed = samples, killed

    def batches(self, start: int):
        for step in range(start, STEPS):
            if step == self.killed:
                raise Killed
            yield batch(self.samples, step)


def batch(samples: int, step: int):
    random = torch.Generator().manual_seed(step)
    x = torch.rand(samples, 3, SIDE, SIDE, generator=random)
    return x, torch.randint(C, (samples,), generator=random)


def predict(model: hp.HubPathway) -> str:
    model.eval()
    with torch.no_grad():
        return digest({str(step): model(batch(MANY, step)[0]) for step in range(12)})


def freeze_bodies(model: hp.HubPathway) -> hp.HubPathway:
    for each in model.experts:
        each[1].requires_grad_(False)
    return model


def train(model, out: Path, samples: int, optimizer="sgd", killed=None, resume=False) -> str:
    config = TrainerConfig(
        steps=STEPS, batch_size=samples, optimizer=optimizer, save_every=SAVE_EVERY, log_every=1
    )
    trainer = Trainer(
        model,
        PathwayObjective(hp.HubPathwayLoss()),
        Stream(samples, killed),
        config,
        out,
        task=Classification([str(i) for i in range(C)]),
        resume=resume,
    )
    try:
        trainer.fit()
    except Killed:
        return ""
    state = {f"state {i} {key}": v for i, entry in trainer.optimizer.state_dict()["state"].items()
             for key, v in entry.items() if isinstance(v, torch.Tensor)}  # fmt: skip
    return digest({**model.state_dict(), **state})


def digest(tensors) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
        release([tensors[name]])
    return found.hexdigest()


def everything(folder: Path, out: Path, room: int | None, measure) -> dict[str, object]:
    """What comes out of predictions and of training, by name."""
    found = {}
    with measure("predictions"):
        found["predictions"] = predict(open_hub(folder, room))
    with measure("frozen"):
        found["frozen"] = train(freeze_bodies(open_hub(folder, room)), out / "frozen", MANY)
    for optimizer in ("sgd", "adamw"):
        with measure(optimizer):
            found[optimizer] = train(open_hub(folder, room), out / optimizer, FEW, optimizer)
    if room is None:  # never killed, it is the run above
        return found | {"killed and resumed": found["sgd"]}
    with measure("killed and resumed"):
        train(open_hub(folder, room), out / "killed", FEW, killed=KILLED_AT)
        gc.collect()
        again = open_hub(folder, room)
        found["killed and resumed"] = train(again, out / "killed", FEW, resume=True)
    return found


class Peak:
    """Around what is measured: the most bytes of memory in it, all kinds, above those before."""

    def __init__(self):
        self.found: dict[str, int] = {}

    def __call__(self, name: str) -> Peak:
        self.name = name
        return self

    def __enter__(self):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS")

    def __exit__(self, *_):
        self.found[self.name] = _status("VmHWM") - self.before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    torch.set_num_threads(1)
    hub, results = Path(sys.argv[1]), Path(sys.argv[2])
    results.mkdir()
    small = save_hub(results / "small", 8)
    everything(small, results / "warm-up", ROOM, Peak())  # what a process loads once
    peak = Peak()
    outcome = everything(hub, results / "runs", ROOM, peak)
    report = {"digests": outcome, "peaks": peak.found}
    (results / "found.json").write_text(json.dumps(report))
