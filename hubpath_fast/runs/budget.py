"""Accuracy under a budget of milliseconds an image: which policy, and what else would cost as much.

Everything is computed from what a hub said once (``answers.HubAnswers``); no model runs here.

    cost of an image = router + sum over the experts that it asks of their milliseconds

A budget bounds the mean cost. Three things lower it, and all are tried together: K' <= K experts,
a share of the router's weight (``top_mass``), and mu, by which dear experts lose score:

    z_i = clean_i - mu * (milliseconds_i - those of the cheapest expert)

For each K' and share the smallest mu whose mean cost keeps within the budget is found by bisection.
Of experts that cost the same mu changes nothing, and K' and the share are what is left. The policy
of a budget is the one that is best on validation images of all within it, so a larger budget never
does worse there. Letters: n images, M experts, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..measure import Measure
from ..model import RoutingPolicy, dense_weights
from ..routing import Routing
from ..training import Task
from .answers import HubAnswers

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # of the router's weight, that are tried
HALVINGS = 30  # of an interval of mu
CERTAIN = 50.0  # a difference of scores that leaves nothing of a softmax: exp(-50) is 2e-22
ROUNDING = 1e-9  # of a mean cost, relative: that of all images' sum is no reason to exceed a budget


@dataclass(frozen=True)
class Costs:
    """Milliseconds an image: of the router; of each expert [M] in a hub, which gets a part of the
    images at a time; and ``alone``, [M], where each gets all of them (None: as in the hub)."""

    router: float
    experts: tuple[float, ...]
    alone: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "alone", self.alone or self.experts)

    @property
    def cheapest(self) -> float:
        """The least that an image can cost."""
        return self.router + min(self.experts)

    def full(self, k: int) -> float:
        """The most, with K experts."""
        return self.router + sum(sorted(self.experts)[-k:])

    def of(self, routing: Routing) -> float:
        """The mean of a routing."""
        rows = sum(count * ms for count, ms in zip(routing.counts(), self.experts, strict=True))
        return self.router + rows / routing.num_samples

    def above_cheapest(self) -> tuple[float, ...]:
        """Of each expert what it costs more than the cheapest."""
        return tuple(ms - min(self.experts) for ms in self.experts)

    def check(self, budget: float, names: Sequence[str]) -> None:
        """Raises ValueError for a budget that not even the cheapest expert keeps."""
        if not budget >= self.cheapest:  # NaN is refused, too
            name = names[self.experts.index(min(self.experts))]
            raise ValueError(
                f"budget-ms: expected at least {self.cheapest:.4g} ms an image, which the router "
                f"({self.router:.4g}) and {name}, the cheapest expert ({min(self.experts):.4g}), "
                f"take, got {budget:g}; allow more, or run that model alone"
            )


@dataclass(frozen=True)
class Outcome:
    """Means over a split: of the task's metric, of milliseconds and of forwards of experts."""

    value: float
    milliseconds: float
    forwards: float


@dataclass(frozen=True)
class Candidate:
    """A policy, its mu, and what came of it on validation images."""

    policy: RoutingPolicy
    mu: float
    outcome: Outcome


class Judge:
    """What choices of experts come to on the split that the answers are of."""

    def __init__(self, answers: HubAnswers, task: Task, costs: Costs):
        self.answers, self.task, self.costs = answers, task, costs
        self._alone = answers.outputs.transpose(0, 1)  # [M, n, C]

    def route(self, policy: RoutingPolicy) -> Routing:
        a = self.answers
        return policy.route(a.clean, torch.zeros_like(a.clean), a.k, a.renormalize)

    def cost(self, policy: RoutingPolicy) -> float:
        return self.costs.of(self.route(policy))

    def policy(self, policy: RoutingPolicy) -> Outcome:
        """Of the hub by a policy."""
        routing = self.route(policy)
        outputs = self.answers.combine(dense_weights(routing))
        forwards = routing.rows.numel() / routing.num_samples
        return Outcome(self.value(outputs), self.costs.of(routing), forwards)

    def ensemble(self, experts: Sequence[int]) -> Outcome:
        """Of some experts that are all asked, without the router; one: of it alone."""
        cost = sum(self.costs.alone[i] for i in experts)
        return Outcome(self.value(self.together(experts)), cost, float(len(experts)))

    def together(self, experts: Sequence[int]) -> Tensor:
        """[n, C]: what experts say together."""
        own = self._alone[list(experts)]
        return own[0] if len(own) == 1 else self.task.ensemble(own)

    def value(self, outputs: Tensor) -> float:
        """The mean of the metric over the images."""
        scores = self.task.scores(self.task.predict(outputs), self.answers.targets)
        return scores.mean().item()


