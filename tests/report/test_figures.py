"""Heat maps, samples and curves show the numbers given, and say which argument is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from support.drawn import ACCURACY, ERROR, FIVE, TEN, assert_readable, texts

from hubpath_fast import report
from hubpath_fast.report import style


class TestHeatMaps:
    def test_cells_print_the_weights(self):
        matrix = torch.tensor([[0.7, 0.25, 0.0], [0.333, 0.004, 0.663]])
        axes = report.mean_weights(matrix, ["upright", "inverted"], ["a", "b", "c"]).axes[0]
        assert texts(axes) == ["0.70", "0.25", "0", "0.33", "0.00", "0.66"]
        assert [(t.get_position()) for t in axes.texts][:4] == [(0, 0), (1, 0), (2, 0), (0, 1)]
        np.testing.assert_array_equal(axes.images[0].get_array(), matrix.double().numpy())
        assert axes.images[0].get_clim() == (0, pytest.approx(0.7))
        assert [t.get_text() for t in axes.get_yticklabels()] == ["upright", "inverted"]
        assert axes.get_xlabel() == "expert"

    def test_text_contrasts_with_its_cell(self):
        axes = report.mean_weights([[0.0, 0.5, 1.0]], ["r"], ["a", "b", "c"]).axes[0]
        assert [t.get_color() for t in axes.texts] == ["white", "white", style.INK]

    def test_best_of_each_group_is_bold_with_ties_and_gaps(self):
        matrix = [[0.9, 0.5, None], [0.8, 0.50004, None], [math.nan, 0.4, None]]
        names = (["m1", "m2", "m3"], ["a", "b", "c"])

        def bold(measure, **more) -> list:
            axes = report.measure_by_group(matrix, *names, measure, **more).axes[0]
            return [t.get_position() for t in axes.texts if t.get_weight() == "bold"]

        assert bold(ACCURACY) == [(0, 0), (1, 0), (1, 1)]  # 50.0 twice, as printed
        assert bold(ACCURACY, bounds=[0]) == [(0, 1), (1, 1)]
        assert bold(ERROR) == [(0, 1), (1, 2)]
        axes, scale = report.measure_by_group(matrix, *names, ACCURACY, "g").axes
        assert texts(axes)[:3] == ["90.0", "50.0", "–"]
        assert axes.images[0].get_clim() == (pytest.approx(40), pytest.approx(90))
        assert scale.get_ylabel() == "accuracy, %"
        # Light is good.
        axes = report.measure_by_group(matrix, *names, ERROR).axes[0]
        assert axes.images[0].get_cmap().name == "cividis_r"

    @pytest.mark.parametrize(
        ("names", "rows"),
        [(FIVE, 5), (TEN, 7), (TEN[:1], 1), ([f"expert {i}" for i in range(64)], 30)],
    )
    def test_labels_neither_overlap_nor_leave_the_figure(self, names, rows):
        matrix = np.full((rows, len(names)), 1 / len(names))
        row_names = [f"MIT Indoors {i}" for i in range(rows)]
        figure = report.mean_weights(matrix, row_names, names, "data set")
        axes, bar = figure.axes
        assert figure.get_figwidth() <= 9.0 + 1e-9
        labels = axes.get_xticklabels()
        artists = [*labels, *axes.get_yticklabels(), bar.yaxis.label]
        assert_readable(figure, artists, axes.texts)
        if labels[0].get_rotation() == 0:
            assert_readable(figure, labels)
        else:  # slanted boxes overlap though the lines of text do not: their distance says it
            shown = [i for i, label in enumerate(labels) if label.get_text()]
            step = axes.bbox.width / len(names) * (shown[1] - shown[0])
            angle = math.radians(labels[0].get_rotation())
            assert step * math.sin(angle) >= style.SMALL / 72 * figure.dpi
        assert bool(axes.texts) == (len(names) < 64)


def sample_figure(n=4, names=FIVE, k=2, size=(32, 32), **changes):
    rng = np.random.default_rng(0)
    weights = np.zeros((n, len(names)))
    for row in weights:
        row[rng.permutation(len(names))[:k]] = rng.dirichlet(np.ones(k)) * 0.9
    given = {
        "images": rng.integers(0, 256, (n, 3, *size), dtype=np.uint8),
        "weights": weights,
        "expert_names": names,
        "heads": [str(i) for i in range(n)],
    } | changes
    return report.samples_with_weights(**given), given


def bars(axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if patch.get_gid()]


class TestSamples:
    def test_bars_are_the_weights_in_the_experts_colors(self):
        figure, given = sample_figure()
        for s in range(4):
            _, picture, axes = figure.axes[3 * s : 3 * s + 3]
            found = bars(axes)
            order = np.argsort(-given["weights"][s])[:2]
            assert [b.get_gid() for b in found] == [FIVE[i] for i in order]
            tracks = [p for p in axes.patches if not p.get_gid()]
            assert [b.get_width() / t.get_width() for b, t in zip(found, tracks, strict=True)] == (
                pytest.approx(given["weights"][s][order])  # the grey track behind each is 1
            )
            assert [to_hex(b.get_facecolor()) for b in found] == [
                style.look(i).color.lower() for i in order
            ]
            np.testing.assert_array_equal(
                picture.images[0].get_array(), given["images"][s].transpose(1, 2, 0)
            )
            shown = [f"{given['weights'][s][i]:.2f}" for i in order]
            assert texts(axes)[1::2] == shown

    def test_marked_ones_differ_by_more_than_color(self):
        figure, _ = sample_figure(
            heads=[["predicted dog", "is cat"], "3", "5", "7"],
            marked=torch.tensor([True, False, False, False]),
            notes=["upright"] * 4,
        )
        assert texts(figure.axes[0]) == ["predicted dog, is cat", "upright"]
        assert texts(figure.axes[3]) == ["3", "upright"]
        wrong, right = (figure.axes[i].spines["top"].get_linestyle() for i in (1, 4))
        assert right == "solid"
        assert wrong != "solid"

    def test_tensors_and_gray_images(self):
        gray = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
        weights = torch.tensor([[1.0]], dtype=torch.bfloat16)
        figure = report.samples_with_weights(gray, weights, ["only"], ["3"])
        picture = figure.axes[1].images[0].get_array()
        np.testing.assert_array_equal(picture, np.repeat(gray[0].numpy().transpose(1, 2, 0), 3, 2))

    def test_better_ones_are_listed_though_not_asked(self):
        weights = [[0.2, 0.7, 0, 0, 0], [0.5, 0, 0, 0, 0]]
        better = np.array([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]], bool)
        figure, _ = sample_figure(n=2, weights=weights, better=better)
        first, second = (figure.axes[i] for i in (2, 5))
        assert texts(first) == [
            *("✗", FIVE[1], "0.70"),
            *("✓", FIVE[0], "0.20"),
            *("✓", FIVE[3], "not asked"),
        ]
        assert texts(second) == ["✗", FIVE[0], "0.50", "✓", FIVE[2], "not asked"]

    def test_more_experts_than_bars_are_summed_up(self):
        weights = np.array([[0.3, 0.2, 0.1, 0.1, 0.1, 0.08, 0.05, 0.04, 0.03, 0.0]])
        figure, _ = sample_figure(n=1, names=TEN, weights=weights)
        assert len(bars(figure.axes[2])) == 6
        assert texts(figure.axes[2])[-1] == "and 3 more: 0.12"
        better = np.array([[0] * 7 + [1, 1, 1]], bool)
        figure, _ = sample_figure(n=1, names=TEN, weights=weights, better=better)
        assert texts(figure.axes[2])[-1] == "and 4 more: 3 of them ✓"

    @pytest.mark.parametrize(("names", "size"), [(FIVE, (32, 32)), (TEN, (224, 180))])
    def test_texts_neither_overlap_nor_leave_the_figure(self, names, size):
        long = "mountain bike, all-terrain bike, off-roader"
        heads = [["predicted unicycle, monocycle and the like", f"is {long}"], long, "bus", "b"]
        figure, _ = sample_figure(
            names=names, size=size, k=len(names), heads=heads, notes=["checkerboard"] * 4,
            better=None if size[0] == 32 else np.ones((4, len(names)), bool),
        )  # fmt: skip
        artists = [text for axes in figure.axes for text in axes.texts]
        assert_readable(figure, artists)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"images": np.zeros((4, 3, 8, 8), np.float32)}, "images is float32"),
            ({"images": np.zeros((4, 2, 8, 8), np.uint8)}, r"images is uint8 \[4, 2, 8, 8\]"),
            ({"images": np.zeros((0, 3, 8, 8), np.uint8)}, "at least one image"),
            ({"weights": np.zeros((3, 5))}, "weights has 3 rows"),
            ({"weights": np.full((4, 5), np.nan)}, "20 of its numbers NaN"),
            ({"weights": np.full((4, 5), 2.0)}, "weights: expected fraction in 0..1, got 2"),
            ({"expert_names": ["a"]}, "expert_names has 1 entries, but there are 5"),
            ({"heads": ["1"]}, r"heads has 1 entries .* there are 4 images"),
            ({"marked": [True]}, r"marked shape \[1\]"),
            ({"better": np.zeros((4, 5))}, r"better is float64 \[4, 5\]; give bool"),
            ({"notes": ["a"]}, "notes has 1 entries"),
        ],
    )
    def test_errors_name_the_argument(self, changes, message):
        with pytest.raises(ValueError, match=message):
            sample_figure(**changes)


def history(experts=3, steps=4):
    records = []
    for step in range(1, steps + 1):
        share = np.arange(1, experts + 1) + step
        record = {
            "step": 10 * step,
            "loss": 3.0 / step,
            "task": 2.0 / step,
            "explore": -1.0,
            "exploit": 1.0 / step,
            "grad_norm": 5.0,
            "load": (share / share.sum()).tolist(),
            "mean_weight": (share / share.sum()).tolist(),
            "entropy": 1.0,
            "entropy_fraction": 1.0 / step,
            "lr": {"experts": 1e-3},
            "time": {"images_per_second": 100.0},
        }
        if step % 2 == 0:
            record |= {"validation": {"accuracy": 0.2 * step, "loss": 0.5, "n": 7}, "best": 0.8}
        records.append(record)
    return records


def curves(records, experts=3, names=None):
    names = names or [f"expert {i}" for i in range(experts)]
    return report.training_curves(records, names, ACCURACY)


def panels(figure) -> dict:
    return {axes.get_title("left"): axes for axes in figure.axes}


class TestCurves:
    def test_lines_are_the_logged_values(self):
        found = panels(curves(history()))
        assert list(found) == [
            "losses",
            "accuracy",
            "entropy of the routing",
            "load: share of rows",
            "mean weight",
        ]
        lines = {line.get_label(): line for line in found["losses"].lines}
        assert list(lines) == ["total", "task", "explore", "exploit", "validation"]
        assert lines["total"].get_xydata().tolist() == [[10, 3], [20, 1.5], [30, 1], [40, 0.75]]
        assert lines["validation"].get_xydata().tolist() == [[20, 0.5], [40, 0.5]]
        assert found["accuracy"].lines[0].get_xydata().tolist() == [[20, 0.4], [40, 0.8]]
        entropy = found["entropy of the routing"].lines[0]
        assert entropy.get_ydata().tolist() == [1, 0.5, 1 / 3, 0.25]
        assert all(axes.get_xlabel() == "step" for axes in found.values())
        assert all(axes.get_ylabel() for title, axes in found.items() if title != "mean weight")

    def test_stack_adds_up_in_the_experts_colors(self):
        records = history()
        found = panels(curves(records))
        areas = found["load: share of rows"].collections
        assert [to_hex(area.get_facecolor()[0]) for area in areas] == [
            style.look(i).color.lower() for i in range(3)
        ]
        for i, area in enumerate(areas):
            points = {tuple(np.round(p, 9)) for p in area.get_paths()[0].vertices}
            for record in records:
                top = round(sum(record["load"][: i + 1]), 9)
                assert (record["step"], top) in points

    def test_panels_without_their_keys_are_left_out(self):
        for key, title in (("loss", "losses"), ("load", "load: share of rows")):
            records = [{name: record[name] for name in ("step", key)} for record in history()]
            assert list(panels(curves(records))) == [title]

    def test_null_is_a_gap(self):
        records = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 2.0}]
        line = curves(records).axes[0].lines[0]
        np.testing.assert_array_equal(line.get_ydata(), [1.0, np.nan, 2.0])

    def test_legend_names_idle_experts_and_sums_up_many(self):
        records = history()
        for record in records:
            record["load"] = [0.5, 0.0, 0.5]
        legend = curves(records, names=["a", "b", "c"]).subfigs[1].legends[0]
        assert [t.get_text() for t in legend.get_texts()] == ["c", "b (no rows)", "a"]
        legend = curves(history(experts=64), 64).subfigs[1].legends[0]
        names = [t.get_text() for t in legend.get_texts()]
        assert names == ["52 others", *(f"expert {i}" for i in range(63, 51, -1))]

    @pytest.mark.parametrize("names", [TEN, TEN[:1]])
    def test_texts_neither_overlap_nor_leave_the_figure(self, names):
        figure = curves(history(experts=len(names)), names=names)
        legend = figure.subfigs[1].legends[0]
        artists = list(legend.get_texts())
        for axes in figure.axes:
            artists += [axes._left_title, axes.xaxis.label, axes.yaxis.label]
            low, high = axes.get_xlim()
            ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            artists += [label for tick, label in ticks if low <= tick <= high]
        assert_readable(figure, artists)
        last = figure.axes[-1]
        assert legend.get_window_extent().x0 >= last.bbox.x1
