"""The figures of an analysis show the numbers given; their texts neither overlap nor leave."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from support.drawn import FIVE, TEN, assert_inside, boxes, overlaps, texts

from hubpath_fast import report
from hubpath_fast.report import style
from hubpath_fast.report.confusion import shown_classes
from hubpath_fast.report.labels import number_ranges, place_numbers


class TestParetoFront:
    def test_ties_and_bounds(self):
        #        front  front tie  dominated by an equal accuracy at less cost, by more accuracy
        costs = [1, 2, 2, 3, 2, 5, 1]
        right = [0.5, 0.9, 0.9, 0.9, 0.8, 0.95, 0.4]
        front = report.pareto_front(costs, right)
        assert front.tolist() == [True, True, True, False, False, True, False]
        competes = [True] * 5 + [False, True]  # an oracle is not on the front and beats nobody
        front = report.pareto_front(costs, right, competes)
        assert front.tolist() == [True, True, True, False, False, False, False]
        assert report.pareto_front([5, 3], [0.9, 0.9], [True, False]).tolist() == [True, False]

    def test_is_the_definition(self):
        rng = np.random.default_rng(0)
        costs, right = rng.integers(1, 6, 40), rng.integers(0, 8, 40) / 8
        front = report.pareto_front(costs, right)
        for i in range(40):
            beaten = any(
                costs[j] <= costs[i]
                and right[j] >= right[i]
                and (costs[j] < costs[i] or right[j] > right[i])
                for j in range(40)
            )
            assert front[i] == (not beaten)

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match=r"costs has shape \[2\], accuracies \[1\]"):
            report.pareto_front([1, 2], [0.5])


def method(name, accuracy, forwards, **more):
    return {"name": name, "accuracy": accuracy, "forwards": forwards, **more}


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


def number_boxes(axes) -> list:
    """Of the numbers without the lines to their points, which Annotation's own extent has in it."""
    return [Text.get_window_extent(text) for text in axes.texts]


def drawn_ticks(axis) -> list:
    low, high = axis.get_view_interval()
    ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [label for tick, label in ticks if low <= tick <= high]


class TestScatter:
    ROWS = (
        method("single", 0.5, 1, spread=0.1),
        method("ours", 0.9, 2),
        method("twin", 0.9, 2),
        method("worse", 0.9, 3),
        method("oracle", 0.95, 4, bound=True),
        method("absent", None, None),
    )

    def test_points_whiskers_and_front(self):
        plot, key = report.accuracy_against_cost(self.ROWS).axes
        assert plot.get_xlabel() == "expert forwards per sample at inference"
        assert plot.get_ylabel() == "test accuracy (fraction right)"
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
        corners = np.column_stack(front.get_data())[:-1]
        assert corners.tolist() == [[1, 0.5], [2, 0.5], [2, 0.9]]
        assert front.get_ydata()[-1] == 0.9
        (whisker,) = plot.collections
        np.testing.assert_allclose(whisker.get_segments()[0], [[1, 0.4], [1, 0.6]])
        assert texts(plot) == ["1", "2, 3", "4", "5"]
        assert [t.get_text() for t in key.texts[:3]] == ["1", "oracle", "0.950"]
        assert "0.500 ± 0.100" in texts(key)
        assert "absent" not in texts(key)

    def test_gflops_where_all_have_them(self):
        rows = [dict(row, gflops=7.0 * (i + 1)) for i, row in enumerate(self.ROWS[:5])]
        plot = report.accuracy_against_cost(rows).axes[0]
        assert plot.get_xlabel() == "GFLOPs per sample at inference"
        assert report.cost_table(rows).rows[1][:2] == (2, "ours")
        assert report.cost_table(rows).columns[5] == "GFLOPs per sample"
        del rows[0]["gflops"]
        plot = report.accuracy_against_cost([*rows, self.ROWS[5]]).axes[0]
        assert plot.get_xlabel() == "expert forwards per sample at inference"
        plot = report.accuracy_against_cost(rows[1:], cost="forwards").axes[0]
        assert plot.get_xlabel() == "expert forwards per sample at inference"
        with pytest.raises(ValueError, match="cost is 'gflops'; give one of forwards, gflops"):
            report.accuracy_against_cost(rows, cost="gflops")

    def test_wide_costs_are_logarithmic(self):
        rows = [method(f"m{i}", 0.5, 1, gflops=0.1 * 10**i) for i in range(4)]
        plot = report.accuracy_against_cost(rows).axes[0]
        assert plot.get_xscale() == "log"
        labels = [t.get_text() for t in plot.get_xticklabels()]
        assert {"0.1", "1", "10", "100"} <= set(labels)
        assert report.accuracy_against_cost(rows[:2]).axes[0].get_xscale() == "linear"

    @pytest.mark.parametrize(
        "rows",
        [
            many(),
            many(TEN, gflops=True),
            [dict(row, accuracy=0.875) for row in many(TEN)],
            many(["a_name_of_one_method_with_about_forty_letters"] * 2),
            [method("alone", 1.0, 1)],
        ],
    )
    def test_numbers_and_names_neither_overlap_nor_leave_the_figure(self, rows):
        figure = report.accuracy_against_cost(rows)
        plot, key = figure.axes
        numbers = number_boxes(plot)
        assert overlaps(numbers) == []
        ticks = [*drawn_ticks(plot.xaxis), *drawn_ticks(plot.yaxis)]
        labels = [plot.xaxis.label, plot.yaxis.label, *key.get_legend().get_texts()]
        assert overlaps(boxes([*key.texts, *labels])) == []
        assert_inside(figure, [*key.texts, *labels, *ticks])
        frame = plot.get_window_extent()
        for box in numbers:
            assert frame.x0 - 1 <= box.x0 < box.x1 <= frame.x1 + 1
        # Every method has its number in the plot and its line in the key.
        found = set()
        for text in texts(plot):
            for part in text.split(", "):
                ends = [int(end) for end in part.split("–")]
                found |= set(range(ends[0], ends[-1] + 1))
        assert found == set(range(1, len(rows) + 1))
        assert len(key.texts) == 3 * len(rows)

    def test_needs_a_method(self):
        with pytest.raises(ValueError, match="rows has no method with an accuracy"):
            report.accuracy_against_cost([self.ROWS[5]])


