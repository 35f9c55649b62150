"""Learning curves over seeds, and figures with intervals: what is drawn are the numbers given."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from support.drawn import assert_readable, texts

from hubpath_fast import report
from hubpath_fast.report import style

STEPS = [4000, 8000]


def curve(level: float, seeds: int = 2, look: int = 0) -> report.LearningCurve:
    """Seeds at level, level + 10, ... that rise by 5; the band is 1 around the mean."""
    values = np.array([[level + 10 * i, level + 10 * i + 5] for i in range(seeds)])
    mean = values.mean(axis=0)
    return report.LearningCurve(STEPS, values, mean, mean - 1, mean + 1, look)


def lines(axes, **look) -> list[list[float]]:
    """Values of the lines with this look, along the whole axes."""
    found = [
        line for line in axes.lines if all(getattr(line, f"get_{k}")() == look[k] for k in look)
    ]
    return [list(line.get_ydata()) for line in found]


class TestLearningCurves:
    def test_a_panel_has_mean_band_seeds_and_references(self):
        curves = {"from scratch": curve(20, 3, look=6), "Hub-Pathway": curve(40)}
        references = {"random": 18.0, "human": 7000.0}
        figure = report.learning_curves(curves, "score on x", references, "from scratch")
        scratch, hub = figure.axes
        assert [axes.get_title(loc="left") for axes in figure.axes] == list(curves)
        assert lines(hub, linewidth=2.0, color=style.look(0).color) == [[45, 50]]
        assert lines(hub, linewidth=0.7) == [[40, 45], [50, 55]]
        assert lines(scratch, linewidth=0.7) == [[20, 25], [30, 35], [40, 45]]
        assert lines(scratch, linewidth=2.0, color=style.look(6).color) == [[30, 35]]
        assert lines(hub, linestyle=":") == [[30, 35]]  # from scratch, beside it
        assert lines(scratch, linestyle=":") == []
        assert lines(hub, linestyle="--") == [[18, 18]]
        [band] = [found for found in hub.collections if isinstance(found, PolyCollection)]
        assert set(band.get_paths()[0].vertices[:, 1]) == {44, 46, 49, 51}
        assert hub.get_ylim() == scratch.get_ylim()
        assert hub.get_ylim()[1] < 100  # the human is written, not drawn
        [legend] = figure.legends
        assert [text.get_text() for text in legend.texts] == [
            "from scratch, mean", "random (18)", "human (7,000, far above)",
        ]  # fmt: skip
        assert scratch.get_ylabel() == "score on x"
        assert hub.get_xlabel() == "step"

    def test_a_reference_within_reach_is_drawn(self):
        figure = report.learning_curves({"a": curve(40)}, "score", {"random": 10.0, "human": 80.0})
        assert lines(figure.axes[0], linestyle="-.") == [[80, 80]]
        assert figure.axes[0].get_ylim()[1] >= 80

    def test_one_seed_has_no_band(self):
        nothing = np.full(2, math.nan)
        one = report.LearningCurve(STEPS, [[1.0, 2.0]], [1.0, 2.0], nothing, nothing)
        figure = report.learning_curves({"a": one}, "score")
        assert not figure.axes[0].collections
        assert not figure.legends

    @pytest.mark.parametrize("count", [1, 7])
    def test_its_texts_are_readable(self, count):
        names = ["from scratch", "fine-tuned from seaquest", "fine-tuned from kung_fu_master"]
        names += [f"method {i}" for i in range(count)]
        curves = {name: curve(20.0 + i) for i, name in enumerate(names[:count])}
        figure = report.learning_curves(curves, "score on x", {"random": 1.0}, "from scratch")
        found = [axes._left_title for axes in figure.axes]
        for axes in figure.axes:
            if axes.axison and axes.get_xlabel():
                low, high = axes.get_xlim()
                ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
                found += [axes.xaxis.label, *(text for at, text in ticks if low <= at <= high)]
        assert_readable(figure, found)
        assert sum(bool(axes.axison and axes.get_xlabel()) for axes in figure.axes) == min(count, 4)

    def test_the_table_has_every_seed(self):
        curves = {"a": curve(20), "b": curve(40)}
        table = report.learning_table(curves, {"a": (0, 1), "b": (1, 7)}, "method")
        assert list(table.columns) == [
            "method", "step", "mean", "low", "high", "seed 0", "seed 1", "seed 7",
        ]  # fmt: skip
        assert table.rows[1] == ["a", 8000, 30, 29, 31, 25, 35, None]
        assert table.rows[2] == ["b", 4000, 45, 44, 46, None, 40, 50]

    @pytest.mark.parametrize(
        ("curves", "said"),
        [
            ({}, "curves is empty"),
            ({"a": curve(1)._replace(steps=[1])}, r"curves\['a'\] has seeds of shape \[2, 2\]"),
            ({"a": curve(1)._replace(seeds=[1.0, 2.0])}, r"seeds has shape \[2\]"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, curves, said):
        with pytest.raises(ValueError, match=said):
            report.learning_curves(curves, "score")


class TestIntervalBars:
    ROWS = (
        report.IntervalBar("from scratch", 10.0, 8.0, 15.0, (8.0, 15.0), look=6),
        report.IntervalBar("Hub-Pathway", None, note="not finished"),
        report.IntervalBar("one seed", -2.0),
    )

    def test_bars_whiskers_and_points(self):
        columns = {"score": ["10", "–", "-2"]}
        figure = report.interval_bars(self.ROWS, "points", columns, {"human": 12.0, "god": 99.0})
        [axes] = figure.axes
        assert [patch.get_width() for patch in axes.patches] == [10.0, -2.0]
        assert [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"] == [
            [8.0, 15.0]
        ]
        [whisker] = [c.get_segments()[0] for c in axes.collections]
        assert [tuple(point) for point in whisker] == [(8.0, 0.0), (15.0, 0.0)]
        assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "--"] == [
            [12.0, 12.0]
        ]
        assert "human" in texts(axes)
        assert "god" not in texts(axes)
        assert "not finished" in texts(axes)
        low, high = axes.get_xlim()
        assert low < -2
        assert 15 < high < 20

    def test_dots_have_a_line_from_their_base(self):
        rows = [report.IntervalBar("a", 0.75, 0.6, 0.9)]
        figure = report.interval_bars(rows, "p", {"p": ["0.75"]}, base=0.5, limits=(0, 1))
        [axes] = figure.axes
        assert not axes.patches
        assert [0.5, 0.75] in [list(line.get_xdata()) for line in axes.lines]
        assert axes.get_xlim() == (0, 1)

    @pytest.mark.filterwarnings("error")
    def test_scores_of_0_alone_have_an_axis(self):
        [axes] = report.interval_bars([report.IntervalBar("scratch", 0.0)], "points", {}).axes
        assert axes.get_xlim() == (0.0, 1.0)

    def test_no_rows_are_refused(self):
        with pytest.raises(ValueError, match="rows is empty"):
            report.interval_bars([], "points", {})
