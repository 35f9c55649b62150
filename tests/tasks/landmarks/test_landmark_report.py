"""A report on landmarks: its numbers worked out here once more, its pages for odd data."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from support.drawn import assert_readable
from support.pages import Page

from hubpath_fast.report import Analysis, FigureFolder, style, write_analysis
from hubpath_fast.tasks.landmarks.layouts import LAYOUTS, LandmarkLayout
from hubpath_fast.tasks.landmarks.maps import gaussian_targets
from hubpath_fast.tasks.landmarks.report import chosen_faces, landmark_errors, methods
from hubpath_fast.tasks.landmarks.report_shape import mean_shape
from hubpath_fast.tasks.landmarks.task import Landmarks

NASTY = '<b>largepose</b> & "$x$"'
CELLS = 16  # a side of the maps


def layout(count, **more):
    return LandmarkLayout("own", count, **more)


def shape(count):
    """Points on a spiral: no two alike, no symmetry."""
    angle = np.linspace(0.3, 5.5, count)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.linspace(0.4, 1, count)[:, None]


class Case:
    """Faces about a mean shape, found with errors that grow with their number."""

    def __init__(self, points=5, total=40, experts=("a", "b", "c"), k=2, seed=0, **fields):
        rng = np.random.default_rng(seed)
        self.task = Landmarks(layout(points) if points < 60 else LAYOUTS["wflw"])
        self.true = 7.5 + 4.5 * shape(points) + rng.normal(0, 0.3, (total, points, 2))
        self.unit = rng.uniform(5, 9, total)
        self.scale = np.linspace(0.05, 1.5, total)[:, None, None]
        self.predicted = self.true + self.scale * rng.normal(0, 1, self.true.shape)
        confidence = rng.uniform(0, 1, (total, points, 1))
        extra = (
            np.ones((total, points, 1)),
            np.broadcast_to(self.unit[:, None, None], (total, points, 1)),
        )
        self.targets = torch.tensor(np.concatenate([self.true, *extra], 2), dtype=torch.float32)
        self.predictions = torch.tensor(
            np.concatenate([self.predicted, confidence], 2), dtype=torch.float32
        )
        self.by_hand = np.linalg.norm(self.predicted - self.true, axis=2) / self.unit[:, None]
        self.errors = self.by_hand.mean(axis=1)
        self.alone = rng.gamma(4, 0.02, (len(experts), total))
        weights = rng.dirichlet(np.ones(len(experts)), total)
        weights[np.argsort(np.argsort(-weights, axis=1), axis=1) >= k] = 0
        self.experts, self.weights = list(experts), weights / weights.sum(axis=1, keepdims=True)
        self.images = rng.integers(0, 256, (total, 3, 4 * CELLS, 4 * CELLS), dtype=np.uint8)
        self.given = {
            "title": "Hub-Pathway on own",
            "subtitle": "seed 0",
            "data_name": "own",
            "measure": self.task.metric,
            "expert_names": self.experts,
            "scores": self.task.scores(self.predictions, self.targets),
            "scores_alone": self.alone,
            "alone_title": "each alone",
            "weights": self.weights,
            "k": k,
            "images": lambda indices: self.images[np.asarray(indices)],
            **self.task.report(self.predictions, self.targets),
            **fields,
        }

    def outputs(self, indices):
        """Maps with their bump at the true point moved by half the expert's number."""
        true = torch.tensor(self.true[indices])
        bumps = [
            gaussian_targets(
                torch.cat([true + 0.5 * i, torch.ones_like(true[..., :1])], 2), CELLS, 1.0
            )
            for i in range(len(self.experts))
        ]
        maps = torch.stack(bumps, dim=1)
        return maps, maps.mean(dim=1)

    def write(self, folder):
        self.path = write_analysis(Analysis(**self.given), folder, scale=0.2)
        return Page(self.path.read_text(encoding="utf-8"))

    def csv(self, name):
        with open(self.path.parent / "figures" / f"{name}.csv", newline="", encoding="utf-8") as f:
            return list(csv.DictReader(f))


