"""The bars of accuracies, and what all figures share: looks, names, settings."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import matplotlib
import pytest
from support.drawn import TEN, assert_inside, boxes, overlaps, texts

from hubpath_fast import report
from hubpath_fast.report import style


class TestBars:
    ROWS = (
        {"name": "best single", "accuracy": 0.456, "std": 0.011, "cost": 1},
        {"name": "Hub-Pathway", "accuracy": 0.935, "std": 0.014, "cost": 2},
        {"name": "oracle", "accuracy": 0.963, "cost": 5, "bound": True},
        {"name": "Zoo-Tuning", "accuracy": None, "note": "architectures differ"},
    )

    def test_bars_from_zero_with_values_and_the_best_marked(self):
        axes = report.accuracy_bars(self.ROWS).axes[0]
        assert [bar.get_width() for bar in axes.patches] == [0.456, 0.935, 0.963]
        assert [t.get_text() for t in axes.get_yticklabels()] == [
            "best single",
            "★ Hub-Pathway",
            "oracle",
            "Zoo-Tuning",
        ]
        assert texts(axes) == [
            "accuracy",
            "0.456 ± 0.011",
            "0.935 ± 0.014",
            "0.963",
            "–",
            "forwards\nper sample",
            "1",
            "2",
            "5",
            "",
            "architectures differ",
        ]
        bold = [t.get_text() for t in axes.texts if t.get_weight() == "bold"]
        assert bold == ["0.935 ± 0.014", "2"]
        assert axes.get_xlim() == (0, 1)

    def test_dots_when_the_axis_is_cut(self):
        rows = [{"name": "a", "accuracy": 0.81}, {"name": "b", "accuracy": 0.9}]
        axes = report.accuracy_bars(rows).axes[0]
        assert axes.get_xlim() == (pytest.approx(0.75), 1.0)
        assert len(axes.patches) == 0
        dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
        assert dots == [0.81, 0.9]
        assert len(report.accuracy_bars(rows, start=0.0).axes[0].patches) == 2

    def test_sorted_best_first_and_without_accuracy_last(self):
        rows = [self.ROWS[3], *self.ROWS[:3]]
        axes = report.accuracy_bars(rows, sort=True).axes[0]
        names = [t.get_text() for t in axes.get_yticklabels()]
        assert names == ["oracle", "★ Hub-Pathway", "best single", "Zoo-Tuning"]

    def test_long_names_stay_inside(self):
        rows = [{"name": f"single: {n}", "accuracy": 0.8, "std": 0.1, "cost": 1} for n in TEN]
        figure = report.accuracy_bars(rows)
        artists = [*figure.axes[0].texts, *figure.axes[0].get_yticklabels()]
        assert overlaps(boxes(artists)) == []
        assert_inside(figure, artists)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([], "rows is empty"),
            ([{"accuracy": 0.5}], r"rows\[0\] has no name"),
            ([{"name": "a", "accuracy": 93.5}], r"rows\[0\] has accuracy 93.5"),
            ([{"name": "a", "accuracy": 0.5, "std": -1}], r"rows\[0\] has std -1"),
            ([{"name": "a", "acuracy": 0.5}], "unknown key 'acuracy'"),
        ],
    )
    def test_errors_name_the_row(self, rows, message):
        with pytest.raises(ValueError, match=message):
            report.accuracy_bars(rows)
        with pytest.raises(ValueError, match="start is 1"):
            report.accuracy_bars([{"name": "a", "accuracy": 0.5}], start=1)


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
        for path in Path(report.__file__).parent.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    inside = node.level <= 1 or node.module == "files"
                    assert inside, f"{path} imports from outside the report"
                    found |= {node.module} if node.level == 0 else set()
        outside = {n for n in found if n.split(".")[0] not in sys.stdlib_module_names}
        assert {name.split(".")[0] for name in outside} == {"matplotlib", "numpy"}
        assert "matplotlib.pyplot" not in outside
