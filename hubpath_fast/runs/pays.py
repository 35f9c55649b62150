"""Does routing pay? A trained Hub-Pathway's routes against other ways to ask its experts.

Nothing is trained. All experts are run on all validation images, and their outputs go through the
trained aggregator with the weights of

- the learned routes: the model as it is;
- the best fixed set: always the same K experts, the best of all sets of K (of more than
  ``MOST_SETS`` the one that is found by adding, K times, the expert that makes it best). Their
  weights are the means of p over the images, restricted to the set;
- random routes: K experts drawn for each image, with equal weights, the mean of ``DRAWS`` draws;
- each expert alone.

The weights of an image always add up to what the learned ones do in the mean, so that the
aggregator sees outputs of the scale that it was trained on.

Letters: n images, M experts, K active ones, C outputs, S candidates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..devices import autocast, eval_mode
from ..measure import Measure
from ..model import FixedRoutes, HubPathway, dense_weights
from ..parallel.ranks import Ranks
from ..parallel.samples import gather_batches
from ..training import Task
from .pays_words import sentence

MOST_SETS = 256  # fixed sets that are all tried: 10 experts at K = 5 have 252
DRAWS = 10  # of random routes
RESAMPLES = 2000  # of the bootstrap
LEVEL = 0.95  # of its intervals
IN_MEMORY = 2**30  # bytes of outputs that are kept; where they are more, experts are asked again
SMALLEST = 1e-12  # mean weight of an expert in a fixed set: of one that is never asked it may be 0


def does_routing_pay(
    model: HubPathway,
    task: Task,
    batches: Iterable,
    names: Sequence[str],
    seed: int,
    device: str = "cpu",
    amp: str = "none",
    split: str = "validation",
    ranks: Ranks = Ranks(),
) -> dict[str, Any]:
    """What came of learned routes, best fixed set, random routes and experts alone.

    The fixed set is chosen on the same images that it is then compared on, which favours it: where
    routing is said to add something, it does so in spite of that.

    Args:
        model: trained; on its device, in any mode.
        batches: of the images, (images, targets); see ``runs.build.eval_batches``.
            Of several ranks, this one's share.
        names: of the experts. seed: of random routes and of the bootstrap. split: what the images
            are called. ranks: that find it together, each asking about its own images.

    Returns:
        A dictionary for ``result.json``:

        pays: whether routing is shown to add something (the interval of ``added.fixed`` is above
        0); None where there is nothing to choose (K = M). sentence: that in words. split, images,
        metric. learned, fixed, random, alone (a list): each with value, low and high, the mean of
        the metric and its interval; fixed also has experts, names, weights and sets, how many were
        tried. added: by rival (fixed, random, alone) by how much the learned routes are better,
        with error, the standard error, low and high: a paired bootstrap over images, the interval
        of 95 %; above 0 is better whichever way the metric goes. quality: of the weights, the
        fields of ``report.quality.Quality`` (figure 3b). Without a choice fixed and random are
        missing.
    """
    from ..report.quality import weight_quality  # its package draws figures: slow to import

    asked = Asked(model, task, batches, device, amp, ranks=ranks)
    count, k = asked.weights.shape[1], model.k
    choice = k < count
    total = float(asked.weights.sum(dim=1).mean())
    experts = list(range(count))
    candidates = [asked.weights, *(fixed_weights(asked.mean, [i], total) for i in experts)]
    scores = asked.scores(candidates)
    rivals: dict[str, np.ndarray] = {"learned": scores[0]}
    best: dict[str, Any] = {}
    if choice:
        chosen, tried, own = best_set(asked, task.metric, k, total)
        weights = fixed_weights(asked.mean, chosen, total)[chosen].tolist()
        best = {"experts": chosen, "names": [names[i] for i in chosen], "weights": weights}
        rivals["fixed"], best["sets"] = own, tried
        draws = random_weights(asked.samples, count, k, total, seed)
        rivals["random"] = asked.scores(draws).mean(axis=0)
    quality = weight_quality(asked.weights, asked.alone, task.metric)
    rivals |= {f"alone {i}": scores[1 + i] for i in experts}
    found = compared(rivals, task.metric, seed)
    alone = [{"name": names[i], **found["values"].pop(f"alone {i}")} for i in experts]
    added_alone = [found["added"].pop(f"alone {i}") for i in experts]
    result = {
        "pays": found["added"]["fixed"]["low"] > 0 if choice else None,
        "split": split,
        "images": asked.samples,
        "metric": task.metric.name,
        **found["values"],
        **({"fixed": best | found["values"]["fixed"]} if choice else {}),
        "alone": alone,
        "added": {**found["added"], "alone": added_alone},
        "quality": {name: _plain(value) for name, value in quality._asdict().items()},
    }
    return {"sentence": sentence(result, task.metric, names), **result}


class Asked:
    """What every expert says of every image, and the weights that the model gives them.

    batches: may be iterated any number of times, and give the same each time. in_memory: bytes of
    outputs that are kept; where they are more, as maps are, the experts are asked again by every
    ``scores``, which costs no room on any disk.

    weights: [n, M] float32, 0 where an expert is not asked. mean: [M], of p over the images.
    alone: [M, n], the task's score of each expert's own output.
    """

    def __init__(
        self,
        model: HubPathway,
        task: Task,
        batches: Iterable,
        device: str,
        amp: str,
        in_memory: int = IN_MEMORY,
        ranks: Ranks = Ranks(),
    ) -> None:
        self.model, self.task, self.batches, self.amp = model, task, batches, amp
        self.device, self.ranks = torch.device(device), ranks
        # Outputs [N, M, C, ...] on the host, targets; None: too much to keep.
        self.parts: list[tuple[Tensor, Any]] | None = []
        weights, alone, sums, kept = [], [], torch.zeros(len(model.experts)).double(), 0
        with torch.no_grad(), eval_mode(model):
            for images, targets in batches:
                images = images.to(self.device)
                with autocast(self.device, amp):
                    routing, outputs = model.route(images), model.ask_all(images)
                targets = targets.cpu()
                counted = len(targets)  # 0 of an image that is only there for other ranks' sake
                outputs = outputs[:counted]
                weights.append(dense_weights(routing).float().cpu()[:counted])
                sums += routing.mean.double().cpu() * counted
                alone.append(torch.empty(len(sums), counted).double())
                for i, own in enumerate(outputs.unbind(1) if counted else ()):
                    alone[-1][i] = task.scores(task.predict(own).cpu(), targets)
                kept += outputs.nbytes
                if kept > in_memory:
                    self.parts = None
                if self.parts is not None:
                    self.parts.append((outputs.cpu(), targets))
        if not weights:
            raise ValueError("batches: expected at least one sample to evaluate on, got none")
        # All ranks ask again where one has to, since they do it together.
        if any(ranks.gather(self.parts is None)):
            self.parts = None
        weights = gather_batches(weights, ranks)
        self.weights = torch.cat(weights)
        self.alone = torch.cat(gather_batches(alone, ranks), dim=1).numpy()
        self.samples = len(self.weights)
        self.mean = sum(ranks.gather(sums)) / self.samples
        ends = np.cumsum([len(part) for part in weights]).tolist()
        # Where this rank's images of each batch stand among all.
        self._rows = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        self._rows = self._rows[ranks.rank :: ranks.world]

    def scores(self, candidates: Sequence[Tensor]) -> np.ndarray:
        """[S, n]: the task's scores with other weights, [M] or one for each image [n, M]; an expert
        of weight 0 is not asked."""
        found = []
        with torch.no_grad(), eval_mode(self.model):
            for rows, (outputs, targets) in zip(self._rows, self._outputs(), strict=True):
                scores = np.empty((len(candidates), len(outputs)))
                for i, weights in enumerate(candidates if len(outputs) else ()):
                    own = weights.expand(self.samples, -1)[rows].to(self.device, torch.float32)
                    predicted = self.task.predict(self._aggregate(outputs, own)).cpu()
                    scores[i] = self.task.scores(predicted, targets).numpy()
                found.append(scores)
        return np.concatenate(gather_batches(found, self.ranks), axis=1)

    def _outputs(self) -> Iterator[tuple[Tensor, Any]]:
        """Batch by batch the outputs [N, M, C, ...] on the device, and the targets."""
        if self.parts is not None:
            for outputs, targets in self.parts:
                yield outputs.to(self.device), targets
            return
        for images, targets in self.batches:
            with autocast(self.device, self.amp):
                outputs = self.model.ask_all(images.to(self.device))
            yield outputs[: len(targets)], targets.cpu()

    def _aggregate(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """As ``HubPathway`` does in evaluation mode, but for roundings."""
        weights = weights.view(*weights.shape, *[1] * (outputs.dim() - 2))
        weighted = torch.where(weights != 0, outputs * weights, 0).to(outputs.dtype)
        with autocast(self.device, self.amp):
            return self.model.aggregator(weighted.flatten(1, 2))


def fixed_weights(mean: Tensor, experts: Sequence[int], total: float) -> Tensor:
    """[M]: the mean weights [M] restricted to the experts, with the sum ``total``."""
    weights, chosen = torch.zeros_like(mean), list(experts)
    weights[chosen] = mean[chosen].clamp_min(SMALLEST)
    return total * weights / weights.sum()


def random_weights(n: int, count: int, k: int, total: float, seed: int) -> list[Tensor]:
    """``DRAWS`` of [n, M]: for each image K different experts, drawn uniformly, equal weights."""
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(DRAWS):
        experts = torch.rand(n, count, generator=generator).argsort(dim=1)[:, :k]
        draws.append(torch.zeros(n, count).scatter(1, experts, total / k))
    return draws


def best_set(
    asked: Asked, measure: Measure, k: int, total: float, most: int = MOST_SETS
) -> tuple[list[int], int, np.ndarray]:
    """The K experts that are best to ask about every image, in their order; how many sets were
    tried; and its scores [n]. Among equals the first in the experts' order."""
    count = asked.weights.shape[1]

    def best_of(sets: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], np.ndarray]:
        scores = asked.scores([fixed_weights(asked.mean, experts, total) for experts in sets])
        first = measure.ranked(scores.mean(axis=1).tolist())[0]
        return sets[first], scores[first]

    if math.comb(count, k) <= most:
        sets = list(itertools.combinations(range(count), k))
        experts, scores = best_of(sets)
        return list(experts), len(sets), scores
    experts, tried = (), 0
    for _ in range(k):
        sets = [tuple(sorted((*experts, i))) for i in range(count) if i not in experts]
        experts, scores = best_of(sets)
        tried += len(sets)
    return list(experts), tried, scores


