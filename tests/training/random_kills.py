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
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils._pytree import keystr, tree_flatten_with_path

from hubpath_fast.training import load_state

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


def finish(data: Path, out: Path, workers: int = 0, resume: bool = False) -> None:
    """Runs it to its end."""
    done = subprocess.run(
        command(data, out, workers, resume), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"ended with status {done.returncode}: {done.stderr}")


def contents(out: Path) -> dict[str, object]:
    """All that two equal runs have in common, by name."""
    state, best = load_state(out / "last"), load_state(out / "best")
    for held in (state, best):
        held["run"].pop("seconds")
    state.pop("interval")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    result = json.loads((out / "result.json").read_text())
    return {
        **{f"{name}/model": (out / name / "model.safetensors").read_bytes() for name in
           ("last", "best")},
        "last": state,
        "best": best,
        "log": [{key: value for key, value in line.items() if key != "time"} for line in log],
        "result": {key: value for key, value in result.items() if key not in TIMES},
        "files": sorted(p.name for p in out.iterdir() if not p.name.startswith("tensorboard")),
    }  # fmt: skip


def differences(one: Path, two: Path) -> list[str]:
    """Names of what is not equal to the bit."""
    leaves, others = (tree_flatten_with_path(contents(out))[0] for out in (one, two))
    if [path for path, _ in leaves] != [path for path, _ in others]:
        return ["what there is"]
    return [
        keystr(path)
        for (path, a), (_, b) in zip(leaves, others, strict=True)
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)
    ]


def kill(data: Path, out: Path, workers: int, lines: int, share: float) -> str:
    """Starts a run and kills it when its log has ``lines`` lines and ``share`` of the time of a
    further one has passed. Where that was, in words; empty if the run had ended."""
    log, times = out / "log.jsonl", []
    process = subprocess.Popen(
        command(data, out, workers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(times) < lines:
        count = log.read_bytes().count(b"\n") if log.exists() else 0
        times += [time.monotonic()] * (count - len(times))
        time.sleep(0.002)
    time.sleep(share * (times[-1] - times[0]) / max(1, lines - 1))
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return ""
    left = [name for name in (".last.new", ".last.old", ".best.new", ".best.old")
            if (out / name).exists()]  # fmt: skip
    count = log.read_bytes().count(b"\n")
    where = f"in a save ({', '.join(left)} left)" if left else "between saves"
    return f"after {count} lines of the log, {where}"


def main(kills: int, seed: int, workers: int) -> int:
    """The number of runs that differ."""
    moments, wrong, hits, number = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        draw_images(root / "data")
        finish(root / "data", root / "whole", workers)
        print(f"uninterrupted: {STEPS} steps, each saved", flush=True)
        while number < kills:
            out = root / f"run-{moments.random()}"
            lines, share = moments.randint(2, STEPS - 1), moments.random()
            place = kill(root / "data", out, workers, lines, share)
            if not place:
                continue
            number, hits = number + 1, hits + ("in a save" in place)
            finish(root / "data", out, workers, resume=True)  # at once
            found = differences(root / "whole", out)
            wrong += bool(found)
            text = f"DIFFERENT: {', '.join(found[:5])}" if found else "equal"
            print(f"kill {number}: {place}; resumed: {text}", flush=True)
    print(f"{kills} kills, {hits} of them in a save; {wrong} runs differ from the whole one")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order, whatever else the machine does
    sys.exit(main(given.kills, given.seed, given.workers) > 0)