class TestPlacement:
    def test_numbers_cover_neither_points_nor_the_front(self):
        rng = np.random.default_rng(0)
        points = np.column_stack([rng.integers(1, 5, 30) * 1.5, rng.random(30) * 4 + 0.2])
        corners = np.array([[1.5, 3.0], [4.5, 3.0], [4.5, 4.0], [8.0, 4.0]])
        numbers = place_numbers(points, corners, [False] * 30, (8.0, 4.5))
        for number in numbers:
            left, low, right, high = number.box
            assert 0 <= left < right <= 8.0
            assert 0 <= low < high <= 4.5
            for x, y in points:
                assert not (left < x < right and low < y < high)
            for (x0, y0), (x1, y1) in itertools.pairwise(corners):
                crossed = left < max(x0, x1) and right > min(x0, x1)
                assert not (crossed and low < max(y0, y1) and high > min(y0, y1))
        for one, other in itertools.combinations([number.box for number in numbers], 2):
            shared = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
            assert (shared <= 1e-9).any()

    def test_a_pile_gets_a_column_with_lines(self):
        points = np.array([[2.0, 2.0 + 0.05 * i] for i in range(6)])
        numbers = place_numbers(points, np.empty((0, 2)), [False] * 6, (8.0, 4.0))
        heights = [number.center[1] for number in numbers]
        assert heights == sorted(heights)  # the order of the points: no two lines cross
        assert all(number.line for number in numbers)
        (alone,) = place_numbers(points[:1], np.empty((0, 2)), [True], (8.0, 4.0))
        assert not alone.line

    def test_ranges(self):
        assert number_ranges([4, 1, 3, 5]) == "1, 3–5"
        assert number_ranges([1, 2]) == "1, 2"
        assert number_ranges([7]) == "7"


class TestLines:
    def test_mean_seeds_and_own_k(self):
        axes = report.accuracy_over_k({3: [0.9], 1: [0.5, 0.7]}, 2).axes[0]
        mean, seeds, own = axes.lines
        assert mean.get_xydata().tolist() == [[1, 0.6], [3, 0.9]]
        assert seeds.get_xydata().tolist() == [[1, 0.5], [1, 0.7], [3, 0.9]]
        assert own.get_xdata() == [2, 2]
        assert texts(axes) == ["this run: K = 2"]
        assert axes.get_xticks().tolist() == [1, 2, 3]
        low, high = axes.get_ylim()
        assert low < 0.5 < 0.9 < high

    def test_one_seed_has_no_dots_of_its_own(self):
        axes = report.accuracy_over_k({1: [0.5], 2: [0.5]}).axes[0]
        assert len(axes.lines) == 1
        assert axes.get_legend() is None
        assert all(0 <= tick <= 1 for tick in axes.get_yticks())

    def test_texts_stay_inside(self):
        figure = report.accuracy_over_k({k: [1.0] for k in range(1, 41)}, 40)
        axes = figure.axes[0]
        labels = drawn_ticks(axes.xaxis)
        assert overlaps(boxes(labels)) == []
        assert_inside(figure, [*labels, *axes.texts, axes.xaxis.label, axes.yaxis.label])

    def test_errors_name_the_argument(self):
        with pytest.raises(ValueError, match="accuracy_by_k is empty"):
            report.accuracy_over_k({})
        with pytest.raises(ValueError, match="k is 0"):
            report.accuracy_over_k({1: [0.5]}, 0)


