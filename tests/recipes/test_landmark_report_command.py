"""``hubpath report`` of landmarks: a run and a comparison on a small WFLW, by what they stored."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch
from support.command import hubpath
from support.compare import QUIET
from support.faces import ATTRIBUTES, write_wflw
from support.pages import Page

from hubpath_fast.compare import compare
from hubpath_fast.compare.results import SeedResults
from hubpath_fast.compare.settings import make_settings
from hubpath_fast.recipes.analysis import outputs_of, report

HUB = "test_resnet,test_resnet"
SIZE = 64
# Of the six test faces one is in three subsets, and one in none.
GROUPS = [
    ("largepose",),
    ("largepose", "expression", "blur"),
    (),
    ("blur",),
    ("makeup",),
    ("blur",),
]


@pytest.fixture(scope="module")
def wflw(tmp_path_factory):
    root = tmp_path_factory.mktemp("wflw")
    train = [(f"train {i}.png", i, ()) for i in range(10)]
    test = [(f"test {i}, ü.png", 100 + i, groups) for i, groups in enumerate(GROUPS)]
    write_wflw(root, {"train": train, "test": test})
    return root


@pytest.fixture(scope="module")
def run(wflw, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    hubpath(
        "landmarks", "fit", "--dataset", "wflw", "--data-root", wflw, "--hub", HUB, "--k", 1,
        "--no-pretrained", "--steps", 2, "--batch-size", 4, "--image-size", SIZE, "--head-width", 8,
        "--workers", 0, "--out", out,
    )  # fmt: skip
    hubpath("report", out)
    return out


@pytest.fixture(scope="module")
def comparison(wflw, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    settings = make_settings(
        "wflw", HUB, str(wflw), rates=(0.02,), task="landmarks",
        top={"pretrained": False, "k": 1, "image_size": SIZE, "workers": 0},
        trainer={"steps": 1, "batch_size": 4},
    )  # fmt: skip
    compare(settings, "single,hub-pathway,mean-shape,oracle", (0,), out, 1, QUIET)
    report(out)
    return out


def table(folder, name):
    with open(folder / "report/figures" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def members(name):
    return [i for i, groups in enumerate(GROUPS) if name in groups]


class TestRun:
    def test_numbers_are_those_of_the_run(self, run):
        result = json.loads((run / "result.json").read_text())
        summary = {row["method"]: row for row in table(run, "cumulative_errors_summary")}
        hub = summary["Hub-Pathway"]
        for key, name in (("nme", "NME"), ("fr_10", "FR@10"), ("auc_10", "AUC@10")):
            assert float(hub[name]) == pytest.approx(result[f"test_{key}"], abs=1e-6)
        assert len(summary) == 4  # and two experts alone, and the best of them for each face
        page = Page((run / "report/report.html").read_text(encoding="utf-8"))
        assert "in percent of the inter-ocular distance" in " ".join(page.texts["p"])

    def test_faces_are_named_and_in_their_subsets(self, run):
        rows = table(run, "faces")
        assert sorted(int(row["sample"]) for row in rows) == list(range(6))
        for row in rows:
            i = int(row["sample"])
            assert row["image"] == f"test {i}, ü.png"
            assert row["line"] == str(i + 1)
            assert row["subset"] == (
                ", ".join(sorted(GROUPS[i], key=ATTRIBUTES.index)) or "none of these"
            )

    def test_errors_by_subset(self, run):
        errors = {int(row["sample"]): float(row["NME"]) for row in table(run, "faces")}
        (hub,) = [r for r in table(run, "error_by_group") if r["method"] == "Hub-Pathway"]
        assert list(hub)[2:] == ["largepose", "expression", "makeup", "blur", "none of these"]
        for name in ("largepose", "expression", "makeup", "blur"):
            mean = sum(errors[i] for i in members(name)) / len(members(name))
            assert float(hub[name]) == pytest.approx(mean)
        assert float(hub["none of these"]) == pytest.approx(errors[2])

    def test_maps_are_of_the_experts_asked(self, run):
        rows = table(run, "maps")
        assert len({row["sample"] for row in rows}) == 2
        assert len(rows) == 4  # K = 1: an expert and the hub for each
        weights = {int(row["sample"]): row for row in table(run, "faces")}
        for row in rows:
            if row["map of"] != "the hub":
                expected = weights[int(row["sample"])][f"weight of {row['map of']}"]
                assert float(row["weight"]) == float(expected) > 0


class TestComparison:
    def test_every_method_has_its_curve(self, comparison):
        rows = json.loads((comparison / "table.json").read_text())["rows"]
        summary = {row["method"]: row for row in table(comparison, "cumulative_errors_summary")}
        assert set(summary) == {row["title"] for row in rows}
        for row in rows:
            assert float(summary[row["title"]]["NME"]) == pytest.approx(row["mean"], rel=1e-6)
            assert float(summary[row["title"]]["FR@10"]) == pytest.approx(row["also"]["fr_10"])
        named = {row["method"] for row in table(comparison, "nme_against_cost")}
        assert named == set(summary) - {"mean shape"}

    def test_by_subset_and_maps(self, comparison):
        errors = SeedResults(comparison, 0, (0.02,)).predictions("single-1")["errors"]
        rows = {row["method"]: row for row in table(comparison, "error_by_group")}
        (name,) = [title for title in rows if title.startswith("single:") and "2" in title]
        assert float(rows[name]["blur"]) == pytest.approx(errors[members("blur")].mean().item())
        assert len(table(comparison, "maps")) == 4
        assert {row["image"] for row in table(comparison, "faces")} >= {"test 0, ü.png"}

    def test_without_the_models_weights_there_are_no_maps(self, comparison, tmp_path):
        copied, told = shutil.copytree(comparison, tmp_path / "out"), []
        (copied / "runs/seed-0/pathway/last/router.safetensors").unlink()
        page = Page(report(copied, tell=told.append).read_text(encoding="utf-8"))
        assert "From maps to a landmark" not in page.texts["h2"]
        assert "Worst, median and best" in page.texts["h2"]
        assert not (copied / "report/figures/maps.png").exists()  # the one of before
        assert any("cannot be opened, so its maps are not shown" in note for note in told)


def test_outputs_are_the_models_own():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            assert not self.training
            return self.scale * x

        def ask_all(self, x):
            return torch.stack([x, x + 1], dim=1)

    experts, hub = outputs_of(Model().train(), lambda indices: torch.tensor(indices).float())(
        [3, 5]
    )
    assert experts.tolist() == [[3, 4], [5, 6]]
    assert hub.tolist() == [6, 10]
    assert not hub.requires_grad
