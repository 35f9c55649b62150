"""Figures of points in pictures: what they show is what they were given, and reads at any size."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from support.drawn import FIVE, TEN, assert_readable, texts

from hubpath_fast.measure import Measure
from hubpath_fast.report import style
from hubpath_fast.report.figures.ced import axis_limit, cumulative_errors, cumulative_table
from hubpath_fast.report.figures.maps import Maps, maps_of_experts
from hubpath_fast.report.figures.pictures import PREDICTED, TRUE
from hubpath_fast.report.figures.points import samples_with_points, values_on_shape
from hubpath_fast.report.figures.samples import samples_with_weights

NME = Measure("nme", "min", (0.0, None), scale=100, unit="%", decimals=2, title="NME")
NASTY = '<b>$x^2$</b> "ä", '
RNG = np.random.default_rng(0)


def pictures(n, side=32):
    return RNG.integers(0, 256, (n, 3, side, side), dtype=np.uint8)


def marks(n, points, side=32):
    return RNG.random((n, 2, points, 2)) * side


def all_texts(figure):
    return [text for axes in figure.axes for text in axes.texts]


def dots(axes, color):
    """Points of a picture's axes whose markers have this edge or face colour."""
    for line in axes.lines:
        if to_hex(color) in (
            to_hex(line.get_markeredgecolor()),
            to_hex(line.get_markerfacecolor()),
        ):
            return line.get_xydata()
    return None


class TestSamplesWithPoints:
    def test_points_texts_and_experts(self):
        weights = np.array([[0.2, 0.0, 0.8], [1.0, 0.0, 0.0], [0.0, 0.3, 0.6]])
        points = marks(3, 5)
        figure = samples_with_points(
            pictures(3), points, weights, ["a", "b", "c"], ["one", "two", "three"],
            ["dark", "", "far"], {"Worst": 2, "Median": 1},
        )  # fmt: skip
        shown = [axes for axes in figure.axes if axes.images]
        for s, axes in enumerate(shown):
            # The centre of pixel 0 is at 0 for imshow, and at 0.5 in pixels from j to j + 1.
            np.testing.assert_allclose(dots(axes, TRUE), points[s, 0] - 0.5)
            np.testing.assert_allclose(dots(axes, PREDICTED), points[s, 1] - 0.5)
        below = [texts(axes) for axes in figure.axes if axes.texts]
        assert below == [
            ["Worst"],
            ["one", "dark", "c", "0.80", "a", "0.20"],
            ["two", "a", "1.00"],
            ["Median"],
            ["three", "far", "c", "0.60", "b", "0.30"],
        ]

    def test_many_experts_are_summed_up(self):
        weights = np.full((1, 10), 0.1)
        figure = samples_with_points(pictures(1), marks(1, 5), weights, TEN, ["e"], [""], {"x": 1})
        assert "and 7 more: 0.70" in texts(figure.axes[-1])

    @pytest.mark.parametrize(("points", "names"), [(5, FIVE), (98, TEN), (68, [NASTY * 5] * 3)])
    def test_texts_neither_overlap_nor_leave(self, points, names):
        weights = np.full((9, len(names)), 1 / len(names))
        heads, notes = ["NME 123.45 %"] * 9, ["expression, illumination, make-up, occlusion"] * 9
        lines = {"Worst": 4, "Median": 4, NASTY * 20: 1}
        figure = samples_with_points(
            pictures(9), marks(9, points), weights, names, heads, notes, lines
        )
        assert figure.get_figwidth() == pytest.approx(style.WIDTH)
        assert_readable(figure, [*all_texts(figure), *figure.legends[0].get_texts()])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"marks": marks(2, 5)}, "marks is of 2 images, but there are 1"),
            ({"marks": np.zeros((1, 2, 5))}, r"marks has shape \[1, 2, 5\]"),
            ({"marks": np.full((1, 2, 5, 2), np.nan)}, "20 of its numbers NaN"),
            ({"heads": []}, "heads is of 0 images"),
            ({"lines": {"x": 2}}, "lines is of 2 images"),
            ({"lines": {"x": 1, "y": 0}}, r"lines: expected 1\.\.4 images in each"),
        ],
    )
    def test_errors_name_the_argument(self, changes, message):
        given = {
            "images": pictures(1), "marks": marks(1, 5), "weights": [[1.0]], "expert_names": ["a"],
            "heads": ["e"], "notes": [""], "lines": {"x": 1},
        }  # fmt: skip
        with pytest.raises(ValueError, match=message):
            samples_with_points(**given | changes)


