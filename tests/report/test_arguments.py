"""A figure refuses arguments that it cannot draw, and says which one."""

from __future__ import annotations

import numpy as np
import pytest
from support.drawn import ACCURACY

from hubpath_fast import report

ABSENT = {"name": "absent", "value": None}
NO_COST = {"name": "a", "value": 0.5}
TWO_LOADS = [{"step": 1, "load": [0.5, 0.5]}, {"step": 2, "load": [1.0]}]
OTHER_M = {"step": 1, "load": [1.0], "mean_weight": [0.5, 0.5]}
AB = ["a", "b"]


@pytest.mark.parametrize(
    ("draw", "arguments", "message"),
    [
        (report.mean_weights, ([[0.1, 0.2, 0.7]], ["r"], AB), "expert_names has 2 .* there are 3"),
        (report.mean_weights, ([[0.1]], ["r", "s"], ["a"]), "row_names has 2 .* there are 1"),
        (report.mean_weights, ([0.1, 0.2, 0.7], ["r"], ["a"]), r"matrix has shape \[3\]"),
        (report.mean_weights, ([[0.1], [0.2, 0.7]], ["r", "s"], ["a"]), "matrix is ragged"),
        (report.mean_weights, ([["x"]], ["r"], ["a"]), "matrix holds what is not a number"),
        (
            report.measure_by_group,
            ([[93.5]], ["m"], ["g"], ACCURACY),
            r"matrix: expected accuracy in 0\.\.1, got 93\.5",
        ),
        (
            report.heat_map,
            ([[1.0, 2.0]], ["r"], AB, "", "", "", None, [True]),
            r"bold has shape \[1\]",
        ),
        (report.training_curves, ([], [], ACCURACY), "history has no record"),
        (report.training_curves, ([{"step": 1, "grad_norm": 1.0}], [], ACCURACY), "has nothing"),
        (report.training_curves, (TWO_LOADS[:1], ["a"], ACCURACY), "expert_names has 1 entries"),
        (report.training_curves, (TWO_LOADS, AB, ACCURACY), "history's load is ragged"),
        (report.training_curves, ([OTHER_M], AB, ACCURACY), "load and mean_weight are of"),
        (
            report.pareto_front,
            ([1, 2], [0.5], ACCURACY),
            r"costs has shape \[2\], values \[1\]",
        ),
        (
            report.measure_against_cost,
            ([ABSENT], ACCURACY),
            "rows has no method with a value of accuracy",
        ),
        (report.measure_against_cost, ([NO_COST], ACCURACY), "a has a value but no forwards"),
        (report.measure_over_k, ({}, ACCURACY), "values_by_k is empty"),
        (report.measure_over_k, ({1: [0.5]}, ACCURACY, 0), "k is 0"),
        (
            report.weight_quality,
            ([[1.0, 0]], np.array([[1, 1]]), ACCURACY),
            r"weights has shape \[1, 2\] and scores \[1, 2\]",
        ),
        (
            report.weight_quality,
            ([[1.0, 0]], np.array([[2], [0]]), ACCURACY),
            r"scores: expected accuracy in 0\.\.1, got 2",
        ),
        (report.quality_bars, ([], [], ACCURACY), "qualities is empty"),
        (report.weight_bars, ([0.5], [0.5, 0.5], ["a"]), r"mean has shape \[1\] and asked \[2\]"),
        (report.weight_bars, ([0.5], [50.0], ["a"]), "asked: expected fraction in 0..1, got 50"),
        (report.count_matrix, ([[1, 2]], ["a"]), r"counts has shape \[1, 2\]; give a square"),
        (report.count_matrix, ([[1, 2], [3, 4]], AB, [1]), r"others has shape \[1\]"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(draw, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(*arguments)
