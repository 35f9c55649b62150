"""What stands behind a point: the map of each expert that was asked, and the hub's.

Letters: M experts, L landmarks, h x w cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ... import report
from ...report.arrays import to_array
from .head import OUTPUT_STRIDE
from .maps import decode

if TYPE_CHECKING:
    from .task import Landmarks


def maps(
    task: Landmarks,
    errors: np.ndarray,
    points: np.ndarray,
    a: report.Analysis,
    figures: report.FigureFolder,
) -> report.Section | None:
    """Of the median and the worst face the landmark that is found worst.

    errors: [T, L]. points: true and predicted ones, [T, 2, L, 2], in pixels.
    """
    if a.outputs is None or a.images is None:
        return None
    order = np.argsort(a.scores, kind="stable")
    chosen = {"Median": order[(len(order) - 1) // 2], "Worst": order[-1]}
    if len(order) == 1:
        chosen.pop("Median")
    shown = np.array(list(chosen.values()))
    outputs = a.outputs(shown)
    if outputs is None:
        return None
    experts, hub = (to_array("outputs", part) for part in outputs)
    found, rows = [], []
    for n, (title, i) in enumerate(chosen.items()):
        mark = int(errors[i].argmax())
        asked = np.flatnonzero(a.weights[i] > 0)
        own = experts[n, asked, mark].astype(np.float64)
        whole = hub[n, mark].astype(np.float64)
        true, predicted = points[i, :, mark] / OUTPUT_STRIDE
        head = (
            f"{title} sample ({i}): landmark {task.layout.names[mark]}, error "
            f"{task.metric.text(errors[i, mark])}"
        )
        found.append(
            report.Maps(asked.tolist(), a.weights[i, asked], own, whole, true, predicted, head)
        )
        named = [(a.expert_names[e], a.weights[i, e]) for e in asked] + [("the hub", None)]
        for (name, weight), values in zip(named, [*own, whole], strict=True):
            place, highest = decode(torch.from_numpy(values)[None, None])
            x, y = place[0, 0].tolist()
            low, high = float(values.min()), float(highest)
            rows.append([int(i), task.layout.names[mark], name, weight, x, y, *true, low, high])
    columns = ["sample", "landmark", "map of", "weight", "x", "y", "true x", "true y"]
    picture = figures.picture(
        "maps",
        report.maps_of_experts(a.images(shown), found, a.expert_names),
        report.Table([*columns, "minimum", "maximum"], rows),
        "The map of each expert that was asked for one landmark, the one of the sample that is "
        "found worst, and what the aggregator makes of all their maps. Below each map are its "
        "smallest and its largest value. The CSV has each map's own point, in cells of the map.",
        "Maps of the experts asked and of the hub for one landmark",
    )
    text = (
        "A landmark is where the hub's map is largest. The aggregator sees the maps of all "
        "landmarks of all experts asked, each times its expert's weight; taught are bumps of "
        "height 1."
    )
    return report.Section("From maps to a landmark", text, [picture])
