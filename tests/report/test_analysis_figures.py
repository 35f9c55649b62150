"""The figures of an analysis show the numbers given; their texts neither overlap nor leave."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from support.drawn import ACCURACY, ERROR, FIVE, TEN, assert_readable, texts

from hubpath_fast import report
from hubpath_fast.report import style


class TestParetoFront:
    def test_bounds_beat_nobody_and_ties_share_the_front(self):
        costs, right = [1, 2, 2, 3, 2, 5, 1], [0.5, 0.9, 0.9, 0.9, 0.8, 0.95, 0.4]
        front = report.pareto_front(costs, right, ACCURACY, [True] * 5 + [False, True])
        assert front.tolist() == [True, True, True, False, False, False, False]
        front = report.pareto_front([5, 3], [0.9, 0.9], ACCURACY, [True, False])
        assert front.tolist() == [True, False]

    @pytest.mark.parametrize("measure", [ACCURACY, ERROR])
    def test_is_the_definition(self, measure):
        rng = np.random.default_rng(0)
        costs, values = rng.integers(1, 6, 40), rng.integers(0, 8, 40) / 8
        merits = values if measure is ACCURACY else -values
        front = report.pareto_front(costs, values, measure)
        for i in range(40):
            beaten = any(
                costs[j] <= costs[i]
                and merits[j] >= merits[i]
                and (costs[j] < costs[i] or merits[j] > merits[i])
                for j in range(40)
            )
            assert front[i] == (not beaten)


def method(name, value, forwards, **more):
    return {"name": name, "value": value, "forwards": forwards, **more}


def many(names=FIVE, gflops=False):
    rng = np.random.default_rng(0)
    rows = [method(f"single: {n}", 0.42 + 0.03 * rng.random(), 1, spread=0.01) for n in names]
    rows += [method(f"soup {i}", 0.45, 1) for i in range(4)]
    rows += [method(f"variant {i}", 0.9 + 0.01 * i, 2, spread=0.02) for i in range(5)]
    rows += [method(f"K = {k}", 0.93, k) for k in range(1, 6)]
    rows += [method("ensemble", 0.8, 5), method("oracle", 0.96, 5, bound=True)]
    if gflops:
        for row in rows:
            row["gflops"] = 0.01 * row["forwards"] * (1 + rng.random())
    return rows


def drawn_ticks(axis) -> list:
    low, high = axis.get_view_interval()
    ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [label for tick, label in ticks if low <= tick <= high]


def named(figure) -> list[str]:
    """What stands below a figure of costs."""
    return [text.get_text() for text in figure.legends[1].get_texts()]


class TestScatter:
    ROWS = (
        method("single", 0.5, 1, spread=0.1),
        method("ours", 0.9, 2),
        method("twin", 0.9, 2),
        method("worse", 0.9, 3),
        method("oracle", 0.95, 4, bound=True),
        method("absent", None, None),
    )

    def test_points_whiskers_front_and_its_names(self):
        figure = report.measure_against_cost(self.ROWS, ACCURACY)
        (plot,) = figure.axes
        assert plot.get_xlabel() == "expert forwards per sample at inference"
        assert plot.get_ylabel() == "accuracy, %"
        dots = [line for line in plot.lines if len(line.get_xdata()) == 1]
        dots = [line for line in dots if line.get_marker() in "oD"]
        assert [(d.get_xdata()[0], d.get_ydata()[0]) for d in dots] == [
            (4, 0.95), (2, 0.9), (2, 0.9), (3, 0.9), (1, 0.5),
        ]  # fmt: skip
        assert [d.get_marker() for d in dots] == ["D", "o", "o", "o", "o"]
        assert dots[0].get_markerfacecolor() == "none"
        colors = [to_hex(d.get_markerfacecolor()) for d in dots[1:]]
        assert [color == style.GOOD.lower() for color in colors] == [True, True, False, True]
        (front,) = [line for line in plot.lines if len(line.get_xdata()) > 2]
        assert front.get_drawstyle() == "steps-post"
        corners = np.column_stack(front.get_data()).tolist()
        assert corners[:-1] == [[1, 0.5], [2, 0.9], [2, 0.9]]
        assert front.get_ydata()[-1] == 0.9
        (whisker,) = plot.collections
        np.testing.assert_allclose(whisker.get_segments()[0], [[1, 0.4], [1, 0.6]])
        assert texts(plot) == ["1", "2"]
        assert [text.xy for text in plot.texts] == [(1, 0.5), (2, 0.9)]
        assert named(figure) == ["1  single", "2  ours, twin"]

    def test_where_less_is_better(self):
        rows = [method("cheap", 3.0, 1), method("worse", 3.5, 2), method("good", 0.5, 4)]
        figure = report.measure_against_cost(rows, ERROR)
        assert named(figure) == ["1  cheap", "2  good"]
        low, high = figure.axes[0].get_ylim()
        assert low < high

    def test_gflops_where_all_have_them(self):
        rows = [dict(row, gflops=7.0 * (i + 1)) for i, row in enumerate(self.ROWS[:5])]
        plot = report.measure_against_cost(rows, ACCURACY).axes[0]
        assert plot.get_xlabel() == "GFLOPs per sample at inference"
        assert report.cost_table(rows, ACCURACY).rows[1][0] == "ours"
        assert report.cost_table(rows, ACCURACY).columns[4] == "GFLOPs per sample"
        del rows[0]["gflops"]
        plot = report.measure_against_cost([*rows, self.ROWS[5]], ACCURACY).axes[0]
        assert plot.get_xlabel() == "expert forwards per sample at inference"

    def test_wide_costs_are_logarithmic(self):
        rows = [method(f"m{i}", 0.5, 1, gflops=0.1 * 10**i) for i in range(4)]
        plot = report.measure_against_cost(rows, ACCURACY).axes[0]
        assert plot.get_xscale() == "log"
        labels = [t.get_text() for t in plot.get_xticklabels()]
        assert {"0.1", "1", "10", "100"} <= set(labels)
        assert report.measure_against_cost(rows[:2], ACCURACY).axes[0].get_xscale() == "linear"

    @pytest.mark.parametrize(
        "rows",
        [
            many(),
            many(TEN, gflops=True),
            [dict(row, value=0.875) for row in many(TEN)],
            many(["a_name_of_one_method_with_about_forty_letters"] * 2),
            [method("alone", 1.0, 1)],
            [method(f"the method of rank {i}", 0.5 + 0.01 * i, 10 + i / 10) for i in range(8)],
        ],
    )
    @pytest.mark.parametrize("measure", [ACCURACY, ERROR])
    def test_texts_neither_overlap_nor_leave_their_places(self, rows, measure):
        figure = report.measure_against_cost(rows, measure)
        plot = figure.axes[0]
        assert len(plot.texts) == len(named(figure)) > 0
        assert_readable(plot, plot.texts, [])  # points may be close, and so their numbers
        ticks = [*drawn_ticks(plot.xaxis), *drawn_ticks(plot.yaxis)]
        labels = [plot.xaxis.label, plot.yaxis.label, *figure.legends[0].get_texts()]
        labels += figure.legends[1].get_texts()
        assert_readable(figure, [*labels, *ticks], labels)


class TestLines:
    def test_mean_seeds_and_own_k(self):
        axes = report.measure_over_k({3: [0.9], 1: [0.5, 0.7]}, ACCURACY, 2).axes[0]
        mean, seeds, own = axes.lines
        assert mean.get_xydata().tolist() == [[1, 0.6], [3, 0.9]]
        assert seeds.get_xydata().tolist() == [[1, 0.5], [1, 0.7], [3, 0.9]]
        assert own.get_xdata() == [2, 2]
        assert texts(axes) == ["this run: K = 2"]
        assert axes.get_xticks().tolist() == [1, 2, 3]
        low, high = axes.get_ylim()
        assert low < 0.5 < 0.9 < high

    def test_one_seed_has_no_dots_of_its_own(self):
        axes = report.measure_over_k({1: [0.5], 2: [0.5]}, ACCURACY).axes[0]
        assert len(axes.lines) == 1
        assert axes.get_legend() is None
        ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        assert all(0 <= tick <= 1 for tick, label in ticks if label.get_text())

    def test_texts_stay_inside(self):
        figure = report.measure_over_k({k: [1.0] for k in range(1, 41)}, ACCURACY, 40)
        axes = figure.axes[0]
        labels = drawn_ticks(axes.xaxis)
        assert_readable(figure, [*labels, *axes.texts, axes.xaxis.label, axes.yaxis.label])


class TestQuality:
    WEIGHTS = ([0.7, 0.3, 0], [0.2, 0, 0.8], [0.6, 0.4, 0], [0, 0.5, 0.5], [1, 0, 0])

    def test_counted_by_hand(self):
        right = np.array([[1, 0, 0, 0, 1], [1, 0, 0, 1, 1], [1, 0, 1, 0, 1]])
        quality = report.weight_quality(self.WEIGHTS, right, ACCURACY)
        # Sample 1 nobody gets right; 3's two largest weights are equal, and one of them is right.
        assert quality[:2] == (5, 4)
        assert quality.top == pytest.approx((1 + 0 + 0.5 + 1) / 4)
        assert quality.random == pytest.approx((1 + 1 / 3 + 1 / 3 + 1) / 4)
        assert quality.asked == pytest.approx((1 + 0 + 1 + 1) / 4)
        assert quality.oracle == 1
        assert quality.decisive == 2
        assert quality.decisive_top == pytest.approx(0.25)
        assert quality.decisive_random == pytest.approx(1 / 3)

    def test_bars(self):
        none = report.weight_quality([[1.0, 0]], np.zeros((2, 1)), ACCURACY)
        some = report.weight_quality([[1.0, 0]], np.array([[1], [0]]), ACCURACY)
        axes = report.quality_bars([some, none], ["all", "no one"], ACCURACY).axes[0]
        assert [bar.get_width() for bar in axes.patches] == [1.0, 0.5]
        assert texts(axes)[1:3] == ["100.0", "–"]
        assert texts(axes)[4:6] == ["50.0", "–"]
        labels = [t.get_text() for t in axes.get_yticklabels()]
        assert labels == ["all (n = 1)", "no one (n = 0)"]


class TestWeightBars:
    def test_bars_and_columns(self):
        axes = report.weight_bars([0.5, 0.25], [1.0, 0.5], ["a", "b"]).axes[0]
        assert [bar.get_width() for bar in axes.patches] == [0.5, 0.25]
        assert texts(axes)[:3] == ["mean\nweight", "0.500", "0.250"]
        assert texts(axes)[3:] == ["share of\nsamples", "100.0 %", "50.0 %"]


class TestCounts:
    COUNTS = np.array([[5, 2, 0], [0, 9, 1], [3, 0, 1234]])

    def test_cells(self):
        axes = report.count_matrix(self.COUNTS, ["a", "b", "c"], [0, 0, 7], "is", "predicted").axes[
            0
        ]
        cells = {text.get_position(): text.get_text() for text in axes.texts}
        assert cells == {
            (0, 0): "5", (1, 0): "2", (1, 1): "9", (2, 1): "1", (0, 2): "3", (2, 2): "1.2k",
            (3, 2): "7",
        }  # fmt: skip
        assert [t.get_text() for t in axes.texts if t.get_weight() == "bold"] == ["5", "9", "1.2k"]
        shown = axes.images[0].get_array()
        assert shown.compressed().tolist() == [2, 1, 3, 7]
        labels = [" ".join(t.get_text().split()) for t in axes.get_xticklabels()]
        assert labels == ["a", "b", "c", "any other"]
        assert (axes.get_ylabel(), axes.get_xlabel()) == ("is", "predicted")

    @pytest.mark.parametrize(
        ("names", "extra"),
        [
            ([str(i) for i in range(10)], False),
            ([f"class {i} with a long name" for i in range(20)], True),
            (["mountain bike, all-terrain bike, off-roader", "bus"], False),
        ],
    )
    def test_texts_neither_overlap_nor_leave_the_figure(self, names, extra):
        counts = np.full((len(names), len(names)), 888)
        figure = report.count_matrix(counts, names, counts[0] if extra else None)
        axes = figure.axes[0]
        assert len(axes.texts) == len(names) * (len(names) + extra)
        artists = [*axes.get_yticklabels(), *axes.get_xticklabels(), axes.xaxis.label]
        assert_readable(figure, [*artists, axes.yaxis.label], axes.texts)
        assert figure.get_figwidth() <= style.WIDTH + 1e-9

    def test_without_room_for_numbers_a_scale_says_the_colors(self):
        figure = report.count_matrix(np.full((60, 60), 88), [str(i) for i in range(60)])
        axes, scale = figure.axes
        assert texts(axes) == []
        assert scale.get_ylabel() == "samples off the diagonal"
