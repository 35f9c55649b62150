"""Which experts a hub can do without, by what it said once (``answers.HubAnswers``).

Without an expert, its images are rerouted: a softmax over the scores of the experts that stay, as
``HubPathway.remove_expert`` leaves it. No model runs here.

    lost(kept) = mean over images of (metric of the hub - metric of the experts kept), in points

A point is a unit as the metric is shown (a percentage point of accuracy), and lost is above 0 where
the smaller hub is worse. Backward elimination: of all experts the one is dropped without which the
metric is best, then of those that are left, down to K; M*M/2 hubs are tried, not 2**M, each by
what it changes (``without.WithoutOne``), so that hundreds of experts take seconds. Intervals are
paired: both hubs are scored on the same resampled images. They say how sure a loss is on images
like these, not that an expert was picked because its loss is small. Letters: n images, M experts,
K active.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model import HubPathway
from ..training import Task
from .answers import HubAnswers
from .without import WithoutOne

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
        self._without = WithoutOne(answers, task)

    @property
    def value(self) -> float:
        """The whole hub's metric."""
        return self._full.mean().item()

    def asked(self) -> list[float]:
        """[M]: the share of the images that each expert is asked about."""
        return (self.answers.weights() > 0).double().mean(dim=0).tolist()

    def of(self, kept: Sequence[int]) -> Loss:
        [loss] = self._losses(self._scores(kept)[None])
        return loss

    def of_each(self) -> list[Loss]:
        """[M]: what is lost without each expert alone; of more than K experts."""
        return self._losses(self._without.scores(range(self.answers.num_experts)))

    def eliminate(self, fixed: Collection[int] = ()) -> list[Step]:
        """Backward, down to K experts or those that are ``fixed``. Of experts without which the
        metric is equal the one with the least weight goes, then the first."""
        kept, dropped, left, found = tuple(range(self.answers.num_experts)), [], [], []
        while len(kept) > self.answers.k and (free := [i for i in kept if i not in fixed]):
            weights = self.answers.weights(kept).sum(dim=0).tolist()
            free.sort(key=weights.__getitem__)
            scores = self._without.scores(kept)[[kept.index(i) for i in free]]
            best = self.task.metric.ranked(scores.mean(dim=1).tolist())[0]
            kept = tuple(i for i in kept if i != free[best])
            dropped.append(free[best])
            left.append(kept)
            found.append(scores[best])
        losses = self._losses(torch.stack(found)) if found else []
        return [Step(*step) for step in zip(dropped, left, losses, strict=True)]

    def _scores(self, kept: Sequence[int] | None) -> Tensor:
        """[n] float64: the metric of each image."""
        predictions = self.task.predict(self.answers.predict(kept))
        return self.task.scores(predictions, self.answers.targets)

    def _losses(self, scores: Tensor) -> list[Loss]:
        """Of hubs with these scores [hubs, n]."""
        metric = self.task.metric
        differences = metric.scale * metric.sign * (self._full - scores)
        values, lost = scores.mean(dim=1).tolist(), differences.mean(dim=1).tolist()
        intervals = paired_intervals(differences, seed=self.seed)
        return [Loss(*loss) for loss in zip(values, lost, intervals, strict=True)]


def check_droppable(run: str | Path, model: HubPathway) -> None:
    """Raises ValueError for a hub that has no expert to spare."""
    count, k = len(model.experts), model.k
    if count == 1:
        raise ValueError(f"{run} has one expert, which cannot be dropped; fit a hub of more")
    if count <= k:
        raise ValueError(
            f"{run} asks all of its {count} experts about every image (k={k}), so none can be "
            "dropped; fit it with a smaller --k"
        )


def keep_only(model: HubPathway, kept: tuple[int, ...]) -> None:
    """Removes all other experts, in place."""
    for i in reversed(range(len(model.experts))):
        if i not in kept:
            model.remove_expert(i)


def smallest_within(steps: Sequence[Step], points: float) -> Step | None:
    """The last step that loses at most so many points, below 0 that gains at least so many; None:
    there is none."""
    return next((step for step in reversed(steps) if step.loss.within(points)), None)


def best_of(steps: Sequence[Step]) -> Step | None:
    """The step that gains most over the whole hub, of equal ones the last; None: none gains."""
    best = min(reversed(steps), key=lambda step: step.loss.lost, default=None)
    return None if best is None or best.loss.lost >= -ROUNDING else best


def check_points(points: float) -> None:
    """Raises ValueError for what no loss can be compared with."""
    if not math.isfinite(points):
        raise ValueError(
            f"points: expected a finite number, below 0 of what must be gained, got {points:g}"
        )


def describe(
    found: Losses,
    steps: Sequence[Step],
    chosen: Step | None,
    tested: Losses | None,
    points: float,
    names: Sequence[str],
    fixed: Collection[int] = (),
) -> dict[str, Any]:
    """What is written of an elimination, in plain types; "best": the step that gains most.

    found: on validation images. steps: of it, with the experts ``fixed``. chosen: of these, the
    smallest hub that loses at most ``points``. tested: on test images. names: of the experts.
    """
    best = best_of(steps)
    return {
        "metric": asdict(found.task.metric),
        "k": found.answers.k,
        "images": len(found.answers.targets),
        "value": found.value,
        "level": LEVEL,
        "resamples": RESAMPLES,
        "seed": found.seed,
        "experts": [
            {"name": name, "asked": asked, "removable": i not in fixed, "without": asdict(loss)}
            for i, (name, asked, loss) in enumerate(
                zip(names, found.asked(), found.of_each(), strict=True)
            )
        ],
        "steps": [
            {"dropped": names[step.dropped], "left": len(step.kept), **asdict(step.loss)}
            for step in steps
        ],
        "best": None if best is None else {"left": len(best.kept), **asdict(best.loss)},
        "points": points,
        "chosen": None if chosen is None else _chosen(chosen, tested, points, names),
    }


def _chosen(
    chosen: Step, tested: Losses | None, points: float, names: Sequence[str]
) -> dict[str, Any]:
    """The hub that is proposed, and what it loses on the test images."""
    test = None
    if tested is not None:
        loss = tested.of(chosen.kept)
        test = {
            "images": len(tested.answers.targets),
            "hub": tested.value,
            **asdict(loss),
            "confirmed": loss.within(points),
        }
    return {
        "kept": [names[i] for i in chosen.kept],
        "dropped": [name for i, name in enumerate(names) if i not in chosen.kept],
        "validation": asdict(chosen.loss),
        "test": test,
    }


def paired_intervals(
    differences: Tensor, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> list[tuple[float, float] | None]:
    """The percentile bootstrap intervals of the means of differences [hubs, n], float64, of hubs
    from another one on the same images; all from the same resamples. None where n is 1."""
    count = differences.shape[1]
    if count < 2:
        return [None] * len(differences)
    random = torch.Generator().manual_seed(seed)
    rows, means = max(1, AT_ONCE // count), []
    for first in range(0, resamples, rows):
        drawn = torch.randint(count, (min(rows, resamples - first), count), generator=random)
        times = differences.new_zeros(drawn.shape)  # that each image was drawn
        times.scatter_add_(1, drawn, times.new_ones(1, 1).expand_as(drawn))
        means.append(differences @ times.t() / count)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=differences.dtype)
    low, high = torch.cat(means, dim=1).quantile(ends, dim=1).tolist()
    return list(zip(low, high, strict=True))
