"""How well the weights point to the experts that do well, as numbers.

Counted are, as in the paper, samples on which at least one expert alone does not fail: its score is
better than the worst that the measure can be (for right and wrong: somebody is right). Where the
measure has no worst value, every sample counts. There the expert of the largest weight is compared
with one drawn uniformly, whose score is the mean over experts; nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..measure import Measure
from .arrays import to_array, to_limits, to_names
from .tables import Table


class Quality(NamedTuple):
    """The weights' quality on some samples; means are NaN where they are of no samples."""

    samples: int
    counted: int  # samples on which at least one expert alone does not fail
    top: float  # mean score on the counted: of the expert of the largest weight
    random: float  # of an expert drawn uniformly, the expectation
    asked: float  # of the best expert with a weight above 0
    oracle: float  # of the best expert
    decisive: int  # counted samples on which the experts differ
    decisive_top: float
    decisive_random: float
    decisive_oracle: float


def weight_quality(weights: Any, scores: Any, measure: Measure) -> Quality:
    """weights: [n, M], 0 where an expert is inactive. scores: [M, n], of each expert alone.

    Where several experts share the largest weight, each of them counts with an equal part.
    """
    values = to_array("weights", weights).astype(np.float64)
    alone = to_limits("scores", to_array("scores", scores).astype(np.float64), measure)
    if values.ndim != 2 or alone.shape != values.shape[::-1]:
        raise ValueError(
            f"weights has shape {list(values.shape)} and scores {list(alone.shape)}; give weights "
            "[n, M] and scores [M, n]"
        )
    alone, best = alone.T, np.max if measure.better == "max" else np.min
    largest = values == values.max(axis=1, keepdims=True)
    top = (alone * largest).sum(axis=1) / largest.sum(axis=1)
    random, oracle = alone.mean(axis=1), best(alone, axis=1)
    fallback = -np.inf if measure.better == "max" else np.inf
    asked = best(np.where(values > 0, alone, fallback), axis=1)
    asked = np.where(np.isfinite(asked), asked, random)  # nobody asked: as good as chance
    counted = np.ones(len(values), bool) if measure.worst is None else oracle != measure.worst
    decisive = counted & (alone != alone[:, :1]).any(axis=1)
    means = [_mean(v[counted]) for v in (top, random, asked, oracle)]
    split = [_mean(v[decisive]) for v in (top, random, oracle)]
    return Quality(len(values), int(counted.sum()), *means, int(decisive.sum()), *split)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def quality_table(qualities: Sequence[Quality], names: Sequence[str], head: str) -> Table:
    """All numbers, a line for each; ``head`` heads the names."""
    names = to_names("names", names, len(qualities), "qualities")
    columns = [
        head,
        "samples",
        "counted",
        "top-weighted expert",
        "random expert (expectation)",
        "best asked expert",
        "best expert",
        "decisive",
        "top-weighted expert, decisive",
        "random expert, decisive",
        "best expert, decisive",
    ]
    return Table(columns, [[name, *q] for name, q in zip(names, qualities, strict=True)])
