"""The bars of methods, and what all figures share: looks, names, settings."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from support.drawn import ACCURACY, ERROR, TEN, assert_readable, texts

from hubpath_fast import report
from hubpath_fast.report import style


class TestBars:
    ROWS = (
        {"name": "best single", "value": 0.456, "spread": 0.011, "forwards": 1},
        {"name": "Hub-Pathway", "value": 0.935, "spread": 0.014, "forwards": 2},
        {"name": "oracle", "value": 0.963, "forwards": 5, "bound": True},
        {"name": "Zoo-Tuning", "value": None, "note": "architectures differ"},
    )

    def test_bars_from_zero_with_values_and_the_best_marked(self):
        axes = report.measure_bars(self.ROWS, ACCURACY).axes[0]
        assert [bar.get_width() for bar in axes.patches] == [0.456, 0.935, 0.963]
        assert [t.get_text() for t in axes.get_yticklabels()] == [
            "best single",
            "★ Hub-Pathway",
            "oracle",
            "Zoo-Tuning",
        ]
        assert [text for text in texts(axes) if text] == [
            "accuracy, %",
            "45.6 ± 1.1",
            "93.5 ± 1.4",
            "96.3",
            "–",
            "forwards\nper sample",
            "1",
            "2",
            "5",
            "architectures differ",
        ]
        bold = [t.get_text() for t in axes.texts if t.get_weight() == "bold"]
        assert bold == ["93.5 ± 1.4", "2"]
        assert axes.get_xlim() == (0, 1)

    def test_dots_when_the_axis_is_cut(self):
        rows = [{"name": "a", "value": 0.81}, {"name": "b", "value": 0.9}]
        axes = report.measure_bars(rows, ACCURACY).axes[0]
        low, high = axes.get_xlim()
        assert 0.75 < low < 0.81 < 0.9 < high < 0.95
        assert len(axes.patches) == 0
        dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
        assert dots == [0.81, 0.9]

    def test_less_can_be_better(self):
        rows = [{"name": "a", "value": 3.0}, {"name": "b", "value": 0.5}, {"name": "c", "value": 9}]
        axes = report.measure_bars([*rows, {"name": "o", "value": 0, "bound": True}], ERROR).axes[0]
        names = [t.get_text() for t in axes.get_yticklabels()]
        assert names == ["a", "★ b", "c", "o"]
        assert axes.get_xlabel() == "error"
        low, high = axes.get_xlim()
        assert low == 0
        assert high > 9


def methods(names):
    rows = [{"name": f"single: {n}", "value": 0.8, "spread": 0.1, "forwards": 1} for n in names]
    return report.measure_bars(rows, ACCURACY)


def weights(names):
    return report.weight_bars([0.1] * len(names), [1.0] * len(names), names)


def qualities(names):
    one = report.weight_quality([[1.0, 0]], np.ones((2, 1)), ACCURACY)
    return report.quality_bars([one] * len(names), names, ACCURACY)


@pytest.mark.parametrize("figure_of", [methods, weights, qualities])
@pytest.mark.parametrize("names", [TEN, TEN[:1], ["n" * 40] * 24])
def test_texts_of_bars_neither_overlap_nor_leave_the_figure(figure_of, names):
    figure = figure_of(names)
    axes = figure.axes[0]
    legend = [text for legend in figure.legends for text in legend.get_texts()]
    assert_readable(figure, [*axes.texts, *axes.get_yticklabels(), axes.xaxis.label, *legend])


class TestStyle:
    def test_32_experts_look_different(self):
        assert len({style.look(i)[:2] for i in range(32)}) == 32
        assert style.look(3) == style.look(35)

    def test_shortened_names_fit_and_stay_distinct(self):
        names = ["a_long_prefix_1_and_a_long_suffix", "a_long_prefix_2_and_a_long_suffix", "short"]
        short = style.fit_all(names, 1.0)
        assert len(set(short)) == 3
        assert short[2] == "short"
        assert all(style.text_width(name, style.SMALL) <= 1.0 for name in short)
        assert short[0].startswith("0 a")
        assert short[0].endswith("x")

    def test_wrap_breaks_after_separators(self):
        name = "checkerboard/test_nfnet"
        width = style.text_width("checkerboard/", style.SMALL) + 0.01
        assert style.wrap(name, width) == "checkerboard/\ntest_nfnet"
        assert style.wrap("$x_1$ <b>", 9) == "$x_1$ <b>"

    def test_user_settings_neither_matter_nor_change(self):
        with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "black"}):
            before = dict(matplotlib.rcParams)
            axes = report.mean_weights([[1.0]], ["$r$"], ["a"]).axes[0]
            assert dict(matplotlib.rcParams) == before
        assert axes.get_yticklabels()[0].get_fontsize() == style.SMALL
        assert axes.get_yticklabels()[0].get_parse_math() is False

    def test_neither_pyplot_nor_training_is_imported(self):
        found = set()
        folder = Path(report.__file__).parent
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    depth = len(path.relative_to(folder).parts)
                    inside = node.level <= depth or node.module in ("files", "measure")
                    assert inside, f"{path} imports from outside the report"
                    found |= {node.module} if node.level == 0 else set()
        outside = {n for n in found if n.split(".")[0] not in sys.stdlib_module_names}
        assert {name.split(".")[0] for name in outside} == {"jinja2", "matplotlib", "numpy"}
        assert "matplotlib.pyplot" not in outside
