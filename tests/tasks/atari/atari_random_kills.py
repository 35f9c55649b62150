"""Runs of ``hubpath atari pretrain`` that are killed at random moments and resumed, against one
that is not.

    python -m tests.tasks.atari.atari_random_kills --kills 10 [--game alien] [--stop TERM]

Each kill is a SIGKILL, which no process can catch: a run is started, killed after a random time
while it plays, learns, evaluates or saves, and resumed to its end. Its weights, Adam's state, the
emulator, the replay with its priorities, all generators, its log and its result must equal those of
the uninterrupted run to the bit. It is saved every few steps, so that many kills hit a save. With
``--stop TERM`` the run may save before it ends. Ends with status 1 if anything differs.
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
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from hubpath_fast.tasks.atari import PrioritizedReplay
from hubpath_fast.tasks.atari.agent import REPLAY
from hubpath_fast.tasks.atari.replay_files import ReplayFiles
from hubpath_fast.training.checkpoint import load_state

COMMAND = [sys.executable, str(Path(__file__).parents[3] / "hubpath_command.py")]
STEPS, LOG_EVERY = 240, 10
SETTINGS = {
    "learn_start": 60, "batch_size": 8, "hidden": 16, "n_step": 5, "target_every": 30,
    "log_every": LOG_EVERY, "eval_every": 80, "eval_episodes": 1,
}  # fmt: skip
TIMES = {"seconds", "steps_per_second"}  # what may differ between equal runs


def command(game: str, out: Path, resume: bool = False) -> list[str]:
    changes = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    return [
        *COMMAND, "atari", "pretrain", game, "--steps", str(STEPS), "--save-every", "7",
        "--final-episodes", "1", *changes, "--out", str(out), *(["--resume"] if resume else []),
    ]  # fmt: skip


def finish(game: str, out: Path, resume: bool = False) -> None:
    """Runs it to its end."""
    done = subprocess.run(command(game, out, resume), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ended with status {done.returncode}: {done.stderr}")


def contents(out: Path) -> dict[str, Any]:
    """All that two equal runs have in common, by name."""
    state = load_state(out / "last")
    state["progress"].pop("seconds")
    manifest = state.pop("replay")
    replay = PrioritizedReplay(**manifest["state"]["settings"])
    ReplayFiles(out / REPLAY).load(replay, manifest)
    named = sorted(chunk["name"] for chunk in manifest["chunks"])
    result = json.loads((out / "result.json").read_text())
    return {
        "model": (out / "last" / "model.safetensors").read_bytes(),
        "state": state,
        "replay": replay.state_dict(),
        "probabilities": replay.probabilities(),
        "nothing else in replay/": sorted(os.listdir(out / REPLAY)) == named,
        "log": (out / "log.jsonl").read_text(),
        "result": {key: value for key, value in result.items() if key not in TIMES},
        "files": sorted(path.name for path in out.iterdir()),
    }


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


def stop(
    game: str, out: Path, number: signal.Signals, lines: int, share: float, resume: bool = False
) -> str:
    """Starts a run and sends it a signal when its log has ``lines`` lines more than at first and
    ``share`` of the time of a further one has passed. Where that was, in words; empty if the run
    had ended."""
    log, times = out / "log.jsonl", []
    first = log.read_bytes().count(b"\n") if log.exists() else 0
    process = subprocess.Popen(
        command(game, out, resume), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(times) < lines:
        count = log.read_bytes().count(b"\n") - first if log.exists() else 0
        times += [time.monotonic()] * (count - len(times))
        time.sleep(0.002)
    if len(times) > 1:
        time.sleep(share * (times[-1] - times[0]) / (lines - 1))
    process.send_signal(number)
    status = process.wait()
    if status not in (-number, 130):
        return ""
    left = [name for name in (".last.new", ".last.old") if (out / name).exists()]
    left += [path.name for path in (out / REPLAY).glob(".*")]
    where = f"in a save ({', '.join(left)} left)" if left else "between saves"
    return f"after {log.read_bytes().count(bytes([10]))} lines of the log, {where}"


def main(kills: int, seed: int, game: str, number: signal.Signals) -> int:
    """The number of runs that differ."""
    moments, wrong, hits, done = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        finish(game, root / "whole")
        print(f"uninterrupted: {STEPS} steps of {game}, each seventh saved", flush=True)
        while done < kills:
            out = root / f"run-{done}-{moments.random()}"
            lines, share = moments.randint(1, STEPS // LOG_EVERY), moments.random()
            place = stop(game, out, number, lines, share)
            if not place:
                continue
            done, hits = done + 1, hits + ("in a save" in place)
            finish(game, out, resume=True)  # at once
            found = differences(root / "whole", out)
            wrong += bool(found)
            text = f"DIFFERENT: {', '.join(found[:5])}" if found else "equal"
            print(f"{number.name} {done}: {place}; resumed: {text}", flush=True)
    print(f"{kills} stops, {hits} of them in a save; {wrong} runs differ from the whole one")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--game", default="catch")
    parser.add_argument("--stop", choices=("KILL", "TERM", "INT"), default="KILL")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order, whatever else the machine does
    number = signal.Signals[f"SIG{given.stop}"]
    sys.exit(main(given.kills, given.seed, given.game, number) > 0)
