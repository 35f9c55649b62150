"""Which landmarks are found well: errors drawn on the mean shape.

Letters: T faces, L landmarks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ... import report
from ...report.sections import share

if TYPE_CHECKING:
    from .task import Landmarks

ROUNDS = 3  # of turning every face to the mean, which after the second hardly moves
HARDEST = 10  # landmarks in the table


def mean_shape(points: np.ndarray) -> np.ndarray:
    """[L, 2]: the mean of shapes [T, L, 2] that are brought to one place, size and turn.

    Size is the root of the mean square of the distances from the shape's middle, so that the mean
    has about 1; the turn is the faces' own on average.
    """
    shapes = points[..., 0] + 1j * points[..., 1]
    shapes = shapes - shapes.mean(axis=1, keepdims=True)
    sizes = np.sqrt((np.abs(shapes) ** 2).mean(axis=1, keepdims=True))
    shapes = shapes / np.where(sizes > 0, sizes, 1.0)
    mean = shapes.mean(axis=0)
    for _ in range(ROUNDS):
        match = (np.conj(shapes) * mean).sum(axis=1, keepdims=True)
        size = np.abs(match)
        turned = shapes * np.where(size > 0, match, 1.0) / np.where(size > 0, size, 1.0)
        # Turning all of them alike changes nothing: the mean keeps the faces' own turn.
        mean = turned.mean(axis=0)
    return np.stack([mean.real, mean.imag], axis=1)


def hard_landmarks(
    task: Landmarks,
    errors: np.ndarray,
    points: np.ndarray,
    a: report.Analysis,
    figures: report.FigureFolder,
) -> report.Section:
    """errors: [T, L]. points: true ones [T, L, 2]."""
    from .task import THRESHOLD

    names, shape, means = task.layout.names, mean_shape(points), errors.mean(axis=0)
    beyond = (errors > THRESHOLD).mean(axis=0)
    columns = ["landmark", "x", "y", "mean error", "median error", "90th percentile"]
    columns.append(f"share of samples above {100 * THRESHOLD:.0f} %")
    spread = np.quantile(errors, [0.5, 0.9], axis=0)
    rows = [[name, *shape[i], means[i], *spread[:, i], beyond[i]] for i, name in enumerate(names)]
    label = f"mean error, {task.metric.unit} {task.measured}"
    picture = figures.picture(
        "error_by_landmark",
        report.values_on_shape(shape, means, names, label, task.metric.scale),
        report.Table(columns, rows),
        f"The mean error of each landmark, in {task.metric.unit} {task.measured}, on the mean of "
        "the true shapes, which are brought to one place, size and turn.",
        "The mean shape, each landmark in the colour of its error",
    )
    order = np.argsort(-means, kind="stable")
    shown = ["landmark", *columns[3:]]
    number = task.metric.number
    table = report.Table(
        shown,
        [[rows[i][0], *rows[i][3:]] for i in order[:HARDEST]],
        formats={**dict.fromkeys(shown[1:4], number), shown[4]: share},
        caption=f"The landmarks that are found worst; errors in {task.metric.unit}.",
    )
    worst, best = order[0], order[-1]
    text = (
        f"Landmark {names[worst]} is found worst, with a mean error of "
        f"{task.metric.text(means[worst])}, landmark {names[best]} best, with "
        f"{task.metric.text(means[best])}."
    )
    return report.Section("Which landmarks are hard", text, [picture, table])
