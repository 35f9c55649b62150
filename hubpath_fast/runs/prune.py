"""Which experts a hub can do without, by what it said once (``answers.HubAnswers``).

Without an expert, its images are rerouted: a softmax over the scores of the experts that stay, as
``HubPathway.remove_expert`` leaves it. No model runs here.

    lost(kept) = mean over images of (metric of the hub - metric of the experts kept), in points

A point is a unit as the metric is shown (a percentage point of accuracy), and lost is above 0 where
the smaller hub is worse. Backward elimination: of all experts the one is dropped without which the
metric is best, then of those that are left, down to K; M*M/2 hubs are tried, not 2**M. Intervals
are paired: both hubs are scored on the same resampled images. They say how sure a loss is on images
like these, not that an expert was picked because its loss is small. Letters: n images, M experts,
K active.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..training import Task
from .answers import HubAnswers

LEVEL, RESAMPLES = 0.95, 2000  # of a percentile bootstrap
AT_ONCE = 2**22  # images drawn at a time, of all resamples
ROUNDING = 1e-9  # of a loss, in points: the mean's last bits are no reason to keep an expert


@dataclass(frozen=True)
class Loss:
    """What a smaller hub loses. value: its metric. lost: in points. interval: of lost; None where
    there is one image alone."""

    value: float
    lost: float
    interval: tuple[float, float] | None

    def within(self, points: float) -> bool:
        return self.lost <= points + ROUNDING


@dataclass(frozen=True)
class Step:
    """One of the elimination: the expert dropped, those kept after it, and what is lost by then."""

    dropped: int
    kept: tuple[int, ...]
    loss: Loss


class Losses:
    """What smaller hubs lose on the split that the answers are of.

    answers: of a hub with a router. task: what it learned. seed: of the resamples, which are the
    same for every smaller hub.
    """

    def __init__(self, answers: HubAnswers, task: Task, seed: int = 0):
        self.answers, self.task, self.seed = answers, task, seed
        self._full = self._scores(None)

    @property
    def value(self) -> float:
        """The whole hub's metric."""
        return self._full.mean().item()

    def asked(self) -> list[float]:
        """[M]: the share of the images that each expert is asked about."""
        return (self.answers.weights() > 0).double().mean(dim=0).tolist()

    def of(self, kept: Sequence[int]) -> Loss:
        scores = self._scores(kept)
        metric = self.task.metric
        differences = metric.scale * metric.sign * (self._full - scores)
        interval = paired_interval(differences, seed=self.seed)
        return Loss(scores.mean().item(), differences.mean().item(), interval)

    def eliminate(self, fixed: Collection[int] = ()) -> list[Step]:
        """Backward, down to K experts or those that are ``fixed``. Of experts without which the
        metric is equal the one with the least weight goes, then the first."""
        kept, steps = tuple(range(self.answers.num_experts)), []
        while len(kept) > self.answers.k and (free := [i for i in kept if i not in fixed]):
            weights = self.answers.weights(kept).sum(dim=0)
            free.sort(key=lambda i, w=weights: w[i].item())
            rests = [tuple(j for j in kept if j != i) for i in free]
            values = [self._scores(rest).mean().item() for rest in rests]
            best = self.task.metric.ranked(values)[0]
            kept = rests[best]
            steps.append(Step(free[best], kept, self.of(kept)))
        return steps

    def _scores(self, kept: Sequence[int] | None) -> Tensor:
        """[n] float64: the metric of each image."""
        predictions = self.task.predict(self.answers.predict(kept))
        return self.task.scores(predictions, self.answers.targets)


def smallest_within(steps: Sequence[Step], points: float) -> Step | None:
    """The last step that loses at most so many points; None: there is none."""
    return next((step for step in reversed(steps) if step.loss.within(points)), None)


def paired_interval(
    differences: Tensor, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """The percentile bootstrap interval of the mean of differences [n], float64, between two hubs
    on the same images; None where n is 1."""
    count = len(differences)
    if count < 2:
        return None
    random = torch.Generator().manual_seed(seed)
    rows, means = max(1, AT_ONCE // count), []
    for first in range(0, resamples, rows):
        drawn = torch.randint(count, (min(rows, resamples - first), count), generator=random)
        means.append(differences[drawn].mean(dim=1))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=differences.dtype)
    low, high = torch.cat(means).quantile(ends).tolist()
    return low, high
