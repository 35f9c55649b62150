"""Sets of models, chosen one after another: the next is the one that helps those chosen most.

What a set is worth depends on what is done with it:

``ensemble``  all its models judge every image: the loss of the mean of their probabilities.
``routing``   one of them judges each image: the mean over images of the least loss that any has. It
              is the loss of a router that always asks the right one, and rewards models that know
              what the others do not, however little else they know.

Both are computed from each head's probability of each image's own class alone, so that all
candidates are tried in one pass over [M, n] numbers. A set goes on growing where its loss rises.

Letters: M models, n images, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..features import ShelfModel

OBJECTIVES = ("ensemble", "routing")
SMALLEST = 1e-300  # a probability whose logarithm float64 has


@dataclass(frozen=True)
class Budget:
    """Of a set: how many models, how many parameters in all, how many milliseconds an image in all.
    None: no bound."""

    models: int | None = None
    parameters: int | None = None
    ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("models", "parameters", "ms"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a number above 0, got {value}")


@dataclass(frozen=True)
class Chosen:
    """A model of a set, and the set with it.

    index: of the logits given. loss: in nats. accuracy: of the ensemble; with "routing" the share
    of images that any model of the set has right. parameters, ms: of the set; None: not known.
    """

    index: int
    loss: float
    accuracy: float
    parameters: int | None = None
    ms: float | None = None


def greedy(
    logits: Tensor,
    targets: Tensor,
    budget: int | Budget,
    objective: str = "ensemble",
    models: Sequence[ShelfModel] | None = None,
) -> list[Chosen]:
    """The models of a set in the order in which they are chosen.

    Args:
        logits: float [M, n, C], of images that the heads were not fitted to.
        targets: int64 [n].
        budget: of the set; an integer is a number of models. It is used up, as far as there are
            models: one that does not fit any more is passed over for the next best.
        objective: "ensemble" or "routing".
        models: of the logits, for what they cost; None: that is not known.

    Raises:
        ValueError: an unknown objective; a budget of what is not known of a model, or which no
            model fits.
    """
    check_objective(objective)
    costs = Costs(budget if isinstance(budget, Budget) else Budget(int(budget)), logits, models)
    tally = _Ensemble(logits, targets) if objective == "ensemble" else _Routing(logits, targets)
    chosen: list[Chosen] = []
    while bool((fits := costs.fits()).any()):
        losses = tally.losses().masked_fill(~fits, torch.inf)
        best = int((losses == losses.min()).nonzero()[0])  # argmin promises no order of ties
        tally.add(best)
        costs.add(best)
        chosen.append(
            Chosen(best, float(losses[best]), tally.accuracy(), costs.parameters, costs.ms)
        )
    if not chosen:
        raise ValueError(f"budget: no model fits {costs.bounds()}; the least costs {costs.least()}")
    return chosen


def check_objective(objective: str) -> None:
    """Raises ValueError for none of ``OBJECTIVES``."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected {' or '.join(OBJECTIVES)}, got {objective!r}")


class Costs:
    """What of a budget is spent. parameters, ms: of the set so far, None where one of its models'
    is not known."""

    def __init__(self, budget: Budget, logits: Tensor, models: Sequence[ShelfModel] | None):
        self.budget, self.open = budget, torch.ones(len(logits), dtype=torch.bool)
        self._of, self._spent = {}, {"parameters": 0.0, "ms": 0.0}
        for name in self._spent:
            values = [None if models is None else getattr(m, name) for m in models or logits]
            if getattr(budget, name) is not None and None in values:
                who = "these models" if models is None else models[values.index(None)].label
                raise ValueError(
                    f"{name}: expected no such budget, since the {name} of {who} are not known; "
                    "give a number of models"
                )
            self._of[name] = torch.tensor(
                [math.nan if v is None else v for v in values], dtype=torch.float64
            )

    def fits(self) -> Tensor:
        """Which models can still be added: bool [M]."""
        if self.budget.models is not None and int((~self.open).sum()) >= self.budget.models:
            return torch.zeros_like(self.open)
        fits = self.open.clone()
        for name, spent in self._spent.items():
            if (most := getattr(self.budget, name)) is not None:
                fits &= self._of[name] + spent <= most * (1 + 1e-9)
        return fits

    def add(self, index: int) -> None:
        self.open[index] = False
        for name in self._spent:
            self._spent[name] += float(self._of[name][index])

    @property
    def parameters(self) -> int | None:
        spent = self._spent["parameters"]
        return None if math.isnan(spent) else int(spent)

    @property
    def ms(self) -> float | None:
        spent = self._spent["ms"]
        return None if math.isnan(spent) else spent

    def bounds(self) -> str:
        return ", ".join(f"{name} {getattr(self.budget, name):g}" for name in self._bounded())

    def least(self) -> str:
        return ", ".join(f"{float(self._of[name].min()):g} {name}" for name in self._bounded())

    def _bounded(self) -> list[str]:
        return [name for name in self._spent if getattr(self.budget, name) is not None]


class _Ensemble:
    """The set whose models' probabilities are averaged."""

    def __init__(self, logits: Tensor, targets: Tensor):
        self._logits, self._targets, self._count = logits, targets, 0
        self._own = own_losses(logits, targets).neg_().exp_()  # [M, n], of each image's own class
        self._sum = torch.zeros_like(self._own[0])
        self._all = torch.zeros(logits.shape[1:], dtype=torch.float64)

    def losses(self) -> Tensor:
        mean = (self._sum + self._own) / (self._count + 1)
        return -mean.clamp_min_(SMALLEST).log_().mean(1)

    def add(self, index: int) -> None:
        self._count += 1
        self._sum += self._own[index]
        self._all += self._logits[index].double().softmax(1)

    def accuracy(self) -> float:
        return float((self._all.argmax(1) == self._targets).double().mean())


class _Routing:
    """The set of which the best model judges each image."""

    def __init__(self, logits: Tensor, targets: Tensor):
        self._own = own_losses(logits, targets)
        self._right = torch.stack([part.argmax(1) == targets for part in logits])
        self._least = torch.full_like(self._own[0], torch.inf)
        self._any = torch.zeros_like(self._right[0])

    def losses(self) -> Tensor:
        return torch.minimum(self._own, self._least).mean(1)

    def add(self, index: int) -> None:
        self._least = torch.minimum(self._least, self._own[index])
        self._any |= self._right[index]

    def accuracy(self) -> float:
        return float(self._any.double().mean())


def own_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each model on each image: float64 [M, n], one model at a time."""
    images = torch.arange(len(targets))
    return torch.stack([-part.double().log_softmax(1)[images, targets] for part in logits])
