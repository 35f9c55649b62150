"""A figure refuses arguments that it cannot draw, and says which one."""

from __future__ import annotations

import pytest
from support.drawn import ACCURACY

from hubpath_fast import report

TWO_LOADS = [{"step": 1, "load": [0.5, 0.5]}, {"step": 2, "load": [1.0]}]
OTHER_M = {"step": 1, "load": [1.0], "mean_weight": [0.5, 0.5]}
AB = ["a", "b"]

MAP, GROUPS, CURVES = report.mean_weights, report.measure_by_group, report.training_curves
COST, OVER_K, BARS = report.measure_against_cost, report.measure_over_k, report.measure_bars
QUALITY, WEIGHTS, COUNTS = report.weight_quality, report.weight_bars, report.count_matrix

REFUSED = [
    (MAP, ([[0.1, 0.2, 0.7]], ["r"], AB), "expert_names has 2 entries, but there are 3"),
    (MAP, ([[0.1]], ["r", "s"], ["a"]), "row_names has 2 entries, but there are 1"),
    (MAP, ([0.1, 0.2, 0.7], ["r"], ["a"]), r"matrix has shape \[3\]"),
    (MAP, ([[0.1], [0.2, 0.7]], ["r", "s"], ["a"]), "matrix is ragged"),
    (MAP, ([["x"]], ["r"], ["a"]), "matrix holds what is not a number"),
    (GROUPS, ([[93.5]], ["m"], ["g"], ACCURACY), r"matrix: expected accuracy in 0\.\.1, got 93\.5"),
    (report.heat_map, ([[1.0, 2.0]], ["r"], AB, "", "", "", None, [True]), r"bold has shape \[1\]"),
    (CURVES, ([], [], ACCURACY), "history has no record"),
    (CURVES, ([{"step": 1, "grad_norm": 1.0}], [], ACCURACY), "history has nothing to draw"),
    (CURVES, (TWO_LOADS[:1], ["a"], ACCURACY), "expert_names has 1 entries, but there are 2"),
    (CURVES, (TWO_LOADS, AB, ACCURACY), "history's load is ragged"),
    (CURVES, ([OTHER_M], AB, ACCURACY), "load and mean_weight are of"),
    (report.pareto_front, ([1, 2], [0.5], ACCURACY), r"costs has shape \[2\], values \[1\]"),
    (COST, ([{"name": "a", "value": None}], ACCURACY), "no method with a value of accuracy"),
    (COST, ([{"name": "a", "value": 0.5}], ACCURACY), "a has a value but no forwards"),
    (BARS, ([], ACCURACY), "rows is empty"),
    (BARS, ([{"name": "a", "value": 93.5}], ACCURACY), r"rows\[0\]: expected accuracy .* got 93"),
    (BARS, ([{"name": "a", "value": 0.5, "spread": -1}], ACCURACY), r"rows\[0\] has spread -1"),
    (BARS, ([{"name": "a", "value": 0.5, "forwards": 0}], ACCURACY), "forwards 0; .* above 0"),
    (BARS, ([{"name": "a", "value": "x"}], ACCURACY), "value 'x'; give a number or None"),
    (BARS, ([{"name": "a", "acuracy": 0.5}], ACCURACY), "unknown key 'acuracy'"),
    (OVER_K, ({}, ACCURACY), "values_by_k is empty"),
    (OVER_K, ({1: [0.5]}, ACCURACY, 0), "k is 0"),
    (QUALITY, ([[1, 0]], [[1, 1]], ACCURACY), r"weights has shape \[1, 2\] and scores \[1, 2\]"),
    (QUALITY, ([[1, 0]], [[2], [0]], ACCURACY), r"scores: expected accuracy in 0\.\.1, got 2"),
    (report.quality_bars, ([], [], ACCURACY), "qualities is empty"),
    (WEIGHTS, ([0.5], [0.5, 0.5], ["a"]), r"mean has shape \[1\] and asked \[2\]"),
    (WEIGHTS, ([0.5], [50.0], ["a"]), r"asked: expected fraction in 0\.\.1, got 50"),
    (COUNTS, ([[1, 2]], ["a"]), r"counts has shape \[1, 2\]; give a square"),
    (COUNTS, ([[1, 2], [3, 4]], AB, [1]), r"others has shape \[1\]"),
]


@pytest.mark.parametrize(("draw", "arguments", "message"), REFUSED)
def test_errors_name_the_argument(draw, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(*arguments)