class TestQuality:
    def test_counted_by_hand(self):
        weights = [[0.7, 0.3, 0], [0.2, 0, 0.8], [0.6, 0.4, 0], [0, 0.5, 0.5], [1, 0, 0]]
        right = np.array([[1, 0, 0, 0, 1], [1, 0, 0, 1, 1], [1, 0, 1, 0, 1]], bool)
        quality = report.weight_quality(weights, right)
        # Sample 1 nobody gets right; 3's two largest weights are equal, and one of them is right.
        assert quality[:2] == (5, 4)
        assert quality.top == pytest.approx((1 + 0 + 0.5 + 1) / 4)
        assert quality.random == pytest.approx((1 + 1 / 3 + 1 / 3 + 1) / 4)
        assert quality.asked == pytest.approx((1 + 0 + 1 + 1) / 4)
        assert quality.decisive == 2
        assert quality.decisive_top == pytest.approx(0.25)
        assert quality.decisive_random == pytest.approx(1 / 3)

    def test_bars(self):
        none = report.weight_quality([[1.0, 0]], np.zeros((2, 1), bool))
        some = report.weight_quality([[1.0, 0]], np.array([[True], [False]]))
        axes = report.quality_bars([some, none], ["all", "no one"]).axes[0]
        assert [bar.get_width() for bar in axes.patches] == [1.0, 0, 0.5, 0]
        assert texts(axes) == ["1.000", "–", "0.500", "–"]
        labels = [t.get_text() for t in axes.get_yticklabels()]
        assert labels == ["all  (n = 1)", "no one  (n = 0)"]

    @pytest.mark.parametrize("names", [TEN, ["a group whose name is about forty letters"]])
    def test_texts_neither_overlap_nor_leave_the_figure(self, names):
        one = report.weight_quality([[1.0, 0]], np.array([[True], [True]]))
        figure = report.quality_bars([one] * len(names), names)
        axes = figure.axes[0]
        artists = [*axes.texts, *axes.get_yticklabels(), axes.xaxis.label]
        artists += figure.legends[0].get_texts()
        assert overlaps(boxes(artists)) == []
        assert_inside(figure, artists)

    def test_errors_name_the_argument(self):
        with pytest.raises(ValueError, match=r"weights has shape \[1, 2\] and right \[1, 2\]"):
            report.weight_quality([[1.0, 0]], np.array([[True, True]]))
        with pytest.raises(ValueError, match="of int64"):
            report.weight_quality([[1.0, 0]], np.array([[1], [0]]))
        with pytest.raises(ValueError, match="qualities is empty"):
            report.quality_bars([], [])


class TestWeightBars:
    def test_bars_and_columns(self):
        axes = report.weight_bars([0.5, 0.25], [1.0, 0.5], ["a", "b"]).axes[0]
        assert [bar.get_width() for bar in axes.patches] == [0.5, 0.25]
        assert texts(axes)[:3] == ["mean\nweight", "0.500", "0.250"]
        assert texts(axes)[3:] == ["share of\nsamples", "100.0%", "50.0%"]

    @pytest.mark.parametrize("names", [TEN, TEN[:1], ["n" * 40] * 24])
    def test_texts_neither_overlap_nor_leave_the_figure(self, names):
        figure = report.weight_bars([0.1] * len(names), [1.0] * len(names), names)
        axes = figure.axes[0]
        artists = [*axes.texts, *axes.get_yticklabels(), axes.xaxis.label]
        assert overlaps(boxes(artists)) == []
        assert_inside(figure, artists)

    def test_errors_name_the_argument(self):
        with pytest.raises(ValueError, match=r"mean has shape \[1\] and asked \[2\]"):
            report.weight_bars([0.5], [0.5, 0.5], ["a"])
        with pytest.raises(ValueError, match="asked holds 50"):
            report.weight_bars([0.5], [50.0], ["a"])


