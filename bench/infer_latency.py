"""One image after another: how long each row takes for each, and what that says.

Every image is a round: each row answers about it once, in a new order, so that rows can be compared
image by image. What a hub costs depends on which experts the image asks, and its slowest answers
are those of its slowest pair of experts (of K, any number): that is named beside the quantiles. It
is the one of the largest median, since a single slow answer may be the machine's.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from . import timing

FEWEST = 3  # images that a pair of experts must have been asked about, if any pair was
Experts = tuple[int, ...]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Latency:
    """Quantiles of the seconds of an answer, over so many images."""

    p50: float
    p90: float
    p99: float
    best: float
    images: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        if len(seconds) == 1:
            return cls(*[seconds[0]] * 4, images=1)
        cuts = statistics.quantiles(seconds, n=100, method="inclusive")
        return cls(cuts[49], cuts[89], cuts[98], min(seconds), len(seconds))


@dataclass(frozen=True)
class Slowest:
    """The experts of the largest median among those that images ask together: its seconds, and of
    how many images."""

    experts: Experts
    p50: float
    images: int


def ask_each(
    functions: Mapping[str, Callable[[Item], object]],
    items: Sequence[Item],
    device: str = "cpu",
    clock: timing.Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each function for each item, in the items' order. Each function has been called
    with the first items before, untimed, a tenth of all."""
    timing.refuse_interpreter()
    for function in functions.values():
        for item in items[: max(2, len(items) // 10)]:
            function(item)
    order, shuffle = list(functions), random.Random(0).shuffle
    found: dict[str, list[float]] = {name: [] for name in functions}
    for item in items:
        shuffle(order)
        for name in order:
            timing.synchronize(device)
            start = clock()
            functions[name](item)
            timing.synchronize(device)
            found[name].append(clock() - start)
    return found


def slowest(seconds: Sequence[float], asked: Sequence[Experts]) -> Slowest:
    """seconds: of each image. asked: the experts that it asks."""
    groups: dict[Experts, list[float]] = {}
    for experts, spent in zip(asked, seconds, strict=True):
        groups.setdefault(experts, []).append(spent)
    often = {e: spent for e, spent in groups.items() if len(spent) >= FEWEST} or groups
    medians = {experts: statistics.median(spent) for experts, spent in often.items()}
    worst = max(medians, key=medians.__getitem__)
    return Slowest(worst, medians[worst], len(often[worst]))


def mean_of(rows: Sequence[Sequence[float]]) -> list[float]:
    """Of each image, the mean of the rows' seconds."""
    return [statistics.mean(of_image) for of_image in zip(*rows, strict=True)]


def to_alone(
    seconds: Sequence[float],
    experts: Sequence[Sequence[float]],
    generator: Sequence[float],
    asked: Sequence[Experts],
) -> float:
    """The median, over images, of an answer's seconds over those of what it needs: of the experts
    that the image asks, each by itself, and of the generator. experts: [M], seconds by image."""
    ratios = []
    for image, own in enumerate(asked):
        needed = generator[image] + sum(experts[index][image] for index in own)
        ratios.append(seconds[image] / needed)
    return statistics.median(ratios)
