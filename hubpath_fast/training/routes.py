"""Where an evaluation's samples were sent: the routes that predictions use, without noise.

What the log says of training (load, mean weight, entropy) is of routes with noise, and noise
spreads samples over experts even where the scores send all of them the same way. A route is the set
of the K experts that a sample is sent to. Letters: n samples, M experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..routing import Routing


class RouteMeter:
    """Collects an evaluation's routes on its device; ``result`` reads them once."""

    def __init__(self) -> None:
        self._experts: list[Tensor] = []  # [N, K] of each batch
        self._groups: list[Tensor] | None = []  # [N] likewise; None: targets are no classes
        self._mean: Tensor | None = None  # [M] the sum of p over the samples

    def add(self, routing: Routing, targets: Any) -> None:
        """Takes in a batch. targets: the class of each sample, integers [N]; or anything else,
        which routes are not compared with."""
        mean = routing.mean.detach().double() * routing.num_samples
        self._mean = mean if self._mean is None else self._mean + mean
        self._experts.append(routing.experts)
        if self._groups is not None and _are_classes(targets, routing.num_samples):
            self._groups.append(targets.to(routing.experts.device))
        else:
            self._groups = None

    def cpu(self) -> RouteMeter:
        """Moves what was collected to the host; returns itself."""
        self._experts = [batch.cpu() for batch in self._experts]
        self._mean = None if self._mean is None else self._mean.cpu()
        self._groups = None if self._groups is None else [batch.cpu() for batch in self._groups]
        return self

    def merge(self, other: RouteMeter) -> None:
        """Takes in what another one has collected, of other samples, and perhaps of none."""
        if other._mean is not None:
            self._mean = other._mean if self._mean is None else self._mean + other._mean
        self._experts += other._experts
        known = self._groups is not None and other._groups is not None
        self._groups = [*self._groups, *other._groups] if known else None

    def result(self) -> dict[str, Any]:
        """share [M], sets, mutual_information as of ``route_statistics``; weight [M], the mean of p
        over all samples, and entropy_fraction, its entropy as a share of log M; and where targets
        are classes class_share, ``share`` of the samples of each class, by its number as text.

        Raises ValueError where there was no sample.
        """
        if self._mean is None:
            raise ValueError("batches: expected at least one sample to evaluate on, got none")
        parts = [self._mean, torch.cat(self._experts).flatten()]
        if self._groups is not None:
            parts.append(torch.cat(self._groups))
        # float64 holds numbers of experts and classes exactly: one tensor, so one read.
        read = torch.cat([part.double() for part in parts]).cpu().numpy()
        count, k = len(self._mean), self._experts[0].shape[1]
        samples = sum(len(batch) for batch in self._experts)
        mean, rest = read[:count], read[count:].astype(np.int64)
        experts, groups = rest[: samples * k].reshape(samples, k), rest[samples * k :]
        asked = np.zeros((samples, count), bool)
        np.put_along_axis(asked, experts, True, axis=1)
        statistics = route_statistics(asked, None if self._groups is None else groups)
        statistics["weight"] = (mean / samples).tolist()
        statistics["entropy_fraction"] = entropy_fraction(mean)
        if self._groups is not None:
            statistics["class_share"] = {
                str(group): asked[groups == group].mean(axis=0).tolist()
                for group in np.unique(groups)
            }
        return statistics


def routes_of(weights: Tensor, targets: Any) -> dict[str, Any]:
    """``route_statistics`` of weights [n, M], 0 where an expert is not asked. targets: as of
    ``RouteMeter.add``."""
    groups = targets.cpu().numpy() if _are_classes(targets, len(weights)) else None
    return route_statistics((weights > 0).cpu().numpy(), groups)


def route_statistics(asked: np.ndarray, groups: np.ndarray | None = None) -> dict[str, Any]:
    """Of the routes of n samples.

    Args:
        asked: bool [n, M], the experts that each sample is sent to.
        groups: int [n], such as classes; None: there are none.

    Returns:
        share [M]: of the samples that an expert is asked about; they add up to K. sets: how many
        different routes there are. mutual_information: of route and group, in nats, where there are
        groups: 0 where the group says nothing of the route, at most the entropy of either. It is
        that of the counts as they are, which for independent ones is about
        (sets - 1)(groups - 1) / 2n above 0.
    """
    routes, route = np.unique(asked, axis=0, return_inverse=True)
    found: dict[str, Any] = {"share": asked.mean(axis=0).tolist(), "sets": len(routes)}
    if groups is not None:
        found["mutual_information"] = _mutual_information(route.reshape(-1), groups)
    return found


def entropy_fraction(weights: np.ndarray) -> float:
    """The entropy of weights [M], brought to the sum 1, over its largest value log M; 1 for one."""
    if len(weights) == 1:
        return 1.0
    p = weights / weights.sum()
    known = p[p > 0]
    return float(-(known * np.log(known)).sum() / np.log(len(p)))


def _mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Of two labels [n], in nats: the sum of p(a, b) log(p(a, b) / p(a) p(b))."""
    values, b = np.unique(b, return_inverse=True)
    width = len(values)
    joint = np.bincount(a * width + b.reshape(-1), minlength=(int(a.max()) + 1) * width)
    joint = joint.reshape(-1, width) / len(a)
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    found = (joint[seen] * np.log(joint[seen] / independent[seen])).sum()
    return max(0.0, float(found))  # rounding may leave it just below


def _are_classes(targets: Any, count: int) -> bool:
    return (
        isinstance(targets, Tensor)
        and targets.shape == (count,)
        and not targets.is_floating_point()
        and not targets.is_complex()
    )
