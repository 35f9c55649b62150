"""What a replay of Atari's screens takes: of a step, of a checkpoint, and of the disk.

    python -m bench.atari_replay [--games NAME,NAME] [--play 2000] [--steps 100000] [--json FILE]

A replay of ``--steps`` packed frames is filled with screens of random play, ``--play`` steps of
each game, over and over (the compressor looks 32 kB back, less than six frames, so that repeats far
apart cost as much as new ones). Then, all on one thread: a step's three calls at a batch of 32, in
interleaved rounds; a checkpoint of nine tenths of the steps, and one of the last; reading them
back, which must give the same bits. Needs the emulator.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hubpath_fast.tasks.atari import FramePatches, PrioritizedReplay, make_env
from hubpath_fast.tasks.atari.replay_files import ReplayFiles

from .timing import interleaved

GAMES = "alien,gopher,jamesbond,seaquest,riverraid"
Step = tuple[np.ndarray, int, float, bool, bool, np.ndarray | None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--games", default=GAMES)
    parser.add_argument("--play", type=int, default=2_000, help="steps of each game")
    parser.add_argument("--steps", type=int, default=100_000, help="of the replay")
    parser.add_argument("--seconds", type=float, default=5.0, help="of the interleaved rounds")
    parser.add_argument("--json", type=Path, help="file for the rows, one object a line")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    games = asked.games.split(",")
    played = [step for game in games for step in random_play(game, asked.play)]
    rows = measure(played, asked.steps, asked.seconds)
    print(f"{asked.steps} steps of {', '.join(games)} by random play, one thread")
    for name, value, unit in rows:
        print(f"{name:<44} {value:9.3f} {unit}")
    if asked.json:
        lines = [json.dumps({"row": name, "value": value, "unit": unit, "steps": asked.steps})
                 for name, value, unit in rows]  # fmt: skip
        asked.json.write_text("\n".join(lines) + "\n")
    return 0


def random_play(game: str, count: int) -> list[Step]:
    """Steps as a learner adds them."""
    env, draw, pack = (
        make_env(game, 0, training=True),
        np.random.default_rng(0),
        FramePatches().pack,
    )
    obs, _ = env.reset()
    steps = []
    for _ in range(count):
        frame, action = pack(obs[-1]), int(draw.integers(env.num_actions))
        obs, reward, over, truncated, info = env.step(action)
        after = pack(obs[-1]) if truncated else None
        clipped = min(max(reward, -1.0), 1.0)
        steps.append((frame, action, clipped, over or info["life_lost"], truncated, after))
        if over or truncated:
            obs, _ = env.reset()
    return steps


def measure(played: list[Step], steps: int, seconds: float) -> list[tuple[str, float, str]]:
    """Rows (what, value, unit)."""
    shape = FramePatches().shape
    replay = PrioritizedReplay(steps, shape)
    for i in range(steps - steps // 10):
        replay.add(*played[i % len(played)])
    with tempfile.TemporaryDirectory() as scratch:
        files, state = ReplayFiles(Path(scratch) / "replay"), Path(scratch) / "state.pt"
        first = timed(lambda: torch.save(files.save(replay), state))
        saved = replay.count
        for i in range(steps // 10):
            replay.add(*played[i % len(played)])
        new = replay.count - saved
        later = timed(lambda: torch.save(files.save(replay), state))
        size = sum(path.stat().st_size for path in files.folder.iterdir())
        found = PrioritizedReplay(steps, shape)
        load = timed(lambda: files.load(found, torch.load(state, weights_only=True)))
        check(replay, found)
        held = state.stat().st_size
    batch = replay.sample(32, 0.5, torch.Generator())
    generator, losses, places = torch.Generator(), torch.rand(32), iter(range(10**9))
    calls: dict[str, Callable[[], Any]] = {
        "add a step": lambda: replay.add(*played[next(places) % len(played)]),
        "sample 32 windows of 20 steps": lambda: replay.sample(32, 0.5, generator),
        "update 32 priorities": lambda: replay.update(batch.indices, losses),
    }
    times = interleaved(calls, seconds=seconds)
    each = [(name, found.p50 * 1e3, "ms") for name, found in times.items()]
    return [
        *each,
        ("the three together", sum(value for _, value, _ in each), "ms"),
        *seconds_of(f"save all {saved} steps", first),
        *seconds_of(f"save {new} steps more", later),
        *seconds_of(f"read {saved + new} steps back", load),
        ("chunks", size / 2**20, "MiB"),
        ("chunks, of a step", size / (saved + new), "bytes"),
        ("priorities and names in the checkpoint", held / 2**20, "MiB"),
        ("frames in memory", (saved + new) * np.prod(shape) / 2**20, "MiB"),
    ]


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and those of them that this process had a CPU."""
    began = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def seconds_of(name: str, found: tuple[float, float]) -> list[tuple[str, float, str]]:
    return [(name, found[0], "s"), (f"{name}, CPU", found[1], "s")]


def check(one: PrioritizedReplay, two: PrioritizedReplay) -> None:
    """Before anything is printed: both draw the same bits."""
    drawn = [vars(made.sample(256, 0.5, torch.Generator().manual_seed(0))) for made in (one, two)]
    if not all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0]):
        raise RuntimeError("what was read back is not what was saved")


if __name__ == "__main__":
    sys.exit(main())
