"""Models of a shelf in order, by cheap scores and by the linear heads that these are to foretell.

How well a score foretells varies by data set, so that its agreement with the yardstick, the
accuracy of cross-validated linear heads, is part of every ranking: Kendall's tau-b over all models,
and how many of the best by the yardstick are among the first by the score.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..devices import threads_for
from ..features import Shelf
from . import scores as formulas
from .heads import FittedHead, Tell, fit_heads
from .scores import MAX_PROBABILITIES, evenly, moments, source_probabilities

YARDSTICK = "linear"
SCORES = {
    "h_score": "H-score",
    "log_me": "LogME",
    "leep": "LEEP",
    "nce": "NCE",
    "knn": "kNN, %",
}  # in the order of their columns
BEST, TOP = 8, 16  # of how many of the yardstick's best are among the first by a score


@dataclass(frozen=True)
class Ranked:
    """A model's scores.

    index: on the shelf. scores, seconds: by names of ``SCORES``, and by ``YARDSTICK`` the head's
    cross-validated accuracy; without those that the model has none of. H-score and LogME each count
    the seconds of the moments that they share. loss: of the head, cross-validated; None without.
    """

    index: int
    label: str
    scores: Mapping[str, float]
    seconds: Mapping[str, float]
    loss: float | None = None


@dataclass(frozen=True)
class Agreement:
    """Of a score with the yardstick, over the models that have it.

    tau: Kendall's tau-b with the accuracy, tau_loss with the loss: 1 where both orders are the
    same, None where all models are alike. recall: of the yardstick's ``BEST`` among the first
    ``TOP``; None of fewer models than that.
    """

    models: int
    tau: float | None
    tau_loss: float | None
    recall: float | None


def rank(
    shelf: Shelf,
    linear: bool = True,
    seed: int = 0,
    tell: Tell = lambda text: None,
) -> tuple[list[Ranked], list[FittedHead]]:
    """Scores all models of a shelf, on its training images as evaluation sees them.

    linear: with heads, which are returned, too. seed: of their cross-validation.

    Raises ValueError: fewer training images than classes.
    """
    formulas.check_images(shelf.targets[shelf.splits["train"]], len(shelf.classes))
    found = []
    for i, model in enumerate(shelf.models):
        tell(f"scores {i + 1} of {len(shelf.models)}: {model.label}")
        with threads_for(shelf.record.sizes[0] * model.num_features**2):
            found.append(score_model(shelf, i))
    if not linear:
        return found, []
    heads = fit_heads(shelf, seed=seed, tell=tell)
    ranked = [
        Ranked(
            row.index,
            row.label,
            {**row.scores, YARDSTICK: head.accuracy},
            {**row.seconds, YARDSTICK: head.seconds},
            head.loss,
        )
        for row, head in zip(found, heads, strict=True)
    ]
    return ranked, heads


def score_model(shelf: Shelf, index: int) -> Ranked:
    """All cheap scores of a model."""
    train, classes = shelf.splits["train"], len(shelf.classes)
    features, targets = shelf.features(index)[0][train], shelf.targets[train]
    found, seconds = {}, {}

    def timed(name: str, compute: Callable[[], float], before: float = 0.0) -> None:
        began = time.perf_counter()
        found[name] = compute()
        seconds[name] = before + time.perf_counter() - began

    began = time.perf_counter()
    moved = moments(features, targets, classes)
    shared = time.perf_counter() - began
    timed("h_score", lambda: formulas.h_score(moved), shared)
    timed("log_me", lambda: formulas.log_me(moved), shared)
    if (head := shelf.source_head(index)) is not None:
        rows = evenly(len(targets), max(classes, MAX_PROBABILITIES // len(head[1])))
        began = time.perf_counter()
        probabilities = source_probabilities(features[rows], *head)
        shared = time.perf_counter() - began
        timed("leep", lambda: formulas.leep(probabilities, targets[rows], classes), shared)
        timed("nce", lambda: formulas.nce(probabilities, targets[rows], classes), shared)
    timed("knn", lambda: formulas.knn(features, targets, classes))
    return Ranked(index, shelf.models[index].label, found, seconds)


def ordered(rows: Sequence[Ranked], by: str) -> list[Ranked]:
    """The best first; equal accuracies of heads by their loss, other equals as they stand; models
    without this score last.

    Raises ValueError for a score that no model has.
    """
    known = [name for name in (*SCORES, YARDSTICK) if any(name in row.scores for row in rows)]
    if by not in known:
        why = f"no model has {by}" if by in (*SCORES, YARDSTICK) else f"got {by!r}"
        raise ValueError(f"by: expected one of {', '.join(known)}; {why}")
    return sorted(rows, key=lambda row: _place(row, by))


def _place(row: Ranked, by: str) -> tuple[float, float]:
    loss = row.loss if by == YARDSTICK and row.loss is not None else 0.0
    return -row.scores.get(by, -math.inf), loss


def agreements(rows: Sequence[Ranked]) -> dict[str, Agreement]:
    """Of every score that a model has with the yardstick; nothing without linear heads."""
    found = {}
    for name in SCORES:
        have = [row for row in rows if name in row.scores and YARDSTICK in row.scores]
        if not have:
            continue
        values = [row.scores[name] for row in have]
        found[name] = Agreement(
            len(have),
            kendall(values, [row.scores[YARDSTICK] for row in have]),
            kendall(values, [-row.loss for row in have]),
            recall(have, name),
        )
    return found


def kendall(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau-b; None where all of one are equal."""
    from scipy.stats import kendalltau  # here: a second of imports, for this alone

    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(kendalltau(a, b).statistic)


def recall(rows: Sequence[Ranked], name: str, best: int = BEST, top: int = TOP) -> float | None:
    """The share of the yardstick's ``best`` models that are among the first ``top`` by a score;
    None of ``top`` models or fewer."""
    if len(rows) <= top:
        return None
    true = {row.index for row in ordered(rows, YARDSTICK)[:best]}
    return len(true & {row.index for row in ordered(rows, name)[:top]}) / best
