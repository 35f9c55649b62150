"""What a few seeds of a few games say: means, intervals, and how sure an improvement is.

After Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice",
NeurIPS 2021: interquartile mean, probability of improvement, and intervals by the percentile
bootstrap, stratified by game. Paired differences are ours: runs of one seed share what the seed
decides. Their interval is Student's, which holds for three seeds where a bootstrap does not: that
draws nothing beyond the smallest and the largest of three values, and so leaves out 0 in one of
four comparisons between equals.

Letters: G games, S seeds, B resamples. Everything is float64 and repeats: the same numbers give the
same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
TRIMMED = 0.25  # of the values, at either end of an interquartile mean


class Interval(NamedTuple):
    """A figure with its interval. low, high: NaN where there are too few values to have one."""

    value: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether the value lies outside; False where there is no interval."""
        return self.low > value or self.high < value


def mean(scores: np.ndarray) -> np.ndarray:
    """[..., n] -> [...]."""
    return scores.mean(axis=-1)


def interquartile_mean(scores: Any) -> np.ndarray:
    """[..., n] -> [...]: the mean of what is left without a quarter of the values (rounded down) at
    either end. Of fewer than four values nothing is left out: it is their mean."""
    values = np.sort(np.asarray(scores, dtype=np.float64), axis=-1)
    cut = int(TRIMMED * values.shape[-1])
    return values[..., cut : values.shape[-1] - cut].mean(axis=-1)


def bootstrap(
    scores: Sequence[Any],
    statistic: Callable[[np.ndarray], np.ndarray] = mean,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """A statistic of all values with its percentile interval, stratified: each game's seeds are
    drawn from that game's.

    Args:
        scores: for each game the values of its seeds, [S] each; S may differ.
        statistic: [..., n] -> [...], such as ``mean`` or ``interquartile_mean``.
        level: of the interval, such as 0.95.
        resamples: B.
        seed: of the draws.

    Returns: low and high are NaN where a game has a single value.

    Raises ValueError for values that are missing or not finite, and for levels that are none.
    """
    games = _games("scores", scores)
    value = float(statistic(np.concatenate(games)))
    if min(map(len, games)) < 2:
        return Interval(value, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    drawn = [g[generator.integers(len(g), size=(resamples, len(g)))] for g in games]
    return Interval(value, *_percentiles(statistic(np.concatenate(drawn, axis=1)), level))


def bootstrap_band(
    curves: Any, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, low and high [T] of curves [S, T], whose seeds are drawn as whole curves. Low and high
    are NaN where there is one curve. Arguments and errors as of ``bootstrap``."""
    values = np.asarray(curves, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(
            f"curves: expected finite numbers [seeds, points], got shape {list(values.shape)} with "
            f"{int((~np.isfinite(values)).sum())} that are not finite"
        )
    count, points = values.shape
    if count < 2:
        nothing = np.full(points, math.nan)
        return values.mean(axis=0), nothing, nothing
    counts = _counts(np.random.default_rng(seed), count, resamples)
    low, high = _percentiles(counts @ values / count, level)
    return values.mean(axis=0), low, high


def probability_of_improvement(
    first: Sequence[Any],
    second: Sequence[Any],
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """How probable it is that a run of the first method beats one of the second on a game: the
    Mann-Whitney U over the number of pairs, ties 1/2, its mean over games.

    first, second: for each game, in the same order, the values of the seeds, [S] each; S may
    differ. Both are resampled, game by game, and independently. Others as in ``bootstrap``.
    """
    ours, theirs = _games("first", first), _games("second", second)
    if len(ours) != len(theirs):
        raise ValueError(f"second: expected {len(ours)} games as in first, got {len(theirs)}")
    wins = [(a[:, None] > b) + 0.5 * (a[:, None] == b) for a, b in zip(ours, theirs, strict=True)]
    value = float(np.mean([pairs.mean() for pairs in wins]))
    if min(map(len, (*ours, *theirs))) < 2:
        return Interval(value, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    drawn = np.zeros(resamples)
    for pairs in wins:
        rows, columns = (_counts(generator, count, resamples) for count in pairs.shape)
        drawn += ((rows @ pairs) * columns).sum(axis=1) / pairs.size
    return Interval(value, *_percentiles(drawn / len(wins), level))


def paired_difference(
    first: Mapping[Any, float], second: Mapping[Any, float], level: float = LEVEL
) -> Interval:
    """The mean of first - second over the seeds that both have, with Student's t interval of S - 1
    degrees of freedom.

    first, second: a score for each seed. Low and high are NaN where one seed is common, or where
    all differences are equal, which says nothing of how far they spread; all three where none is.
    Raises ValueError for scores that are not finite.
    """
    common = [seed for seed in first if seed in second]
    if not common:
        return Interval(math.nan, math.nan, math.nan)
    [values] = _games("scores", [[first[seed] - second[seed] for seed in common]])
    value = float(values.mean())
    _check_level(level)
    if len(values) < 2 or np.ptp(values) == 0:
        return Interval(value, math.nan, math.nan)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = student_quantile((1 + level) / 2, len(values) - 1) * error
    return Interval(value, value - half, value + half)


def student_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t, for a probability in 1/2..1: bisection of the distribution's
    closed form for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    low, high = 0.0, 1.0
    while _student(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student(middle, degrees) < probability else (low, middle)
    return high


def _student(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(odd, degrees - 1, 2):  # the powers of the cosine are k + odd .. degrees - 2
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 + within) / 2


def _games(argument: str, scores: Sequence[Any]) -> list[np.ndarray]:
    games = [np.asarray(values, dtype=np.float64) for values in scores]
    if not games:
        raise ValueError(f"{argument}: expected the values of at least one game, got none")
    for i, values in enumerate(games):
        if values.ndim != 1 or not values.size or not np.isfinite(values).all():
            raise ValueError(
                f"{argument}[{i}]: expected finite numbers, one a seed, got {values.tolist()}"
            )
    return games


def _counts(generator: np.random.Generator, count: int, resamples: int) -> np.ndarray:
    """[B, count]: how often each of ``count`` values is drawn, with replacement."""
    return generator.multinomial(count, np.full(count, 1 / count), size=resamples)


def _percentiles(drawn: np.ndarray, level: float) -> np.ndarray:
    """[B, ...] -> [2, ...]."""
    _check_level(level)
    return np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
