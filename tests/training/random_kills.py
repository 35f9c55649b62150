"""Runs of ``hubpath fit`` that are killed at random moments and resumed, against one that is not.

    python -m tests.training.random_kills --kills 10

Each kill is a SIGKILL, which no process can catch: a run is started, killed after a random time
while it trains or saves, and resumed to its end. Its weights, its optimizer's and generators'
states, its log and its result must equal those of the uninterrupted run to the bit. Every step is
saved, so that about half of the kills hit a save. Ends with status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from hubpath_fast.training import load_state
from tests.support.checkpoint_files import all_weights
from tests.support.random_kills import Run, stop_and_compare

COMMAND = [sys.executable, str(Path(__file__).parents[2] / "hubpath_command.py")]
STEPS = 16
TIMES = {"seconds", "images_per_second"}  # what may differ between equal runs


def draw_images(root: Path) -> None:
    """48 images of two classes."""
    for name in ("red", "green"):
        (root / name).mkdir(parents=True)
        for i in range(24):
            pixels = np.random.RandomState(i).randint(0, 255, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


def command(data: Path, out: Path, workers: int = 0, resume: bool = False) -> list[str]:
    return [
        *COMMAND, "fit", "--data", str(data), "--hub", "test_resnet,test_vit",
        "--no-pretrained", "--steps", str(STEPS), "--batch-size", "6", "--image-size", "32",
        "--workers", str(workers), "--save-every", "1", "--eval-every", "4",
        "--set", "trainer.log_every=1", "--out", str(out), *(["--resume"] if resume else []),
    ]  # fmt: skip


def contents(out: Path) -> dict[str, object]:
    """All that two equal runs have in common, by name."""
    state, best = load_state(out / "last"), load_state(out / "best")
    for held in (state, best):
        held["run"].pop("seconds")
    state.pop("interval")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    result = json.loads((out / "result.json").read_text())
    return {
        **{f"{name}/weights": all_weights(out / name) for name in ("last", "best")},
        "last": state,
        "best": best,
        "log": [{key: value for key, value in line.items() if key != "time"} for line in log],
        "result": {key: value for key, value in result.items() if key not in TIMES},
        "files": sorted(p.name for p in out.iterdir() if not p.name.startswith("tensorboard")),
    }  # fmt: skip


def main(kills: int, seed: int, workers: int) -> int:
    """The number of runs that differ."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        data = root / "data"
        draw_images(data)
        run = Run(
            lambda out, resume: command(data, out, workers, resume), contents, (2, STEPS - 1),
            (".last.*", ".best.*"),
        )  # fmt: skip
        return stop_and_compare(run, root, kills, seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order, whatever else the machine does
    sys.exit(main(given.kills, given.seed, given.workers) > 0)
