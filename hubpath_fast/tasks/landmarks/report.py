"""What a report says of landmarks beyond their measure: faces, curves, landmarks, subsets, maps.

Letters: T faces, M experts, L landmarks. Errors are shares of the task's unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ... import report
from ...report.sections import GROUPS, count, initial, largest, sample_table, share, some
from .head import OUTPUT_STRIDE
from .metrics import auc, failure_rate
from .report_maps import maps
from .report_shape import hard_landmarks
from .task import EMPTY, THRESHOLD

if TYPE_CHECKING:
    from .task import Landmarks

HUB, BEST = "Hub-Pathway", "best expert for each sample"
ALONE = ("{} alone", "single: {}")  # how an expert alone is called, of a run and of a comparison
FACES = 4  # in each line of faces
FAR = 3  # times the median: errors that are further off share a colour, so that others differ
AT = f"{100 * THRESHOLD:.0f}"  # percent, in the names of figures that depend on the threshold


def report_fields(task: Landmarks, predictions: Tensor, targets: Tensor) -> dict[str, Any]:
    """Fields of a ``report.Analysis``. predictions: [T, L, 3]. targets: [T, L, 4]."""
    errors = landmark_errors(predictions, targets)
    scores = task.scores(predictions, targets)
    worst = errors.argmax(axis=1)
    names, measure = task.layout.names, task.metric
    points = torch.stack([targets[..., :2], predictions[..., :2]], dim=1).double().numpy()
    points = points * OUTPUT_STRIDE  # pixels of the crop
    return {
        "heads": [f"{measure.title} {measure.text(score)}" for score in scores.tolist()],
        "marked": scores.numpy() > THRESHOLD,
        "marks": points,
        "details": {
            "worst landmark": [names[i] for i in worst],
            "its error": errors[np.arange(len(errors)), worst],
            "empty maps": (predictions[..., 2] < EMPTY).sum(dim=1).tolist(),
        },
        "notes": [_explained(task)],
        "own": [
            partial(faces, task),
            partial(curves, task, predictions),
            partial(hard_landmarks, task, errors, targets[..., :2].double().numpy()),
            partial(by_group, task),
            partial(maps, task, errors, points),
        ],
    }


def landmark_errors(predictions: Tensor, targets: Tensor) -> np.ndarray:
    """float64 [T, L]: the distance of each landmark, as a share of its face's unit."""
    distances = (predictions[..., :2].double() - targets[..., :2].double()).norm(dim=2)
    return (distances / targets[..., 3].double()).numpy()


def _explained(task: Landmarks) -> str:
    title = task.metric.title
    return (
        f"{title} is the distance between true and predicted landmark, the mean over the "
        f"{task.num_outputs} landmarks of a sample and then over samples, in percent "
        f"{task.measured}; numbers over another unit cannot be compared with it. FR@{AT} is the "
        f"share of samples whose {title} is above {AT} %, AUC@{AT} the area under the curve of "
        f"cumulative errors up to {AT} %, as a share of the whole."
    )


def faces(
    task: Landmarks, a: report.Analysis, figures: report.FigureFolder
) -> report.Section | None:
    """True and predicted points: worst, median and best faces."""
    if a.images is None:
        return None
    lines = chosen_faces(a.scores)
    shown = np.concatenate(list(lines.values()))
    kinds = [f", {kind}" if a.shows_groups else "" for kind in a.kinds]
    notes = [f"sample {i}{kinds[i]}" for i in shown]
    picture = figures.picture(
        "faces",
        report.samples_with_points(
            a.images(shown),
            a.marks[shown],
            a.weights[shown],
            a.expert_names,
            [a.heads[i] for i in shown],
            notes,
            {title: len(chosen) for title, chosen in lines.items()},
        ),
        sample_table(a, shown),
        f"Samples with their true and predicted landmarks, their {_error(task)}, and the experts "
        "asked with their weights.",
        "Samples with true and predicted landmarks and the experts that were asked",
    )
    figures.numbers("faces_points", _points_table(task, a.marks, shown))
    failed = int((a.scores > THRESHOLD).sum())
    text = (
        f"{count(failed, 'sample')} of {len(a.scores)} ({share(failed / len(a.scores))}) failed: "
        f"{task.metric.title} above {AT} %. The median one has "
        f"{task.metric.text(float(np.median(a.scores)))}, the worst "
        f"{task.metric.text(a.scores.max())}. All landmarks of those shown are in "
        "figures/faces_points.csv, in pixels of the picture."
    )
    return report.Section("Worst, median and best", text, [picture])


