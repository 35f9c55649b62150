"""The page of a run's analysis: the numbers beside its figures, its words, what it leaves out."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from support.drawn import ACCURACY, ERROR
from support.pages import Page, read_csv

from hubpath_fast import report
from hubpath_fast.measure import Measure
from hubpath_fast.report import Analysis, FigureFolder, Section, sections, write_analysis
from hubpath_fast.report.analysis import FIGURES

NASTY = '<b>one</b> & "two" {3}'
EXPERTS = [NASTY, "inverted", "turned"]
GROUPS = ["day", "night", "never"]  # the last has no sample
T, M, K = 60, 3, 2


def own_section(analysis: Analysis, figures: FigureFolder) -> Section:
    figures.numbers("own", report.Table(["a"], [[1]]))
    return Section("The task's own")


def fields(**changes) -> dict:
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(M), T)
    weights[np.arange(T), weights.argmin(axis=1)] = 0
    images = rng.integers(0, 256, (T, 3, 8, 8), dtype=np.uint8)
    return {
        "title": NASTY,
        "subtitle": "seed 0",
        "data_name": "pets",
        "measure": ACCURACY,
        "expert_names": EXPERTS,
        "scores": (rng.random(T) < 0.5).astype(float),
        "scores_alone": (rng.random((M, T)) < 0.5).astype(float),
        "alone_title": "each expert fine-tuned alone",
        "weights": weights,
        "k": K,
        "history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}],
        "groups": rng.integers(0, 2, T),
        "group_names": GROUPS,
        "group_label": "light",
        "values_by_k": {2: [0.9, 0.8], 1: [0.5]},
        "rows": [
            {"name": "single", "value": 0.5, "spread": 0.1, "forwards": 1},
            {"name": NASTY, "value": 0.8, "forwards": 2, "milliseconds": 3.5},
            {"name": "oracle", "value": 0.9, "forwards": 3, "bound": True},
            {"name": "Zoo-Tuning", "value": None},
        ],
        "images": lambda indices: images[indices],
        "details": {"true": [f"<i>{t}</i>" for t in range(T)]},
        "own": [own_section],
        "notes": ["A first note.", NASTY],
    } | changes


def errors() -> dict:
    """Of a measure in which less is better."""
    rng = np.random.default_rng(1)
    rows = [
        {"name": "single", "value": 3.0, "forwards": 1},
        {"name": "ours", "value": 1.0, "forwards": 2},
        {"name": "oracle", "value": 0.5, "forwards": 3, "bound": True},
    ]
    return fields(
        measure=ERROR, scores=rng.gamma(2, 1, T), scores_alone=rng.gamma(2, 1, (M, T)), rows=rows,
        values_by_k={1: [3.0], 2: [1.0]},
    )  # fmt: skip


class Written:
    def __init__(self, out, given) -> None:
        self.fields = given
        self.path = write_analysis(Analysis(**given), out, scale=0.2)  # words and numbers count
        self.page = Page(self.path.read_text(encoding="utf-8"))

    def __getattr__(self, name):
        return self.fields[name]

    def csv(self, name) -> list[list[str]]:
        return read_csv(self.path.parent / "figures" / f"{name}.csv")

    def files(self) -> set[str]:
        return {path.name for path in (self.path.parent / "figures").iterdir()}


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Written:
    return Written(tmp_path_factory.mktemp("full"), fields())


@pytest.fixture(scope="module")
def less(tmp_path_factory) -> Written:
    return Written(tmp_path_factory.mktemp("less"), errors())


# "routing" is of analyses that say whether routing pays: see test_fallback.
ALL = {form.format(measure="accuracy") for form in FIGURES} - {"routing"}
TITLES = [
    "This run",
    "Which experts are asked",
    "How good the weights are",
    "Accuracy over K",
    "Samples and their weights",
    "How the training went",
    "The task's own",
    "Accuracy against cost",
    "Where an expert alone is better than the hub",
]


class TestPage:
    def test_has_all_sections_and_every_figure_has_its_numbers(self, full):
        assert full.path.name == "report.html"
        assert full.page.texts["h2"] == TITLES
        files = {f"{name}.{end}" for name in ALL for end in ("png", "csv")}
        assert full.files() == files | {"own.csv"}
        assert len(full.page.all("img")) == len(ALL)
        assert full.page.texts["h1"] == [NASTY]
        assert full.page.texts["p"][2:4] == ["A first note.", NASTY]

    def test_optional_sections_are_left_out_and_old_figures_removed(self, tmp_path):
        absent = ("history", "groups", "group_names", "values_by_k", "images", "heads")
        folder = tmp_path / "figures"
        folder.mkdir()
        for name in ("training.png", "training.csv", "missed.png", "mine.png"):
            (folder / name).write_bytes(b"old")
        changes = dict.fromkeys(absent) | {"rows": (), "own": (), "notes": ()}
        written = Written(tmp_path, fields(**changes))
        assert written.page.texts["h2"] == [TITLES[i] for i in (0, 1, 2, 8)]
        kept = {f"{n}.{end}" for n in ("mean_weight", "weight_quality") for end in ("png", "csv")}
        assert written.files() == kept | {"missed.csv", "mine.png"}

    def test_validation_samples_are_never_called_test_samples(self, tmp_path):
        routes = {"sets": 3, "share": [1.0, 0.5, 0.5]}
        made = write_analysis(Analysis(**fields(routes=routes)), tmp_path / "test")
        page = made.read_text(encoding="utf-8")
        held_out = Analysis(**fields(routes=routes, split="validation"))
        other = write_analysis(held_out, tmp_path / "validation").read_text(encoding="utf-8")
        pictures = re.compile(r'src="data:[^"]*"')
        page, other = pictures.sub("", page), pictures.sub("", other)
        assert len(re.findall(r"\b[Tt]est\b", page)) == 11
        assert not re.findall(r"\b[Tt]est\b", other)
        assert other == re.sub(r"\btest\b", "validation", page).replace("Test ", "Validation ")

    def test_empty_is_as_absent(self):
        analysis = Analysis(**fields(history=[], rows=[], values_by_k={}))
        for make in (sections.over_k, sections.training, sections.cost):
            assert make(analysis, None) is None

    def test_tensors_and_lists_are_as_arrays(self):
        given = fields()
        names = ("scores", "scores_alone", "weights", "groups")
        lists = Analysis(**(given | {name: given[name].tolist() for name in names}))
        tensors = Analysis(**(given | {name: torch.tensor(given[name]) for name in names}))
        for name in names:
            np.testing.assert_array_equal(getattr(lists, name), given[name])
            np.testing.assert_array_equal(getattr(tensors, name), given[name])


class TestNumbers:
    @pytest.mark.parametrize("which", ["full", "less"])
    def test_summary(self, which, request):
        written = request.getfixturevalue(which)
        better = max if which == "full" else min
        text_of = written.measure.text
        single = [np.mean(row) for row in written.scores_alone]
        oracle = np.mean([better(written.scores_alone[:, t]) for t in range(T)])
        text = written.page.texts["p"][1]
        hub = text_of(np.mean(written.scores))
        name = written.measure.name
        asked = "asks 2 of 3 experts about each of 60 test samples of pets"
        assert f"{asked}; its {name} is {hub}" in text
        best = EXPERTS[single.index(better(single))]
        assert f"{best} is best with {text_of(better(single))}; " in text
        assert f"for each sample it would be {text_of(oracle)}, the bound" in text

    def test_mean_weights(self, full):
        head, *rows = full.csv("mean_weight")
        assert [row[0] for row in rows] == EXPERTS
        for m, row in enumerate(rows):
            assert float(row[1]) == pytest.approx(sum(full.weights[:, m]) / T)
            assert float(row[2]) == pytest.approx(sum(w > 0 for w in full.weights[:, m]) / T)
        head, *rows = full.csv("mean_weight_by_group")
        assert head == ["light", *EXPERTS]
        assert [row[0] for row in rows] == ["day", "night"]
        for g, row in enumerate(rows):
            values = [full.weights[t] for t in range(T) if full.groups[t] == g]
            np.testing.assert_allclose(np.array(row[1:], float), np.mean(values, axis=0))

    @pytest.mark.parametrize("which", ["full", "less"])
    def test_quality_is_the_exact_expectation(self, which, request):
        written = request.getfixturevalue(which)
        better = max if which == "full" else min
        head, *rows = written.csv("weight_quality")
        assert [row[0] for row in rows] == ["all pets", "day", "night"]
        for g, row in zip((None, 0, 1), rows, strict=True):
            members = [t for t in range(T) if g is None or written.groups[t] == g]
            counted = [t for t in members if which == "less" or written.scores_alone[:, t].any()]
            sums = np.zeros(4)
            for t in counted:
                alone, weights = written.scores_alone[:, t], written.weights[t]
                asked = better(s for s, w in zip(alone, weights, strict=True) if w > 0)
                sums += [alone[int(np.argmax(weights))], sum(alone) / M, asked, better(alone)]
            assert row[1:3] == [str(len(members)), str(len(counted))]
            np.testing.assert_allclose(np.array(row[3:7], float), sums / len(counted))
        whole = dict(zip(head, rows[0], strict=True))
        text = " ".join(written.page.texts["p"])
        assert (f"Counted are the {whole['counted']} of 60" in text) == (which == "full")
        top, random, oracle = (
            float(whole[key])
            for key in ("top-weighted expert", "random expert (expectation)", "best expert")
        )
        text_of = written.measure.text
        assert f"has there {written.measure.name} {text_of(top)}, one drawn uniformly " in text
        part = (top - random) / (oracle - random)
        assert (f"cover {100 * part:.1f} % of the way" in text) == (part >= 0)

    def test_over_k(self, full):
        assert full.csv("accuracy_over_k") == [
            ["K", "mean", "spread (std)", "run 1", "run 2"],
            ["1", "0.5", "", "0.5", ""],
            ["2", "0.8500000000000001", "0.07071067811865474", "0.9", "0.8"],
        ]

    def test_cost(self, full, less):
        head, *rows = full.csv("accuracy_against_cost")
        # Nothing has GFLOPs: no column for them.
        assert head == [
            "method",
            "accuracy, %",
            "spread (std)",
            "expert forwards per sample",
            "ms per sample",
            "on the Pareto front",
        ]
        assert rows == [
            ["oracle", "0.9", "", "3.0", "", "bound"],
            [NASTY, "0.8", "", "2.0", "3.5", "yes"],
            ["single", "0.5", "0.1", "1.0", "", "yes"],
        ]
        assert "without a point: Zoo-Tuning." in " ".join(full.page.texts["p"])
        assert full.page.texts["strong"] == [NASTY, "80.0"]
        _, *rows = less.csv("error_against_cost")
        assert [row[0] for row in rows] == ["oracle", "ours", "single"]
        assert less.page.texts["strong"] == ["ours", "1.000"]

    @pytest.mark.parametrize("which", ["full", "less"])
    def test_missed(self, which, request):
        written = request.getfixturevalue(which)
        sign = 1 if which == "full" else -1
        better = sign * written.scores_alone > sign * written.scores
        missed = [t for t in range(T) if better[:, t].any()]
        assert len(missed) > 12
        text = written.page.texts["p"][-2]  # the last is the footer
        assert f"On {len(missed)} of 60 test samples ({100 * len(missed) / T:.1f} %) some" in text
        asked = sum((better[:, t] & (written.weights[t] > 0)).any() for t in missed)
        assert f"on {asked} of these, a better expert was among" in text
        head, *rows = written.csv("missed")
        name = written.measure.name
        assert head[:4] == ["sample", "light", "true", name]
        assert head[4:] == [*(f"weight of {e}" for e in EXPERTS), *(f"{e} alone" for e in EXPERTS)]
        assert [int(row[0]) for row in rows] == missed
        for t, row in zip(missed, rows, strict=True):
            assert row[1:3] == [GROUPS[written.groups[t]], f"<i>{t}</i>"]
            numbers = [written.scores[t], *written.weights[t], *written.scores_alone[:, t]]
            assert [float(cell) for cell in row[3:]] == numbers
        cells = written.page.texts["td"]
        for g in range(2):
            members = [t for t in range(T) if written.groups[t] == g]
            part = np.mean([t in missed for t in members])
            assert f"{100 * part:.1f} %" in cells
            assert written.measure.number(np.mean(written.scores[members])) in cells
        assert f"12 of the {len(missed)}, in turn by light" in written.page.texts["figcaption"][-1]

    def test_samples_are_the_first_of_each_group(self, full):
        _, *rows = full.csv("samples")
        shown = [int(row[0]) for row in rows]
        day, night = (np.flatnonzero(full.groups == g)[:7].tolist() for g in range(2))
        assert shown == day + night
        captions = full.page.texts["figcaption"]
        assert any("by light: the first of each, not chosen" in text for text in captions)

    def test_those_that_lose_most_come_first(self, tmp_path):
        given, shown = errors(), []

        def images(indices):
            shown.extend(indices)
            return np.zeros((len(indices), 3, 8, 8), np.uint8)

        analysis = Analysis(**(given | {"images": images}))
        loss = analysis.scores - analysis.scores_alone.min(axis=0)
        sections.missed(analysis, FigureFolder(tmp_path, 0.2))
        for g in range(2):
            members = np.flatnonzero(analysis.missed & (analysis.groups == g))
            most = members[np.argsort(-loss[members])[:6]]
            assert sorted(t for t in shown if analysis.groups[t] == g) == sorted(most)


class TestExtremes:
    def test_many_groups_show_those_with_the_smallest_lead(self, tmp_path):
        measure = Measure("error", "min", (0.0, 1.0))
        groups = np.arange(T) % 40  # the first ten without a sample that counts: they come last
        alone = np.where(groups < 10, 1.0, np.random.default_rng(2).random((M, T)))
        names = [str(i) for i in range(40)]
        given = fields(scores_alone=alone, groups=groups, group_names=names, measure=measure)
        analysis = Analysis(**given | {"rows": [], "values_by_k": None})
        (picture,) = sections.quality(analysis, FigureFolder(tmp_path, 0.2)).items
        chosen = "Shown are 30 of 40: those with the smallest lead. The CSV has all."
        assert chosen in picture.caption
        shown = [label.get_text() for label in picture.figure.axes[0].get_yticklabels()]
        assert [label.split()[0] for label in shown] == ["all", *names[10:]]

    def test_all_right_and_none_right(self, tmp_path):
        ones, folder = np.ones((M, T)), FigureFolder(tmp_path, 0.2)
        analysis = Analysis(**fields(scores=ones[0], scores_alone=ones, images=None))
        section = sections.missed(analysis, folder)
        assert section.text.startswith("On 0 of 60 test samples (0.0 %) some expert alone")
        assert section.items == ()
        text = sections.quality(analysis, folder).text
        assert "has there accuracy 100.0 %, one drawn uniformly 100.0 %" in text
        assert "of the way" not in text
        assert "differ" not in text
        equal = {"measure": ERROR, "scores": 0.1 * ones[0], "scores_alone": 0.1 * ones}
        analysis = Analysis(**fields(**equal, rows=(), values_by_k=None))
        assert "of the way" not in sections.quality(analysis, folder).text  # 0.1 is not their mean
        analysis = Analysis(**fields(scores_alone=0 * ones, images=None))
        section = sections.quality(analysis, folder)
        assert section.text.endswith("So there is nothing to compare.")
        assert section.items == ()

    def test_one_sample(self, tmp_path):
        given = fields(
            scores=[1.0], scores_alone=[[1.0]], weights=[[0.5]], expert_names=["a"], k=1,
            groups=None, group_names=None, rows=[{"name": "a", "value": 1.0, "forwards": 1}],
            values_by_k={1: [1.0]}, images=None, history=None, details={},
        )  # fmt: skip
        text = Written(tmp_path, given).page.texts["p"][1]
        assert "asks 1 of 1 expert about each of 1 test sample of pets" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.full(T, 2.0)}, r"scores: expected accuracy in 0\.\.1, got 2"),
        ({"scores": np.full(T, np.nan)}, "60 of its numbers NaN"),
        ({"scores": []}, "weights has shape"),
        ({"scores_alone": np.zeros((T, M))}, r"scores_alone has shape \[60, 3\] .* \[3, 60\]"),
        ({"weights": np.zeros((T, M + 1))}, r"weights has shape \[60, 4\] .* \[60, 3\]"),
        ({"weights": np.full((T, M), np.nan)}, "180 of its numbers NaN"),
        ({"weights": np.full((T, M), 2.0)}, "weights: expected fraction"),
        ({"expert_names": ["a"]}, r"weights has shape \[60, 3\] .* \[60, 1\]"),
        ({"k": 4}, r"k: expected an integer in 1\.\.3, got 4"),
        ({"k": 0}, "got 0"),
        ({"groups": None}, "group_names is given without groups"),
        ({"group_names": None}, "groups is given without group_names"),
        ({"groups": np.full(T, 3)}, "groups holds 3, but there are 3 group_names"),
        ({"groups": np.zeros(T)}, "groups is float64"),
        ({"heads": ["a"]}, "heads has 1 entries for 60 samples"),
        ({"marked": [True]}, "marked has 1 entries"),
        ({"details": {"true": [1]}}, "true has 1 entries"),
        ({"values_by_k": {2: [93.5]}}, r"values_by_k\[2\]: expected accuracy"),
        ({"values_by_k": {0: [0.5]}}, "values_by_k has K = 0"),
        ({"values_by_k": {2: []}}, "K = 2 with 0 values"),
        ({"rows": [{"value": 1}]}, r"rows\[0\] has no name"),
        ({"notes": "one"}, "notes is a str"),
    ],
)  # fmt: skip
def test_errors_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        Analysis(**fields(**changes))
