"""The paper's two hubs at full size, once through everything, on the CPU: a check run by hand.

    python -m tests.support.real_hubs [HUB ...] [--batch-size N]

Real architectures with random weights, 224 pixels: one training step, an evaluation, saving,
loading into a new model, a prediction equal to the trained model's. Prints the peak of the
process's memory; fails above 20 GB. Takes about a minute a hub on one core, too long and too large
for the test suite. A hub runs in a process of its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
from pathlib import Path

import torch

import hubpath_fast as hp
from hubpath_fast.tasks import Classification
from hubpath_fast.training import (
    PathwayObjective,
    Reporting,
    Trainer,
    TrainerConfig,
    evaluate,
    load_weights,
)

from .images import RandomImages

CLASSES, SIDE, LIMIT = 100, 224, 20e9
TASK = Classification(tuple(map(str, range(CLASSES))))


def check(hub: str, batch_size: int) -> None:
    data = RandomImages(batch_size, SIDE, CLASSES)
    model = hp.create_model(hub, CLASSES, k=2, pretrained=False, input_size=SIDE)
    before = [p.detach().clone() for p in model.parameters()]
    config = TrainerConfig(
        steps=1, batch_size=batch_size, optimizer="sgd", lr_expert=0.01, schedule="constant"
    )
    with tempfile.TemporaryDirectory() as folder:
        out, objective = Path(folder) / "run", PathwayObjective(TASK.criterion(0.5))
        quiet = Reporting(tensorboard=False)
        Trainer(model, objective, data, config, out, task=TASK, reporting=quiet).fit()
        moved = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved > 0.9 * len(before), f"only {moved} of {len(before)} parameters moved"
        scores = evaluate(model, [data.batch(1)], TASK)
        assert scores["n"] == batch_size, scores
        fresh = hp.create_model(hub, CLASSES, k=2, pretrained=False, input_size=SIDE)
        load_weights(fresh, out / "last")
    images, _ = data.batch(2)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images[:4]), model.eval()(images[:4]))
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    print(f"{hub}: batch {batch_size}, peak {peak / 1e9:.1f} GB", flush=True)
    assert peak < LIMIT


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("hubs", nargs="*", default=["paper-heterogeneous", "paper-homogeneous"])
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    for name in args.hubs:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(check, (name, args.batch_size))