def chosen_faces(scores: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of the faces to show, by the title of their line; where there are few, all."""
    order = np.argsort(-scores, kind="stable")
    if len(order) < 3 * FACES:
        starts = range(0, len(order), FACES)
        return {
            "All, the worst first" if s == 0 else f"From rank {s + 1}": order[s : s + FACES]
            for s in starts
        }
    middle = (len(order) - FACES) // 2
    return {
        "Worst": order[:FACES],
        "About the median": order[middle : middle + FACES],
        "Best": order[-FACES:],
    }


def _points_table(task: Landmarks, points: np.ndarray, shown: np.ndarray) -> report.Table:
    columns = ["sample", "landmark", "true x", "true y", "predicted x", "predicted y"]
    rows = [
        [int(i), name, *points[i, 0, mark], *points[i, 1, mark]]
        for i in shown
        for mark, name in enumerate(task.layout.names)
    ]
    return report.Table(columns, rows)


def curves(
    task: Landmarks, predictions: Tensor, a: report.Analysis, figures: report.FigureFolder
) -> report.Section:
    """Cumulative errors of all methods, or of the run and each of its experts."""
    errors, bounds = methods(a)
    own = [form.format(name) for name in a.expert_names for form in ALONE]
    colors = sorted(errors, key=lambda name: own.index(name) if name in own else len(own))
    errors = {name: errors[name] for name in sorted(errors, key=lambda name: errors[name].mean())}
    measure = task.metric
    means, areas, rates = (
        [figure(e) for e in errors.values()]
        for figure in (np.mean, partial(auc, threshold=THRESHOLD), _failures)
    )
    picture = figures.picture(
        "cumulative_errors",
        report.cumulative_errors(
            errors,
            measure,
            THRESHOLD,
            _measured(task),
            {
                measure.label.replace(" ", "\n"): [measure.number(v) for v in means],
                f"AUC@{AT},\n%": [f"{100 * v:.2f}" for v in areas],
                f"FR@{AT},\n%": [f"{100 * v:.2f}" for v in rates],
            },
            [HUB],
            bounds,
            colors,
        ),
        report.cumulative_table(errors, THRESHOLD, f"{measure.title} at most", [HUB]),
        f"The share of samples whose {_error(task)} is at most so large"
        + (f"; dotted: {', '.join(bounds)}, no method" if bounds else "")
        + f". Best {measure.title} first.",
        "Curves of cumulative errors",
    )
    columns = ["method", measure.title, f"AUC@{AT}", f"FR@{AT}"]
    rows = [list(row) for row in zip(errors, means, areas, rates, strict=True)]
    figures.numbers("cumulative_errors_summary", report.Table(columns, rows))
    empty = float((predictions[..., 2] < EMPTY).double().mean())
    text = (
        "The further to the upper left a curve lies, the better: two methods of one mean may "
        "differ in how many samples they fail on altogether."
    )
    if empty:
        text += (
            f" {share(empty)} of Hub-Pathway's maps have no value of {EMPTY:g} anywhere: there it "
            "has found nothing."
        )
    return report.Section("Cumulative errors", text, [picture])


def _failures(errors: np.ndarray) -> float:
    return failure_rate(errors, THRESHOLD)


def _measured(task: Landmarks) -> str:
    """The measure on an axis."""
    return f"{task.metric.label} {task.measured}"


def _error(task: Landmarks) -> str:
    """The measure in a sentence."""
    return f"{task.metric.title} ({task.metric.unit} {task.measured})"


def methods(a: report.Analysis) -> tuple[dict[str, np.ndarray], list[str]]:
    """Errors [T] of what is compared, by name: of a comparison its methods, of a run its hub, each
    of its experts alone and the best of them for each face. And which of them are bounds."""
    compared: Mapping[str, Any] = a.scores_of() if a.scores_of is not None else {}
    if compared:
        bounds = [row.name for row in a.rows if row.bound and row.name in compared]
        return {name: np.asarray(e, np.float64) for name, e in compared.items()}, bounds
    alone = {ALONE[0].format(name): a.scores_alone[i] for i, name in enumerate(a.expert_names)}
    if len(alone) < len(a.expert_names):  # equal names
        alone = {
            ALONE[0].format(f"{i} {n}"): a.scores_alone[i] for i, n in enumerate(a.expert_names)
        }
    best = {BEST: a.oracle} if len(alone) > 1 else {}
    return {HUB: a.scores, **alone, **best}, list(best)


def by_group(
    task: Landmarks, a: report.Analysis, figures: report.FigureFolder
) -> report.Section | None:
    """The error of each method on each subset."""
    groups = {f"all {a.data_name}": np.ones(len(a.scores), bool), **a.members()}
    if len(groups) < 3:
        return None
    errors, bounds = methods(a)
    matrix = np.array([[e[mask].mean() for mask in groups.values()] for e in errors.values()])
    names = list(groups)
    hub = list(errors).index(HUB) if HUB in errors else 0
    kept = [0, *(i + 1 for i in largest(matrix[hub, 1:], GROUPS // 2))]
    measure = task.metric
    picture = figures.picture(
        "error_by_group",
        report.measure_by_group(
            matrix[:, kept],
            list(errors),
            [names[i] for i in kept],
            measure,
            a.group_label,
            [i for i, name in enumerate(errors) if name in bounds],
            (matrix.min(), min(matrix.max(), FAR * np.median(matrix))),
        ),
        report.matrix_table(matrix, list(errors), names, "method"),
        f"{_error(task)} of each method (rows) on the samples of each {a.group_label} (columns); "
        "the smallest of a column is bold."
        + some(kept[1:], names[1:], "those on which Hub-Pathway's error is largest"),
        f"Heat map: {measure.title} by method and {a.group_label}",
    )
    rows = [
        [
            name,
            int(mask.sum()),
            float(a.scores[mask].mean()),
            failure_rate(a.scores[mask], THRESHOLD),
            auc(a.scores[mask], THRESHOLD),
        ]
        for name, mask in groups.items()
    ]
    columns = [a.group_label, "samples", measure.label, f"FR@{AT}", f"AUC@{AT}"]
    table = report.Table(
        columns,
        [rows[i] for i in kept],
        formats={measure.label: measure.number, columns[3]: share, columns[4]: share},
        caption=f"Hub-Pathway by {a.group_label}.",
    )
    text = "A sample may be in several, or in none. " if a.subsets else ""
    text += "Whom Hub-Pathway asks about which is shown under “Which experts are asked”."
    return report.Section(f"{initial(measure.title)} by {a.group_label}", text, [picture, table])
