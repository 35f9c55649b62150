"""The figure and the table of accuracy under a budget: every point is where its numbers say."""

import pytest

from hubpath_fast.report.figures.budget import accuracy_under_a_budget, budget_table
from hubpath_fast.report.style import png, svg
from hubpath_fast.tasks import Classification


def outcome(value, ms, forwards):
    return {"value": value, "milliseconds": ms, "forwards": forwards}


def both(value, ms, forwards, test=True):
    other = outcome(value - 0.1, ms + 0.5, forwards) if test else None
    return {"validation": outcome(value, ms, forwards), "test": other}


def result(test=True):
    point = lambda *values: both(*values, test=test)  # noqa: E731
    return {
        "batch": 64,
        "images": {"validation": 20, "test": 30 if test else None},
        "hub": point(0.9, 5.0, 2.0),
        "curve": [{"budget": 2.0, **point(0.7, 2.0, 1.0)}, {"budget": 4.0, **point(0.9, 3.5, 1.5)}],
        "cascades": [{"budget": 4.0, **point(0.8, 3.0, 1.25)}],
        "top_mass": [{"policy": {"top_mass": 0.9}, **point(0.88, 4.0, 1.75)}],
        "singles": [{"name": "b", **point(0.6, 2.0, 1.0)}, {"name": "a", **point(0.5, 1.0, 1.0)}],
        "ensembles": [
            {"experts": ["b"], **point(0.6, 2.0, 1.0)},
            {"experts": ["b", "a"], **point(0.65, 3.0, 2.0)},
        ],
    }


@pytest.mark.parametrize("test", [True, False])
def test_each_split_has_a_panel_with_every_point(test):
    figure = accuracy_under_a_budget(result(test), Classification.metric)
    assert len(figure.axes) == 1 + test
    drawn = {
        line.get_label(): list(zip(*(values.tolist() for values in line.get_data()), strict=True))
        for line in figure.axes[0].lines
    }
    assert drawn["hub under a budget"] == [(2.0, 0.7), (3.5, 0.9)]
    assert drawn["one expert alone"] == [(1.0, 0.5), (2.0, 0.6)]
    assert drawn["ensembles of 1 to M experts"] == [(2.0, 0.6), (3.0, 0.65)]
    assert drawn["cascade of the experts"] == [(3.0, 0.8)]
    assert drawn["hub as it is"] == [(5.0, 0.9)]
    if test:
        [line] = [li for li in figure.axes[1].lines if li.get_label() == "hub under a budget"]
        assert line.get_xdata().tolist() == [2.5, 4.0]
    assert png(figure).startswith(b"\x89PNG")
    assert svg(figure) == svg(figure)
    assert b"hub under a budget" in svg(figure)


def test_the_table_has_a_row_for_each():
    table = budget_table(result(), Classification.metric)
    cells = {
        table.rows[i][0]: [table.text(i, j) for j in range(1, 5)] for i in range(len(table.rows))
    }
    assert cells["hub, 4 ms"] == ["90.0", "80.0", "4", "1.50"]
    assert cells["hub, top-mass 0.9"] == ["88.0", "78.0", "4.5", "1.75"]
    assert cells["ensemble of 2"] == ["65.0", "55.0", "3.5", "2.00"]
    assert cells["a alone"] == ["50.0", "40.0", "1.5", "1.00"]
    assert len(cells) == 8
    alone = budget_table(result(False), Classification.metric)
    assert list(alone.columns) == ["", "validation accuracy, %", "ms", "forwards"]
