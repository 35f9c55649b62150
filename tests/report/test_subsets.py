"""Samples in several subsets, or in none: every figure by group takes them as they overlap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.pages import Page, read_csv

from hubpath_fast import report
from hubpath_fast.measure import Measure
from hubpath_fast.report import Analysis, FigureFolder, Section, write_analysis

NME = Measure("nme", "min", (0.0, None), scale=100, unit="%", decimals=2, title="NME")
NASTY = '<b>make-up</b> & "blur"'
RNG = np.random.default_rng(0)
WEIGHTS = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.5, 0.5], [0.3, 0.7]])
# Sample 1 is in two subsets, 4 in none; one subset has no sample.
SUBSETS = {"pose": [0, 1, 2], NASTY: torch.tensor([1, 3]), "never": []}


def fields(**changes):
    return {
        "title": "faces",
        "subtitle": "",
        "data_name": "wflw",
        "measure": NME,
        "expert_names": ["a", "b"],
        "scores": [0.01, 0.02, 0.03, 0.04, 0.5],
        "scores_alone": RNG.random((2, 5)),
        "alone_title": "each alone",
        "weights": WEIGHTS,
        "k": 2,
        "images": lambda indices: np.zeros((len(indices), 3, 8, 8), np.uint8),
        "subsets": SUBSETS,
    } | changes


def test_members_kinds_and_the_one_group_of_a_sample():
    analysis = Analysis(**fields())
    members = {name: mask.nonzero()[0].tolist() for name, mask in analysis.members().items()}
    assert members == {"pose": [0, 1, 2], NASTY: [1, 3], "none of these": [4]}
    assert analysis.kinds == ["pose", f"pose, {NASTY}", "pose", NASTY, "none of these"]
    assert [analysis.group_names[g] for g in analysis.groups] == [
        "pose", NASTY, "pose", NASTY, "none of these",
    ]  # fmt: skip
    assert analysis.group_label == "subset"
    assert Analysis(**fields(group_label="condition")).group_label == "condition"


def test_no_subsets_are_as_no_groups():
    for empty in (None, {}):
        analysis = Analysis(**fields(subsets=empty))
        assert list(analysis.members()) == ["all"]
        assert analysis.kinds == ["all"] * 5


def test_the_page(tmp_path):
    seen = []

    def own(analysis, figures):
        seen.append(analysis.oracle.tolist())
        return Section("Own")

    page = write_analysis(Analysis(**fields(own=[own, lambda *_: None])), tmp_path, scale=0.2)
    figures = tmp_path / "figures"
    _, *rows = read_csv(figures / "mean_weight_by_group.csv")
    found = {row[0]: [float(cell) for cell in row[1:]] for row in rows}
    assert found == {
        "pose": pytest.approx([0.6, 0.4]),
        NASTY: pytest.approx([0.65, 0.35]),
        "none of these": pytest.approx([0.3, 0.7]),
    }
    _, *rows = read_csv(figures / "weight_quality.csv")
    assert [row[:2] for row in rows[1:]] == [["pose", "3"], [NASTY, "2"], ["none of these", "1"]]
    head, *rows = read_csv(figures / "samples.csv")
    assert head[:3] == ["sample", "subset", "NME"]
    kinds = {int(row[0]): row[1] for row in rows}
    assert kinds[1] == f"pose, {NASTY}"
    assert kinds[4] == "none of these"
    text = page.read_text(encoding="utf-8")
    assert "its NME is 12.00 %" in " ".join(Page(text).texts["p"])
    assert Page(text).texts["h2"][-2:] == ["Own", "Where an expert alone is better than the hub"]
    assert len(seen) == 1


def test_a_measures_title_is_what_readers_see():
    assert NME.label == "NME, %"
    assert Measure("error").title == "error"
    history = [{"step": s, "loss": 1.0, "validation": {"nme": 0.1}} for s in (1, 2)]
    figure = report.training_curves(history, ["a"], NME)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert "NME, %" in titles or "NME" in titles


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": [0] * 5, "group_names": ["x"]}, "groups is given with subsets"),
        ({"subsets": {"x": [5]}}, r"subsets\['x'\]: expected integers in 0\.\.4"),
        ({"subsets": {"x": [-1]}}, r"subsets\['x'\]: expected integers"),
        ({"subsets": {"x": [True, False]}}, r"subsets\['x'\]: expected integers"),
        ({"subsets": {"x": [[0]]}}, r"subsets\['x'\]: expected integers"),
        ({"marks": np.zeros((4, 2, 3, 2))}, "marks has 4 entries for 5 samples"),
        ({"marks": np.zeros((5, 3, 2))}, r"marks has shape \[5, 3, 2\]"),
    ],
)
def test_errors_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        Analysis(**fields(**changes))


def test_marks_stand_on_the_samples(tmp_path):
    points = RNG.random((5, 2, 3, 2)) * 8
    analysis = Analysis(**fields(marks=points))
    section = report.sections.samples(analysis, FigureFolder(tmp_path, 0.2))
    shown = [axes for axes in section.items[0].figure.axes if axes.images]
    assert len(shown) == 5
    assert all(axes.lines for axes in shown)
