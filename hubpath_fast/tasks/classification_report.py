"""What a report says of a classification beyond its measure: which class is taken for which.

Letters: T samples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import report
from ..files import printable
from ..report.sections import count, share
from .classification import balanced_accuracy

MOST_CLASSES = 20  # of a matrix whose cells can be read
PAIRS = 10  # most confused classes in the table


def report_fields(classes: Sequence[str], predictions: Tensor, targets: Tensor) -> dict[str, Any]:
    """Fields of a ``report.Analysis``: samples' heads and details, groups and the own section.

    predictions: float [T, C]. targets: int [T]. The groups are the classes; give others instead
    where the data has some.
    """
    classes, guesses = [printable(name) for name in classes], predictions.argmax(dim=1)
    truth = [classes[i] for i in targets.tolist()]
    guess = [classes[i] for i in guesses.tolist()]
    return {
        "heads": sample_heads(truth, guess),
        "marked": guesses != targets,
        "details": {"true class": truth, "prediction": guess},
        "groups": targets,
        "group_names": classes,
        "group_label": "true class",
        "own": [partial(confusion, confusion_counts(targets, guesses, len(classes)), classes)],
    }


def sample_heads(truths: Sequence[Any], guesses: Sequence[Any]) -> list[list[str]]:
    """What stands above the picture of each sample, in parts."""
    return [
        [f"✓ {truth}"] if truth == guess else [f"✗ predicted {guess}", f"is {truth}"]
        for truth, guess in zip(truths, guesses, strict=True)
    ]


class Confusion(NamedTuple):
    """``count`` samples of class ``true`` predicted as ``predicted``; both are class numbers."""

    true: int
    predicted: int
    count: int


def confusion_counts(targets: Tensor, prediction: Tensor, num_classes: int) -> np.ndarray:
    """int64 [C, C]: samples by true class (rows) and predicted class (columns)."""
    pairs = (targets.long() * num_classes + prediction.long()).numpy()
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def most_confused(counts: np.ndarray) -> list[Confusion]:
    """The wrong pairs of classes, most frequent first (then the larger share of the true class,
    then class order)."""
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    totals = counts.sum(axis=1)
    pairs = [Confusion(int(i), int(j), int(wrong[i, j])) for i, j in np.argwhere(wrong)]
    return sorted(pairs, key=lambda p: (-p.count, -p.count / totals[p.true], p.true, p.predicted))


def shown_classes(counts: np.ndarray, limit: int = MOST_CLASSES) -> list[int]:
    """At most ``limit`` classes, ascending: all where they fit, otherwise those of the most
    confused pairs, and the first ones where nothing was confused."""
    if len(counts) <= limit:
        return list(range(len(counts)))
    found: list[int] = []
    for pair in most_confused(counts):
        new = [c for c in (pair.true, pair.predicted) if c not in found]
        if len(found) + len(new) <= limit:
            found += new
    return sorted(found) or list(range(limit))


def confusion(
    counts: np.ndarray,
    classes: Sequence[str],
    analysis: report.Analysis,
    figures: report.FigureFolder,
) -> report.Section:
    total, errors = int(counts.sum()), int(counts.sum() - np.trace(counts))
    kept = shown_classes(counts)
    inner = counts[np.ix_(kept, kept)]
    others = None
    caption = (
        "Samples by true class (rows) and predicted class (columns). Wrong predictions are the "
        "darker the more there are."
    )
    if len(kept) < len(classes):
        others = counts[kept].sum(axis=1) - inner.sum(axis=1)
        seen = int(inner.sum() - np.trace(inner))
        caption += (
            f" Shown are {len(kept)} of {len(classes)} classes, at most {MOST_CLASSES}, chosen "
            f"from the most confused pairs; {seen} of {count(errors, 'error')} lie between "
            "them. The CSV has all classes."
        )
    names = [classes[i] for i in kept]
    labels = ("true class", "predicted class", "wrong predictions")
    items: list[Any] = [
        figures.picture(
            "confusion",
            report.count_matrix(inner, names, others, *labels),
            report.Table(
                ["true class", *classes],
                [[name, *line] for name, line in zip(classes, counts.tolist(), strict=True)],
            ),
            caption,
            "Confusion matrix of true and predicted classes",
        )
    ]
    totals = counts.sum(axis=1)
    pairs = [
        [classes[p.true], classes[p.predicted], p.count, p.count / totals[p.true]]
        for p in most_confused(counts)[:PAIRS]
    ]
    if pairs:
        columns = ["true class", "predicted as", "samples", "share of the true class"]
        formats = {columns[3]: share}
        items.append(report.Table(columns, pairs, (), formats, "Most confused classes"))
    text = (
        f"Hub-Pathway is wrong on {errors} of {count(total, f'{analysis.split} sample')} "
        f"({share(errors / total)})."
    )
    balanced = balanced_accuracy(
        torch.from_numpy(counts.diagonal().copy()), torch.from_numpy(totals)
    )
    if balanced is not None:
        text += (
            f" Balanced accuracy, the mean over the classes of the share that is right, is "
            f"{share(balanced)}, where accuracy is {share(1 - errors / total)}: the largest class "
            f"has {totals.max()} samples, the smallest {totals[totals > 0].min()}."
        )
    return report.Section("What is taken for what", text, items)