class TestConfusion:
    COUNTS = np.array([[5, 2, 0], [0, 9, 1], [3, 0, 1234]])

    def test_counts(self):
        counts = report.confusion_counts([0, 0, 1, 2], [0, 2, 1, 1], 3)
        assert counts.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]
        with pytest.raises(ValueError, match="prediction holds 3; class numbers go from 0 to 2"):
            report.confusion_counts([0], [3], 3)
        with pytest.raises(ValueError, match=r"targets has shape \[2\] and prediction \[1\]"):
            report.confusion_counts([0, 1], [0], 3)

    def test_most_confused_and_shown(self):
        assert report.most_confused(self.COUNTS) == [(2, 0, 3), (0, 1, 2), (1, 2, 1)]
        assert report.most_confused(self.COUNTS, 1) == [(2, 0, 3)]
        assert shown_classes(self.COUNTS, 3) == [0, 1, 2]
        assert shown_classes(self.COUNTS, 2) == [0, 2]
        assert shown_classes(np.eye(4, dtype=int), 2) == [0, 1]

    def test_cells(self):
        axes = report.confusion_matrix(self.COUNTS, ["a", "b", "c"], [0, 0, 7]).axes[0]
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
        assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")

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
        figure = report.confusion_matrix(counts, names, counts[0] if extra else None)
        axes = figure.axes[0]
        assert len(axes.texts) == len(names) * (len(names) + extra)
        assert overlaps(boxes(axes.texts)) == []
        artists = [*axes.get_yticklabels(), *axes.get_xticklabels(), axes.xaxis.label]
        assert_inside(figure, [*artists, axes.yaxis.label])
        assert figure.get_figwidth() <= style.WIDTH + 1e-9

    def test_without_room_for_numbers_a_scale_says_the_colors(self):
        figure = report.confusion_matrix(np.full((60, 60), 88), [str(i) for i in range(60)])
        axes, scale = figure.axes
        assert texts(axes) == []
        assert scale.get_ylabel() == "wrong predictions"

    def test_errors_name_the_argument(self):
        with pytest.raises(ValueError, match=r"counts has shape \[1, 2\]; give a square"):
            report.confusion_matrix([[1, 2]], ["a"])
        with pytest.raises(ValueError, match=r"others has shape \[1\]"):
            report.confusion_matrix([[1, 2], [3, 4]], ["a", "b"], [1])


class TestMissed:
    def figure(self, **changes):
        given = {
            "images": np.zeros((2, 3, 8, 8), np.uint8),
            "weights": [[0.2, 0.7, 0, 0, 0], [0.5, 0, 0, 0, 0]],
            "right": np.array([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]], bool),
            "expert_names": FIVE,
            "labels": ["cat", "dog"],
            "predictions": ["dog", "cat"],
            "notes": ["day", "night"],
        } | changes
        return report.missed_samples(**given)

    def test_asked_ones_by_weight_then_those_who_knew(self):
        figure = self.figure()
        first, second = (figure.axes[i] for i in (2, 5))
        assert texts(figure.axes[0]) == ["✗ predicted dog, is cat", "day"]
        assert texts(first) == [
            "✗",
            FIVE[1],
            "0.70",
            "✓",
            FIVE[0],
            "0.20",
            "✓",
            FIVE[3],
            "not asked",
        ]
        assert texts(second) == ["✗", FIVE[0], "0.50", "✓", FIVE[2], "not asked"]
        bars = {p.get_gid(): p.get_width() for p in first.patches if p.get_gid()}
        track = next(p.get_width() for p in first.patches if not p.get_gid())
        assert bars == {FIVE[1]: pytest.approx(0.7 * track), FIVE[0]: pytest.approx(0.2 * track)}

    def test_many_experts_are_summed_up(self):
        weights = [[0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0, 0, 0, 0]]
        right = np.array([[0, 0, 0, 0, 0, 0, 1, 1, 0, 0]], bool)
        figure = self.figure(
            images=np.zeros((1, 3, 8, 8), np.uint8), weights=weights, right=right,
            expert_names=TEN, labels=[1], predictions=[2], notes=None,
        )  # fmt: skip
        assert texts(figure.axes[2])[-1] == "and 3 more, 2 of them right"
        artists = [text for axes in figure.axes for text in axes.texts]
        assert overlaps(boxes(artists)) == []
        assert_inside(figure, artists)

    def test_errors_name_the_argument(self):
        with pytest.raises(ValueError, match=r"right \[2, 5\] of float64"):
            self.figure(right=np.zeros((2, 5)))
        with pytest.raises(ValueError, match=r"weights has shape \[1, 5\] .* there are 2 images"):
            self.figure(weights=[[0.0] * 5])
        with pytest.raises(ValueError, match="labels has 1 entries"):
            self.figure(labels=["cat"])
