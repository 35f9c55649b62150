"""The paper's two hubs at full size, once through everything, on the CPU: a check run by hand.

    python tests/hub/real_hubs.py [HUB ...] [--batch-size N]

Real architectures with random weights, 224 pixels: one training step, an evaluation, saving,
loading into a new model, a prediction equal to the trained model's. Prints seconds and the peak of
the process's memory; fails above 20 GB. Takes about a minute a hub on one core, too long and too
large for the test suite. A hub runs in a process of its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
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

CLASSES, SIDE, LIMIT = 100, 224, 20e9
TASK = Classification(tuple(map(str, range(CLASSES))))


class Noise:
    """Random images: the batch of a step is a function of the step alone."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size

    def batch(self, step: int):
        generator = torch.Generator().manual_seed(step)
        shape = (self.batch_size, 3, SIDE, SIDE)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return images, torch.randint(CLASSES, (self.batch_size,), generator=generator)

    def batches(self, start_step: int):
        step = start_step
        while True:
            yield self.batch(step)
            step += 1


def main(hub: str, batch_size: int) -> None:
    began = time.perf_counter()
    data = Noise(batch_size)
    model = hp.create_model(hub, CLASSES, k=2, pretrained=False, input_size=SIDE)
    before = [p.detach().clone() for p in model.parameters()]
    config = TrainerConfig(
        steps=1, batch_size=batch_size, optimizer="sgd", lr_expert=0.01, schedule="constant"
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        trainer = Trainer(
            model,
            PathwayObjective(TASK.criterion(0.5)),
            data,
            config,
            out,
            task=TASK,
            reporting=Reporting(tensorboard=False),
        )
        trainer.fit()
        moved = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved > 0.9 * len(before), f"only {moved} of {len(before)} parameters moved"
        scores = evaluate(model, [data.batch(1)], TASK)
        assert scores["n"] == batch_size, scores
        fresh = hp.create_model(hub, CLASSES, k=2, pretrained=False, input_size=SIDE)
        load_weights(fresh, out / "last")
    images, _ = data.batch(2)
    with torch.no_grad():
        torch.testing.assert_close(
            fresh.eval()(images[:4]), model.eval()(images[:4]), rtol=0, atol=0
        )
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    seconds = time.perf_counter() - began
    print(f"{hub}: batch {batch_size}, {seconds:.0f} s, peak {peak / 1e9:.1f} GB", flush=True)
    assert peak < LIMIT


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("hubs", nargs="*", default=["paper-heterogeneous", "paper-homogeneous"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if len(args.hubs) == 1:
        torch.set_num_threads(args.threads)
        main(args.hubs[0], args.batch_size)
    else:
        for name in args.hubs:
            command = [sys.executable, os.path.abspath(__file__), name]
            subprocess.run([*command, "--batch-size", str(args.batch_size)], check=True)
