"""Routings of many steps: how many rows each expert had, drawn or recorded.

Each sample asks K distinct experts: those with the largest sum of a popularity that all samples
share and Gumbel noise of its own, so that one expert is drawn by softmax of the popularities and
the next of what remains. What popularities do:

- ``balanced``: all are equal.
- ``skewed``: fixed, drawn from a normal distribution of standard deviation 1: the most popular of
  five experts is asked some ten times as often as the least.
- ``drifting``: begin equal and walk, each by a standard deviation of 1 in 500 steps.
- ``skewed and drifting``: begin skewed and walk.

A recorded trace is made of ``routing.counts()`` of real steps: ``Trace(name, samples,
counts).save(path)``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hubpath_fast.files import write_text

SPREAD = 1.0  # standard deviation of skewed popularities
WALK_STEPS = 500  # in which a walk has a standard deviation of 1
KINDS = {  # name -> (skewed, drifting)
    "balanced": (False, False),
    "skewed": (True, False),
    "drifting": (False, True),
    "skewed and drifting": (True, True),
}


@dataclass(frozen=True)
class Trace:
    """counts: [steps][M] rows of each expert. samples: N of each step. name: what it is."""

    name: str
    samples: list[int]
    counts: list[list[int]]

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Raises ValueError where the file is no trace."""
        try:
            trace = cls(**json.loads(path.read_text()))
            sizes = {len(counts) for counts in trace.counts}
            steps = zip(trace.samples, trace.counts, strict=True)
            good = len(sizes) == 1 and all(0 <= c <= n for n, counts in steps for c in counts)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: not a trace of routings ({error})") from error
        if not good:
            raise ValueError(
                f"{path}: expected the counts of the same experts at every step, each 0..N"
            )
        return trace


def draw(kind: str, seed: int = 0, steps: int = 500, n: int = 48, k: int = 2, m: int = 5) -> Trace:
    """A trace of one of ``KINDS``: the same for the same arguments."""
    if not 1 <= k <= m:
        raise ValueError(f"k: expected an integer in 1..{m}, got {k}; a sample asks K of M experts")
    counts = []
    for step in keys(kind, seed, steps, n, m):
        asked = np.argpartition(-step, k - 1, axis=1)[:, :k]
        counts.append(np.bincount(asked.ravel(), minlength=m).tolist())
    return Trace(kind, [n] * steps, counts)


def keys(kind: str, seed: int, steps: int, n: int, m: int) -> Iterator[np.ndarray]:
    """Of each step [n, m]: a sample asks the experts of its largest keys."""
    skewed, drifting = KINDS[kind]
    random = np.random.default_rng(seed)
    popularity = random.normal(0, SPREAD, m) if skewed else np.zeros(m)
    for _ in range(steps):
        yield popularity + random.gumbel(size=(n, m))
        if drifting:
            popularity = popularity + random.normal(0, 1 / math.sqrt(WALK_STEPS), m)