class Cascade:
    """Experts asked in turn, each together with those before it, until the largest probability
    reaches a threshold, or none is left. There is no router.

    order: of the experts, the cheapest first.
    """

    def __init__(self, judge: Judge, order: Sequence[int]):
        self.judge = judge
        said = [judge.together(order[: m + 1]) for m in range(len(order))]
        self._said = torch.stack(said)  # [M, n, C], after each expert
        self._sure = torch.stack([judge.task.predict(outputs).amax(dim=1) for outputs in said])
        self._costs = torch.tensor([judge.costs.alone[i] for i in order]).double().cumsum(0)

    def at(self, threshold: float) -> Outcome:
        stage = self._stages(threshold)
        chosen = self._said[stage, torch.arange(len(stage))]
        forwards = (stage + 1).double().mean().item()
        return Outcome(self.judge.value(chosen), self._cost(threshold), forwards)

    def threshold(self, budget: float) -> float | None:
        """The largest one whose mean cost is within the budget; None: the first expert alone costs
        more. Above 1: all experts are asked."""
        tried = [0.0, *self._sure.flatten().unique().tolist(), 2.0]  # the cost grows with it
        most = budget * (1 + ROUNDING)
        if self._cost(tried[0]) > most:
            return None
        first, end = 0, len(tried)
        while end - first > 1:
            middle = (first + end) // 2
            if self._cost(tried[middle]) <= most:
                first = middle
            else:
                end = middle
        return tried[first]

    def _cost(self, threshold: float) -> float:
        return self._costs[self._stages(threshold)].mean().item()

    def _stages(self, threshold: float) -> Tensor:
        """[n]: at which expert of the order it ends."""
        ends = self._sure >= threshold
        ends[-1] = True
        return ends.int().argmax(dim=0)


def candidates(judge: Judge, budgets: Sequence[float]) -> list[Candidate]:
    """Every K', every share, and of each mu = 0 and the smallest mu for each of the budgets."""
    found: list[Candidate] = []
    for k in range(1, judge.answers.k + 1):
        for share in (None, *SHARES) if k > 1 else (None,):
            make = _policies(judge.costs, share, k)
            for mu in sorted(set(_prices(judge, make, budgets))):
                found.append(Candidate(make(mu), mu, judge.policy(make(mu))))
    return found


def best_within(found: Sequence[Candidate], budget: float, measure: Measure) -> Candidate | None:
    """The best on validation within a budget, of equal ones the cheapest; None: there is none."""
    within = [c for c in found if c.outcome.milliseconds <= budget * (1 + ROUNDING)]
    within.sort(key=lambda c: (c.outcome.milliseconds, c.mu))
    if not within:
        return None
    return within[measure.ranked([c.outcome.value for c in within])[0]]


def _policies(costs: Costs, share: float | None, k: int) -> Callable[[float], RoutingPolicy]:
    above = costs.above_cheapest()

    def make(mu: float) -> RoutingPolicy:
        return RoutingPolicy(share, [mu * ms for ms in above] if mu else None, k)

    return make


def _prices(
    judge: Judge, make: Callable[[float], RoutingPolicy], budgets: Sequence[float]
) -> Iterator[float]:
    """0, and of each budget that it exceeds the smallest mu that keeps it, where one does."""
    yield 0.0
    gaps = [ms for ms in judge.costs.above_cheapest() if ms > 0]
    if not gaps:
        return
    clean = judge.answers.clean
    most = ((clean.max() - clean.min()).item() + CERTAIN) / min(gaps)
    free, least = judge.cost(make(0.0)), judge.cost(make(most))
    for budget in budgets:
        room = budget * (1 + ROUNDING)
        if not least <= room < free:
            continue
        low, high = 0.0, most  # high keeps the budget throughout
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if judge.cost(make(middle)) <= room:
                high = middle
            else:
                low = middle
        yield high