TITLES = [
    "Worst, median and best",
    "Cumulative errors",
    "Which landmarks are hard",
    "NME by subset",
    "From maps to a landmark",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    case = Case(subsets={NASTY: range(0, 40, 2), "blur": range(10, 20)})
    case.given["outputs"] = case.outputs
    case.page = case.write(tmp_path_factory.mktemp("run"))
    return case


class TestNumbers:
    def test_all_sections_in_turn_and_the_unit_is_said(self, run):
        titles = run.page.texts["h2"]
        assert [title for title in titles if title in TITLES] == TITLES
        text = " ".join(run.page.texts["p"])
        assert "in percent of the diagonal of the points' box" in text
        mean = 100 * run.errors.mean()
        assert f"its NME is {mean:.2f} %" in text

    def test_errors_of_landmarks(self, run):
        found = landmark_errors(run.predictions, run.targets)
        np.testing.assert_allclose(found, run.by_hand, rtol=1e-4)  # float32 coordinates
        rows = run.csv("error_by_landmark")
        assert [row["landmark"] for row in rows] == list("01234")
        for i, row in enumerate(rows):
            assert float(row["mean error"]) == pytest.approx(run.by_hand[:, i].mean(), rel=1e-4)
            assert float(row["share of samples above 10 %"]) == (run.by_hand[:, i] > 0.1).mean()
        worst = run.by_hand.mean(axis=0).argmax()
        assert any(f"Landmark {worst} is found worst" in text for text in run.page.texts["p"])

    def test_faces_are_the_worst_those_about_the_median_and_the_best(self, run):
        order = np.argsort(-run.errors)
        shown = [int(row["sample"]) for row in run.csv("faces")]
        assert shown == [*order[:4], *order[18:22], *order[-4:]]
        rows = run.csv("faces")
        assert float(rows[0]["NME"]) == pytest.approx(run.errors.max(), rel=1e-4)
        assert rows[0]["worst landmark"] == str(run.by_hand[shown[0]].argmax())
        points = run.csv("faces_points")
        assert len(points) == 12 * 5
        # In pixels of the crop: four to a cell.
        first = [float(points[0][name]) for name in ("true x", "true y", "predicted x")]
        expected = [*run.true[shown[0], 0], run.predicted[shown[0], 0, 0]]
        np.testing.assert_allclose(first, 4 * np.array(expected), rtol=1e-5)

    def test_curves(self, run):
        summary = {row["method"]: row for row in run.csv("cumulative_errors_summary")}
        compared = {"Hub-Pathway": run.errors, "best expert for each sample": run.alone.min(axis=0)}
        compared |= {f"{name} alone": run.alone[i] for i, name in enumerate("abc")}
        assert set(summary) == set(compared)
        for name, errors in compared.items():
            row = summary[name]
            assert float(row["NME"]) == pytest.approx(errors.mean(), rel=1e-4)
            assert float(row["FR@10"]) == (errors > 0.1).mean()
            area = np.maximum(0, 1 - errors / 0.1).mean()
            assert float(row["AUC@10"]) == pytest.approx(area, rel=1e-3)
        means = [float(row["NME"]) for row in summary.values()]
        assert means == sorted(means)
        for row in run.csv("cumulative_errors")[::50]:
            limit = float(row["NME at most"])
            for name, errors in compared.items():
                assert float(row[name]) == (errors <= limit).mean()

    def test_an_expert_has_its_colour_in_the_curves(self, run, tmp_path):
        analysis = Analysis(**run.given)
        (picture,) = run.given["own"][1](analysis, FigureFolder(tmp_path, 0.2)).items
        colors = {line.get_gid(): line.get_color() for line in picture.figure.axes[0].lines}
        for i, name in enumerate(run.experts):
            assert colors[f"{name} alone"] == style.look(i).color

    def test_by_subset(self, run):
        rows = {row["method"]: row for row in run.csv("error_by_group")}
        members = {"all own": range(40), NASTY: range(0, 40, 2), "blur": range(10, 20)}
        members["none of these"] = [t for t in range(1, 40, 2) if not 10 <= t < 20]
        for name, indices in members.items():
            hub, alone = (run.errors[list(indices)], run.alone[1][list(indices)])
            assert float(rows["Hub-Pathway"][name]) == pytest.approx(hub.mean(), rel=1e-4)
            assert float(rows["b alone"][name]) == pytest.approx(alone.mean())
        cells = run.page.texts["td"]
        assert f"{100 * (run.errors[10:20] > 0.1).mean():.1f} %" in cells

    def test_maps(self, run):
        rows = run.csv("maps")
        order = np.argsort(run.errors, kind="stable")
        assert [int(row["sample"]) for row in rows] == [order[19]] * 3 + [order[-1]] * 3
        for row in rows:
            i = int(row["sample"])
            mark = run.by_hand[i].argmax()
            assert row["landmark"] == str(mark)
            true = np.array([float(row["true x"]), float(row["true y"])])
            np.testing.assert_allclose(true, run.true[i, mark], rtol=1e-5)
            if row["map of"] == "the hub":
                assert row["weight"] == ""
                continue
            expert = run.experts.index(row["map of"])
            assert float(row["weight"]) == run.weights[i, expert] > 0
            found = np.array([float(row["x"]), float(row["y"])])
            # A quarter of a cell is what decoding promises away from the border.
            assert np.abs(found - (true + 0.5 * expert)).max() <= 0.25 + 1e-6

    def test_samples_are_marked_where_they_fail(self, run):
        assert run.given["marked"].tolist() == (run.errors > 0.1).tolist()
        assert run.given["heads"][3] == f"NME {100 * run.errors[3]:.2f} %"
        assert f"{(run.errors > 0.1).sum()} samples of 40" in " ".join(run.page.texts["p"])


def test_a_comparison_has_the_curves_of_all_its_methods(tmp_path):
    case = Case()
    scores = {"mean shape": np.full(40, 0.3), "single: a": case.alone[0]}
    scores |= {"Hub-Pathway": case.errors, "oracle": case.alone.min(0)}
    case.given["scores_of"] = lambda: scores
    forwards = {"single: a": 1, "Hub-Pathway": 2, "oracle": 3, "mean shape": None}
    case.given["rows"] = [
        {"name": name, "value": e.mean(), "forwards": forwards[name], "bound": name == "oracle"}
        for name, e in scores.items()
    ]
    page = case.write(tmp_path)
    summary = {row["method"]: row for row in case.csv("cumulative_errors_summary")}
    assert set(summary) == set(scores)
    assert summary["mean shape"]["FR@10"] == "1.0"
    (picture,) = case.given["own"][1](Analysis(**case.given), FigureFolder(tmp_path, 0.2)).items
    colors = {line.get_gid(): line.get_color() for line in picture.figure.axes[0].lines}
    # An expert has the colour that it has elsewhere, whatever stands before it in the table.
    assert colors["single: a"] == style.look(0).color
    assert methods(Analysis(**case.given))[1] == ["oracle"]
    # What asks nobody has no cost; it is no error, and is named.
    names = [row["method"] for row in case.csv("nme_against_cost")]
    assert sorted(names) == ["Hub-Pathway", "oracle", "single: a"]
    said = "Without a cost, for nothing is asked, so without a point, too: mean shape (30.00 %)."
    assert any(said in text for text in page.texts["p"])
    assert "NME by subset" not in page.texts["h2"]  # no groups at all


@pytest.mark.parametrize(
    ("given", "absent"),
    [
        ({"points": 98, "total": 30, "experts": [f"expert {i}" for i in range(12)]}, {3, 4}),
        ({"points": 1, "total": 1, "experts": ["alone"], "k": 1}, {3, 4}),
        ({"points": 2, "total": 2, "experts": ["<i>&amp;", 'b"'], "k": 1}, {3, 4}),
        ({"total": 11, "subsets": {"one": [3], "two": [3, 4]}}, {4}),
        ({"total": 13, "images": None}, {0, 3, 4}),
        ({"groups": np.arange(40) % 2, "group_names": ["x", "y"], "group_label": "subset"}, {4}),
        ({"total": 70, "subsets": {f"part {i}": [i, 60] for i in range(40)}}, {4}),
    ],
)
def test_odd_data_has_a_page(tmp_path, given, absent):
    page = Case(**given).write(tmp_path)
    expected = [title for i, title in enumerate(TITLES) if i not in absent]
    assert [title for title in page.texts["h2"] if title in TITLES] == expected


def test_many_faces_are_counted_but_few_points_drawn(tmp_path):
    case = Case(total=20_000)
    analysis, figures = Analysis(**case.given), FigureFolder(tmp_path, 0.2)
    (picture,) = case.given["own"][1](analysis, figures).items
    axes = picture.figure.axes[0]
    assert max(len(line.get_xdata()) for line in axes.lines) == 501
    assert (tmp_path / "cumulative_errors.png").stat().st_size < 200_000
    with open(tmp_path / "cumulative_errors_summary.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows["Hub-Pathway"]["FR@10"]) == (case.errors > 0.1).mean()


@pytest.mark.parametrize("total", [1, 2, 4, 5, 11, 12, 13, 1000])
def test_chosen_faces(total):
    scores = np.random.default_rng(0).random(total)
    lines = chosen_faces(scores)
    shown = np.concatenate(list(lines.values()))
    assert len(set(shown.tolist())) == len(shown) == min(total, 12)
    assert all(1 <= len(chosen) <= 4 for chosen in lines.values())
    assert (np.diff(scores[shown]) <= 0).all()
    if total == 1000:
        assert list(lines) == ["Worst", "About the median", "Best"]
        middle = scores[lines["About the median"]]
        assert middle.min() <= np.median(scores) <= middle.max()


class TestMeanShape:
    def test_turned_scaled_and_shifted_faces_have_one_shape(self):
        base, rng = shape(7), np.random.default_rng(0)
        angle, size = rng.uniform(-0.5, 0.5, 50), rng.uniform(2, 30, (50, 1, 1))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        faces = size * np.einsum("ijn,lj->nli", turn, base) + rng.uniform(-99, 99, (50, 1, 2))
        found = mean_shape(faces)
        # As the shape is, but for one turn, size and place.
        own, other = (p[:, 0] + 1j * p[:, 1] for p in (found, base - base.mean(axis=0)))
        ratio = own / other
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)
        assert abs(np.angle(ratio[0])) < 0.5
        assert (np.abs(own) ** 2).mean() == pytest.approx(1)

    def test_it_keeps_the_faces_own_turn(self):
        face = shape(7)
        np.testing.assert_allclose(
            mean_shape(np.stack([face, face]))
            * np.sqrt(((face - face.mean(0)) ** 2).sum(1).mean()),
            face - face.mean(axis=0),
        )

    def test_points_in_one_place_are_no_error(self):
        assert mean_shape(np.ones((3, 1, 2))).tolist() == [[0, 0]]
        assert np.isfinite(mean_shape(np.zeros((3, 4, 2)))).all()


def test_texts_of_the_curves_are_readable(tmp_path):
    case = Case(experts=["a_very_long_name/of_an_expert.with_many_parts_in1k_384"] * 9)
    case.experts = case.given["expert_names"] = [f"{i}_{n}" for i, n in enumerate(case.experts)]
    section = case.given["own"][1](Analysis(**case.given), FigureFolder(tmp_path, 0.2))
    figure = section.items[0].figure
    assert_readable(figure, figure.axes[1].texts)