def compared(rivals: dict[str, np.ndarray], measure: Measure, seed: int) -> dict[str, Any]:
    """Of scores [n] by name, "learned" among them: values (value, low, high) by name, and by how
    much "learned" is better than each other one (added: value, error, low, high)."""
    learned = rivals["learned"]
    others = [name for name in rivals if name != "learned"]
    better = [measure.sign * (learned - rivals[name]) for name in others]
    rows = np.stack([*rivals.values(), *better])
    means = bootstrap(rows, seed)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    columns = zip(rows.mean(axis=1), means.std(axis=1), low, high, strict=True)
    found = [
        dict(zip(("value", "error", "low", "high"), map(float, c), strict=True)) for c in columns
    ]
    values = dict(zip(rivals, found, strict=False))
    for value in values.values():
        del value["error"]
    return {"values": values, "added": dict(zip(others, found[len(rivals) :], strict=True))}


def bootstrap(scores: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """[S, resamples]: the means of scores [S, n] over images drawn with replacement, the same ones
    for all S, so that differences are paired."""
    generator, n = np.random.default_rng(seed), scores.shape[1]
    at_once = max(1, 2**22 // n)  # resamples whose counts of images are in memory
    parts = []
    for begin in range(0, resamples, at_once):
        size = min(at_once, resamples - begin)
        drawn = generator.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        parts.append(scores @ counts.T / n)
    return np.concatenate(parts, axis=1)


def prefers_fixed(found: dict[str, Any], measure: Measure) -> bool:
    """Whether the best fixed set is at least as good as the learned routes: of equals it is
    preferred, as it needs no router. False where there was nothing to choose."""
    if "fixed" not in found:
        return False
    return not measure.is_better(found["learned"]["value"], found["fixed"]["value"])


def fixed_routes(found: dict[str, Any]) -> FixedRoutes:
    """The best fixed set, to stand where the model has its generator."""
    fixed = found["fixed"]
    return FixedRoutes(fixed["experts"], fixed["weights"], len(found["alone"]))


def _plain(value: float) -> float | None:
    return None if isinstance(value, float) and math.isnan(value) else value
