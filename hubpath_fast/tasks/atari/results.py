"""What the finished runs of a comparison say: scores, differences, and figures over all games.

A run's score is the mean over the games of its last evaluation; a game's over runs of its seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .comparison import (
    PAPER_STEPS,
    Asked,
    Method,
    Outcome,
    failed_of,
    read_failure,
    read_outcome,
    run_place,
    source_place,
)
from .games import SCORES, human_normalized
from .settings import FINETUNE, SCRATCH
from .statistics import (
    Interval,
    bootstrap,
    bootstrap_band,
    interquartile_mean,
    paired_difference,
    probability_of_improvement,
)


class Row(NamedTuple):
    """A method on a game.

    scores: of the seeds that are finished, by seed. mean: with its bootstrap interval; None: no
    seed is finished. deviation: over seeds (n - 1); None of one. over_scratch, over_best: paired
    differences to scratch and to the best fine-tuned source; None for these themselves.
    """

    game: str
    method: Method
    scores: dict[int, float]
    mean: Interval | None
    deviation: float | None
    over_scratch: Interval | None
    over_best: Interval | None


class Total(NamedTuple):
    """A method over games. mean: interquartile, of human-normalised scores; None where a game has
    no human score. count: of the values that it is of. improvement: the probability over scratch;
    None for scratch itself, or without it."""

    method: Method
    mean: Interval | None
    count: int
    improvement: Interval | None


class Learning(NamedTuple):
    """Of one method on one game. seeds: names of the curves [S, T]; see ``figures.learning``."""

    seeds: tuple[int, ...]
    steps: np.ndarray
    curves: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Results:
    """Of a comparison's folder. outcomes: by (game, method's name, seed). failures: why runs and
    sources failed, by their places."""

    asked: Asked
    outcomes: dict[tuple[str, str, int], Outcome]
    sources: dict[str, Outcome]
    failures: dict[str, str]

    @cached_property
    def methods(self) -> list[Method]:
        return self.asked.chosen()

    def scores(self, game: str, method: str) -> dict[int, float]:
        """By seed, of those that are finished."""
        places = ((seed, (game, method, seed)) for seed in self.asked.seeds)
        return {s: self.outcomes[place].score for s, place in places if place in self.outcomes}

    @property
    def missing(self) -> list[tuple[str, Method, int]]:
        """Runs that are not finished."""
        return [p for p in self.asked.places() if (p[0], p[1].name, p[2]) not in self.outcomes]

    def best_source(self, game: str) -> Method | None:
        """Fine-tuning from the source that turned out best on the game, of those with all finished
        seeds that any of them has; None if there is none."""
        tuned = [m for m in self.methods if m.method == FINETUNE]
        found = {m: scores for m in tuned if (scores := self.scores(game, m.name))}
        most = max(map(len, found.values()), default=0)
        whole = [m for m, scores in found.items() if len(scores) == most]
        means = [statistics.fmean(found[m].values()) for m in whole]
        return whole[means.index(max(means))] if whole else None

    def rows(self, game: str) -> list[Row]:
        """A row for each method, in the order of the tables."""
        best, scratch = self.best_source(game), self.scores(game, SCRATCH)
        against = {} if best is None else self.scores(game, best.name)
        return [self._row(game, method, scratch, best, against) for method in self.methods]

    def _row(
        self,
        game: str,
        method: Method,
        scratch: dict[int, float],
        best: Method | None,
        against: dict[int, float],
    ) -> Row:
        scores = self.scores(game, method.name)
        values = list(scores.values())
        own = method.name == SCRATCH or not set(scores) & set(scratch)
        same = best in (None, method) or not set(scores) & set(against)
        return Row(
            game,
            method,
            scores,
            bootstrap([values]) if values else None,
            statistics.stdev(values) if len(values) > 1 else None,
            None if own else paired_difference(scores, scratch),
            None if same else paired_difference(scores, against),
        )

    @cached_property
    def common_games(self) -> list[str]:
        """Games on which every method that has finished any run has finished one: others would make
        a method's figure over games one of other games than its rivals'."""
        begun = [m for m in self.methods if any(self.scores(g, m.name) for g in self.asked.targets)]
        return [
            game for game in self.asked.targets if all(self.scores(game, m.name) for m in begun)
        ]

    def totals(self) -> list[Total]:
        """Of every method with finished runs, over ``common_games``; empty if there are none."""
        games = self.common_games
        found = []
        for method in self.methods if games else ():
            scores = [list(self.scores(game, method.name).values()) for game in games]
            if not all(scores):
                continue
            mean = None
            if all(game in SCORES for game in games):
                normalised = [
                    [human_normalized(score, game) for score in own]
                    for game, own in zip(games, scores, strict=True)
                ]
                mean = bootstrap(normalised, interquartile_mean)
            rivals = [list(self.scores(game, SCRATCH).values()) for game in games]
            compared = method.name != SCRATCH and all(rivals)
            better = probability_of_improvement(scores, rivals) if compared else None
            found.append(Total(method, mean, sum(map(len, scores)), better))
        return found

    def learning(self, game: str, method: Method) -> Learning | None:
        """The curves of the seeds that are finished, at the steps that all of them have; None where
        there are none."""
        found = {}
        for seed in self.asked.seeds:
            outcome = self.outcomes.get((game, method.name, seed))
            if outcome is not None and outcome.curve:
                found[seed] = dict(outcome.curve)
        steps = sorted(set.intersection(*map(set, found.values()))) if found else []
        if not steps:
            return None
        curves = np.array([[curve[step] for step in steps] for curve in found.values()])
        return Learning(tuple(found), np.array(steps), curves, *bootstrap_band(curves))

    @property
    def label(self) -> str:
        """How long was learned: "20k of 100k, sources 20k"; where there is no paper's length, or
        it is that, "8k steps, sources 6k"."""
        steps = self.asked.settings.steps
        of_paper = steps < PAPER_STEPS and any(game in SCORES for game in self.asked.targets)
        text = short_steps(steps) + (f" of {short_steps(PAPER_STEPS)}" if of_paper else " steps")
        return f"{text}, sources {short_steps(self.asked.settings.source_steps)}"


def read_results(out_dir: Path, asked: Asked) -> Results:
    """ValueError for a result that is damaged."""
    outcomes, sources, failures = {}, {}, {}
    for game, method, seed in asked.places():
        place = run_place(game, method.name, seed)
        outcome = read_outcome(out_dir / place)
        if outcome is not None:
            outcomes[game, method.name, seed] = outcome
        elif reason := read_failure(failed_of(out_dir, place)):
            failures[place] = reason
    for source in asked.needed_sources():
        place = source_place(source)
        outcome = read_outcome(out_dir / place)
        if outcome is not None:
            sources[source] = outcome
        elif reason := read_failure(failed_of(out_dir, place)):
            failures[place] = reason
    return Results(asked, outcomes, sources, failures)


def short_steps(steps: int) -> str:
    """20000 -> "20k", 2500 -> "2.5k", 300 -> "300"."""
    return f"{steps / 1000:g}k" if steps >= 1000 else str(steps)


def seeds_text(seeds: Sequence[int]) -> str:
    """[0] -> "seed 0", [0, 2] -> "seeds 0, 2"."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