def test_samples_with_weights_have_points_where_there_are_some():
    points = marks(2, 5)
    given = (pictures(2), [[1.0, 0.0]] * 2, ["a", "b"], ["x", "y"])
    figure = samples_with_weights(*given, marks=points)
    shown = [axes for axes in figure.axes if axes.images]
    np.testing.assert_allclose(dots(shown[1], PREDICTED), points[1, 1] - 0.5)
    assert not any(axes.lines for axes in samples_with_weights(*given).axes)
    with pytest.raises(ValueError, match="marks has 1 entries, but there are 2 images"):
        samples_with_weights(*given, marks=points[:1])


class TestValuesOnShape:
    def test_colors_places_and_names(self):
        shape = np.array([[0.0, 0], [10, 0], [0, 10], [10, 10]])
        figure = values_on_shape(shape, [0.01, 0.02, 0.03, 0.04], list("abcd"), "error, %", 100)
        axes, scale = figure.axes
        (points,) = axes.collections
        assert points.get_array().tolist() == pytest.approx([1, 2, 3, 4])
        assert points.get_clim() == pytest.approx((0, 4))
        places = points.get_offsets()
        # One scale for both axes, y downwards.
        assert np.ptp(places[:, 0]) == pytest.approx(np.ptp(places[:, 1]))
        assert (places[2] - places[0])[1] > 0
        low, high = axes.get_ylim()
        assert low > high
        assert sorted(texts(axes)) == list("abcd")
        for text in axes.texts:
            distances = np.linalg.norm(places - text.get_position(), axis=1)
            assert "abcd"[distances.argmin()] == text.get_text()
        assert scale.get_ylabel() == "error, %"

    @pytest.mark.parametrize(
        ("shape", "names", "least"),
        [
            (RNG.random((98, 2)) * [1, 1.3], [str(i) for i in range(98)], 70),
            (RNG.random((5, 2)), [NASTY * 4] * 5, 3),
            (np.array([[0.0, 0], [1e-3, 0]]), ["a", "b"], 2),  # a flat one
            (np.zeros((3, 2)), ["a", "b", "c"], 1),  # all in one place
            (np.zeros((1, 2)), ["a"], 1),
        ],
    )
    def test_names_cover_neither_each_other_nor_points(self, shape, names, least):
        figure = values_on_shape(shape, RNG.random(len(shape)), names, "mean error, %")
        axes, scale = figure.axes
        assert len(axes.texts) >= least
        assert_readable(figure, axes.texts)
        assert_readable(figure, [scale.yaxis.label])
        assert figure.get_figwidth() <= style.WIDTH
        places = axes.transData.transform(axes.collections[0].get_offsets())
        for text in axes.texts:
            box = text.get_window_extent()
            assert not any(box.contains(*place) for place in places)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"points has shape \[2, 2\] and values \[3\]"):
            values_on_shape(np.zeros((2, 2)), [1, 2, 3], ["a", "b"], "")
        with pytest.raises(ValueError, match="names has 1 entries"):
            values_on_shape(np.zeros((2, 2)), [1, 2], ["a"], "")


