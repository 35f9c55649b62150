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
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from hubpath_fast.tasks.atari import PrioritizedReplay
from hubpath_fast.tasks.atari.agent import REPLAY
from hubpath_fast.tasks.atari.replay_files import ReplayFiles
from hubpath_fast.training.checkpoint import load_state
from tests.support.random_kills import Run, stop_and_compare

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


def run_of(game: str) -> Run:
    return Run(
        lambda out, resume: command(game, out, resume), contents, (1, STEPS // LOG_EVERY),
        (".last.*", f"{REPLAY}/.*"),
    )  # fmt: skip


def main(kills: int, seed: int, game: str, number: signal.Signals) -> int:
    """The number of runs that differ."""
    with tempfile.TemporaryDirectory() as scratch:
        return stop_and_compare(run_of(game), Path(scratch), kills, seed, number)


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
