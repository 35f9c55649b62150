"""Runs that are killed at random moments and resumed, against one that is not.

What a run is, its module says: ``tests/training/random_kills.py`` and
``tests/tasks/atari/atari_random_kills.py``.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path


@dataclass(frozen=True)
class Run:
    """command: its words, for a folder, and whether it is resumed. contents: of a folder all that
    two equal runs have in common, by name. lines: of its log, the fewest and the most after which
    it is killed. unfinished: patterns of what a save has not brought to its end."""

    command: Callable[[Path, bool], list[str]]
    contents: Callable[[Path], Mapping[str, Any]]
    lines: tuple[int, int]
    unfinished: Sequence[str]

    def finish(self, out: Path, resume: bool = False) -> None:
        """Runs it to its end."""
        words = self.command(out, resume)
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"ended with status {done.returncode}: {done.stderr}")

    def stop(self, out: Path, number: signal.Signals, lines: int, share: float) -> str:
        """Starts it and sends it a signal when its log has ``lines`` lines and ``share`` of the
        time of a further one has passed. Where that was, in words; empty if it had ended."""
        log, times = out / "log.jsonl", []
        process = subprocess.Popen(
            self.command(out, False), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(times) < lines:
            count = log.read_bytes().count(b"\n") if log.exists() else 0
            times += [time.monotonic()] * (count - len(times))
            time.sleep(0.002)
        if len(times) > 1:
            time.sleep(share * (times[-1] - times[0]) / (lines - 1))
        process.send_signal(number)
        if process.wait() not in (-number, 130):
            return ""
        left = [path.name for pattern in self.unfinished for path in sorted(out.glob(pattern))]
        count = log.read_bytes().count(b"\n")
        where = f"in a save ({', '.join(left)} left)" if left else "between saves"
        return f"after {count} lines of the log, {where}"

    def differences(self, one: Path, two: Path) -> list[str]:
        """Names of what is not equal to the bit."""
        leaves, others = (tree_flatten_with_path(self.contents(out))[0] for out in (one, two))
        if [path for path, _ in leaves] != [path for path, _ in others]:
            return ["what there is"]
        return [
            keystr(path)
            for (path, a), (_, b) in zip(leaves, others, strict=True)
            if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)
        ]


def stop_and_compare(
    run: Run, root: Path, kills: int, seed: int, number: signal.Signals = signal.SIGKILL
) -> int:
    """Runs it whole, and then as often stopped and resumed, below ``root``, and prints what came
    of each. seed: of the moments. Returns how many differ."""
    moments, wrong, hits, done, tries = random.Random(seed), 0, 0, 0, 0
    run.finish(root / "whole")
    print("uninterrupted: finished", flush=True)
    while done < kills:
        tries += 1
        out = root / f"run-{tries}"
        place = run.stop(out, number, moments.randint(*run.lines), moments.random())
        if not place:
            continue
        done, hits = done + 1, hits + ("in a save" in place)
        run.finish(out, resume=True)  # at once
        found = run.differences(root / "whole", out)
        wrong += bool(found)
        text = f"DIFFERENT: {', '.join(found[:5])}" if found else "equal"
        print(f"{number.name} {done}: {place}; resumed: {text}", flush=True)
    print(f"{kills} stops, {hits} of them in a save; {wrong} runs differ from the whole one")
    return wrong