class TestCumulativeErrors:
    def test_curves_are_the_shares_within(self):
        errors = {
            "ours": np.array([0.01, 0.05, 0.10, 0.10, 0.2]),
            "b": np.array([0.0, 0.02, 0.02, 0.03]),
        }
        figure = cumulative_errors(errors, NME, 0.10, "NME, %", {"NME": ["1", "2"]}, ["ours"])
        axes = figure.axes[0]
        ours, other = axes.lines
        at = ours.get_xdata()
        assert (at[0], at[-1], len(at)) == (0, 0.10, 501)
        for line, values in zip((ours, other), errors.values(), strict=True):
            by_hand = [np.mean(values <= x) for x in at]
            assert line.get_ydata().tolist() == by_hand
        assert other.get_ydata()[0] == 0.25  # an error of 0 counts at 0
        assert ours.get_linewidth() > other.get_linewidth()
        assert axes.get_xlim() == (0, 0.10)
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == ["0", "2", "4", "6", "8", "10"]
        table = cumulative_table(errors, 0.10, "NME")
        assert table.columns == ["NME", "ours", "b"]
        assert table.rows[50] == [0.01, 0.2, 0.25]
        assert table.rows[-1] == [0.10, 0.8, 1.0]

    def test_the_axis_goes_on_where_the_threshold_shows_too_little(self):
        good, bad = np.linspace(0, 0.12, 100), np.linspace(0.1, 0.4, 100)
        assert axis_limit({"good": good, "bad": bad}, 0.10) == pytest.approx(0.10)
        assert axis_limit({"bad": bad}, 0.10) == pytest.approx(0.50)
        assert axis_limit({"bad": bad + 9}, 0.10) == pytest.approx(1.0)
        # It is the bold curves that are to be seen, whatever a floor beside them does.
        assert axis_limit({"good": good, "bad": bad}, 0.10, ["bad"]) == pytest.approx(0.50)
        table = cumulative_table({"good": good, "bad": bad}, 0.10, "NME", ["bad"])
        assert table.rows[-1][0] == pytest.approx(0.50)
        figure = cumulative_errors({"bad": bad}, NME, 0.10, "", {"NME": ["1"]})
        marked = [line.get_xdata() for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
        assert marked == [[0.10, 0.10]]

    @pytest.mark.parametrize("count", [1, 2, 40])
    def test_the_legend_is_readable(self, count):
        names = [f"{i} {name}" for i, name in enumerate((TEN * 4)[:count])]
        errors = {name: RNG.gamma(4, 0.01, 20_000) for name in names}
        columns = {head: ["100.00"] * count for head in ("NME,\n%", "AUC\n@10, %", "FR\n@10, %")}
        figure = cumulative_errors(errors, NME, 0.10, "NME, %", columns, names[:1], names[1:2])
        axes, legend = figure.axes
        assert len(axes.lines[0].get_xdata()) == 501  # not 20,000
        assert len(legend.texts) == 3 + 4 * count
        axis = [axes.xaxis.label, axes.yaxis.label, *axes.get_yticklabels()]
        assert_readable(figure, [*legend.texts, *axis])
        looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines[:32]}
        assert len(looks) == min(count, 32)

    def test_errors(self):
        with pytest.raises(ValueError, match="errors has 0 entries"):
            cumulative_errors({}, NME, 0.10, "", {})
        with pytest.raises(ValueError, match=r"errors has 1 entries and columns \[2\]"):
            cumulative_errors({"a": [0.1]}, NME, 0.10, "", {"x": ["1", "2"]})


def one(experts, size=16, **changes):
    maps = RNG.random((experts, size, size))
    weights = np.linspace(0.1, 0.5, experts)
    fields = {"true": (3.5, 4.0), "predicted": (5.0, 6.0), "head": "Median: landmark 3"}
    return Maps(range(experts), weights, maps, maps.mean(axis=0), **fields | changes)


class TestMaps:
    def test_maps_weights_and_points(self):
        sample = one(2)
        figure = maps_of_experts(pictures(1, 64), [sample], ["a", "b"])
        shown = [axes for axes in figure.axes if axes.images]
        assert len(shown) == 4
        # The expert of the larger weight comes first.
        expected = [sample.maps[1], sample.maps[0], sample.hub]
        for axes, values in zip(shown[1:], expected, strict=True):
            np.testing.assert_array_equal(axes.images[0].get_array(), values)
            assert axes.get_xlabel() == f"{values.min():.2f} to {values.max():.2f}"
            np.testing.assert_allclose(dots(axes, TRUE), [[3.0, 3.5]])
            np.testing.assert_allclose(dots(axes, PREDICTED), [[4.5, 5.5]])
        # A cell is four pixels.
        np.testing.assert_allclose(dots(shown[0], TRUE), [[4 * 3.5 - 0.5, 4 * 4 - 0.5]])
        said = [text.get_text() for text in all_texts(figure) if text.get_text()]
        assert said == [
            "Median: landmark 3", "picture", "b", "weight 0.50", "a", "weight 0.10", "the hub",
        ]  # fmt: skip

    @pytest.mark.parametrize("samples", [[1], [10, 3], [1, 2]])
    def test_texts_neither_overlap_nor_leave(self, samples):
        found = [one(count, head=NASTY * 30) for count in samples]
        figure = maps_of_experts(pictures(len(samples)), found, TEN)
        assert figure.get_figwidth() <= style.WIDTH + 1e-9
        feet = [axes.xaxis.label for axes in figure.axes]
        assert_readable(figure, [*all_texts(figure), *feet, *figure.legends[0].get_texts()])
        most = max(min(count, 5) for count in samples) + 2
        assert len([a for a in figure.axes if a.images]) == sum(min(c, 5) + 2 for c in samples)
        assert most <= 7

    def test_errors(self):
        with pytest.raises(ValueError, match="samples has 1 entries, but there are 2 images"):
            maps_of_experts(pictures(2), [one(1)], ["a"])
