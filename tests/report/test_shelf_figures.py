"""The figures of a shelf: every dot and every line is where its numbers say."""

import math

import numpy as np
import pytest
from support.drawn import assert_readable, texts

from hubpath_fast.report.figures.cost import measure_against_cost
from hubpath_fast.report.figures.elimination import Left, elimination_curve, elimination_table
from hubpath_fast.report.figures.scores import scores_against
from hubpath_fast.tasks import Classification

METRIC = Classification.metric
ACCURACIES = [0.3, 0.6, 0.9, 0.5]
NETWORKS = ["resnet", "nfnet", "resnet", "nfnet"]


def points(axes):
    """The dots of a panel, by their colour."""
    found = {}
    for line in axes.lines:
        found[line.get_color()] = sorted(zip(*(v.tolist() for v in line.get_data()), strict=True))
    return found


class TestScores:
    def figure(self, **more):
        scores = {"LogME": [1.0, 2.0, 3.0, 4.0], "LEEP": [-1.0, None, math.nan, -2.0]}
        return scores_against(scores, ACCURACIES, METRIC, NETWORKS, **more)

    def test_every_model_is_a_dot_in_the_colour_of_its_group(self):
        first, second = self.figure().axes[:2]
        resnet, nfnet = points(first).values()
        assert resnet == [(1.0, 0.3), (3.0, 0.9)]
        assert nfnet == [(2.0, 0.6), (4.0, 0.5)]
        assert list(points(second).values()) == [[(-1.0, 0.3)], [(-2.0, 0.5)]]

    def test_panels_share_the_yardstick_and_say_which_score_it_is(self):
        figure = self.figure(notes={"LogME": "tau 0.33"})
        first, second = figure.axes[:2]
        assert first.get_xlabel() == "LogME"
        assert first.get_ylim() == second.get_ylim()
        assert first.get_ylabel() == METRIC.label
        assert texts(first) == ["tau 0.33"]
        assert texts(second) == []
        [legend] = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["resnet", "nfnet"]
        assert_readable(figure, [*first.texts, *legend.get_texts(), first.xaxis.label])

    def test_the_axis_says_whose_accuracy_it_is(self):
        assert self.figure(label="of a head, %").axes[0].get_ylabel() == "of a head, %"

    def test_wrong_arguments_are_named(self):
        with pytest.raises(ValueError, match="scores is empty"):
            scores_against({}, ACCURACIES, METRIC, NETWORKS)
        with pytest.raises(ValueError, match=r"scores\['LEEP'\] has 2 models, expected 4"):
            scores_against({"LEEP": [1, 2]}, ACCURACIES, METRIC, NETWORKS)
        with pytest.raises(ValueError, match="groups has 1 entries"):
            scores_against({"LEEP": [1, 2, 3, 4]}, ACCURACIES, METRIC, ["resnet"])
        many, values = [str(i) for i in range(9)], np.linspace(0, 1, 9)
        with pytest.raises(ValueError, match="groups: expected at most 8"):
            scores_against({"LEEP": values}, values, METRIC, many)


class TestCost:
    ROWS = (
        {"name": "two", "value": 0.9, "forwards": 2},
        {"name": "other", "value": 0.8, "forwards": 2},
        {"name": "one", "value": 0.85, "forwards": 1},
        {"name": "oracle", "value": 1.0, "forwards": 1, "bound": True},
    )

    def names(self, named):
        figure = measure_against_cost(self.ROWS, METRIC, named)
        return [text.get_text() for text in figure.legends[-1].get_texts()]

    def test_named_methods_have_a_number_off_the_front_too(self):
        assert self.names(()) == ["1  one", "2  two"]
        assert self.names(["other", "oracle"]) == ["1  one", "2  other", "3  two"]

    def test_methods_that_would_cover_each_other_share_a_number(self):
        rows = [*self.ROWS, {"name": "near", "value": 0.899, "forwards": 2}]
        figure = measure_against_cost(rows, METRIC, ["near"])
        names = [text.get_text() for text in figure.legends[-1].get_texts()]
        assert names == ["1  one", "2  two, near"]

    def test_the_axis_says_what_a_sample_is(self):
        plot = measure_against_cost(self.ROWS, METRIC, sample="image").axes[0]
        assert plot.get_xlabel() == "expert forwards per image at inference"

    def test_numbers_of_two_digits_lie_within_their_markers(self):
        rows = [{"name": str(i), "value": i / 20, "forwards": i} for i in range(1, 13)]
        figure = measure_against_cost(rows, METRIC)
        figure.canvas.draw()
        numbers = figure.axes[0].texts
        assert [text.get_text() for text in numbers] == [str(i) for i in range(1, 13)]
        marker = 11 * figure.dpi / 72  # pixels across
        assert all(text.get_window_extent().width < marker for text in numbers)

    def test_the_front_ends_with_the_costliest_method(self):
        rows = [*self.ROWS, {"name": "all", "value": 0.5, "forwards": 200}]
        axes = measure_against_cost(rows, METRIC).axes[0]
        assert max(max(line.get_xdata()) for line in axes.lines) == 200 < axes.get_xlim()[1]


class TestElimination:
    HUBS = (Left(3, 0.0, -0.1, 0.1, "c"), Left(2, 0.25, 0.0, 0.5, "a"), Left(1, 4.0, 3.0, 5.0, "b"))

    def test_the_line_falls_to_the_right_and_the_proposal_is_marked(self):
        axes = elimination_curve(self.HUBS, 0.5, 2).axes[0]
        line, limit, ring = axes.lines
        assert list(zip(*line.get_data(), strict=True)) == [(3, 0.0), (2, 0.25), (1, 4.0)]
        assert set(limit.get_ydata()) == {0.5}
        assert list(zip(*ring.get_data(), strict=True)) == [(2, 0.25)]
        start, end = axes.get_xlim()
        assert start > 3 > 1 > end
        assert len(elimination_curve(self.HUBS, 0.5).axes[0].lines) == 2

    def test_hundreds_of_experts_have_room(self):
        hubs = [Left(n, 10 / n) for n in range(199, 1, -1)]
        figure = elimination_curve(hubs, 0.5, 20)
        assert figure.axes[0].get_xscale() == "log"
        axes = figure.axes[0]
        assert_readable(figure, [*figure.legends[0].get_texts(), *axes.get_xticklabels()])

    @pytest.mark.parametrize(
        ("most", "ticks"),
        [(32, [2, 5, 10, 20, 32]), (51, [2, 5, 10, 20, 51]), (199, [2, 5, 10, 20, 50, 100, 199])],
    )
    def test_both_ends_of_the_axis_have_their_number(self, most, ticks):
        axes = elimination_curve([Left(n, 10 / n) for n in range(most, 1, -1)], 0.5).axes[0]
        assert axes.get_xticks().tolist() == ticks

    def test_the_band_says_its_level(self):
        figure = elimination_curve(self.HUBS, 0.5, level=0.9)
        assert figure.legends[0].get_texts()[0].get_text() == "90 % interval"

    def test_the_table_has_the_numbers_of_the_line(self):
        table = elimination_table(self.HUBS)
        assert table.rows[1] == ["a", 2, 0.25, 0.0, 0.5]

    def test_without_hubs_there_is_nothing_to_draw(self):
        with pytest.raises(ValueError, match="hubs is empty"):
            elimination_curve([], 0.5)
