"""``hubpath prune``: what it foretells, what it saves, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from support.command import hubpath, refused
from support.faces import write_wflw

import hubpath_fast as hp
from hubpath_fast.model import FixedRoutes
from hubpath_fast.runs.build import score
from hubpath_fast.runs.data import open_to_score
from hubpath_fast.runs.folder import RunFolder, open_run
from hubpath_fast.runs.prune import keep_only

HUB = "test_resnet,test_efficientnet,test_resnet,test_byobnet"
NAMES = ["test_resnet #1", "test_efficientnet", "test_resnet #2", "test_byobnet"]
FIT = [
    "fit", "--dataset", "digits", "--no-pretrained", "--lr", 3e-3, "--batch-size", 16,
    "--image-size", 32, "--workers", 0, "--set", "generator_width=2",
]  # fmt: skip
ALL = 100  # points: any hub is within them


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prune") / "run"
    hubpath(
        *FIT,
        "--hub",
        HUB,
        "--k",
        2,
        "--steps",
        20,
        "--set",
        "trainer.lr_router=0.1",
        "--out",
        folder,
    )
    return folder


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """(what is printed, prune.json, the smaller hub) of two experts."""
    out = tmp_path_factory.mktemp("smaller") / "hub"
    said = hubpath("prune", run, "--points", ALL, "--out", out).output
    return said, json.loads((run / "prune.json").read_text()), out


def scored(run, kept):
    """What a hub of these experts has, by running it: (validation, test)."""
    opened = open_run(run)
    keep_only(opened.model, tuple(kept))
    splits = open_to_score(RunFolder(run), opened.config)
    parts = (splits.validation, splits.test)
    config, size = opened.config, opened.image_size
    return [score(opened.model, opened.task, p, config, size)["accuracy"] for p in parts]


def test_what_it_foretells_is_what_smaller_hubs_do(run, saved):
    _, result, _ = saved
    whole = scored(run, range(4))
    assert result["value"] == pytest.approx(whole[0], abs=1e-12)
    assert [row["name"] for row in result["experts"]] == NAMES
    for i, row in enumerate(result["experts"][:2]):
        found = scored(run, [j for j in range(4) if j != i])
        assert row["without"]["value"] == pytest.approx(found[0], abs=1e-12)
        lost = 100 * (whole[0] - found[0])
        assert row["without"]["lost"] == pytest.approx(lost, abs=1e-9)
        low, high = row["without"]["interval"]
        assert low <= lost <= high
    chosen = result["chosen"]
    found = scored(run, [NAMES.index(name) for name in chosen["kept"]])
    assert chosen["validation"]["value"] == pytest.approx(found[0], abs=1e-12)
    assert chosen["test"]["value"] == pytest.approx(found[1], abs=1e-12)
    assert chosen["test"]["hub"] == pytest.approx(whole[1], abs=1e-12)
    assert (result["images"], chosen["test"]["images"]) == (60, 797)


def test_it_goes_down_to_k_experts(run, saved):
    said, result, _ = saved
    assert [step["left"] for step in result["steps"]] == [3, 2]
    assert result["chosen"]["dropped"] == sorted(
        (step["dropped"] for step in result["steps"]), key=NAMES.index
    )
    assert result["chosen"]["validation"]["lost"] == result["steps"][-1]["lost"]
    assert sum(row["asked"] for row in result["experts"]) == pytest.approx(2, abs=1e-9)
    assert "has 2 of 4 experts" in said
    assert "797 test images" in said
    assert "confirmed" in said


def test_the_smaller_hub_is_saved(run, saved):
    said, result, out = saved
    opened = open_run(out)
    assert list(opened.names) == result["chosen"]["kept"]
    assert f"saved in {out}: 2 experts" in said
    expected = open_run(run).model
    keep_only(expected, tuple(NAMES.index(name) for name in opened.names))
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 32, 32), generator=random, dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(hp.from_pretrained(out)(images), expected(images))
    assert opened.classes == open_run(run).classes
    assert (out / "README.md").is_file()


def test_where_nothing_can_go_nothing_is_saved(run, saved, tmp_path, monkeypatch):
    import hubpath_fast.recipes.prune as recipe

    monkeypatch.setattr(recipe, "smallest_within", lambda steps, points: None)
    said = hubpath("prune", run, "--out", tmp_path / "hub").output
    assert json.loads((run / "prune.json").read_text())["chosen"] is None
    assert "no smaller hub is within 0.5 points on 60 validation images" in said
    assert "nothing is saved" in said
    assert not (tmp_path / "hub").exists()


def test_the_expert_that_the_router_looks_at_stays(tmp_path):
    run = tmp_path / "run"
    hubpath(*FIT, "--hub", "test_resnet,test_efficientnet,test_resnet", "--k", 1, "--steps", 2,
            "--set", "router=expert:1", "--out", run)  # fmt: skip
    said = hubpath("prune", run, "--points", ALL, "--out", tmp_path / "hub").output
    assert "test_efficientnet stays: the router looks at its features" in said
    result = json.loads((run / "prune.json").read_text())
    assert [row["removable"] for row in result["experts"]] == [True, False, True]
    assert result["chosen"]["kept"] == ["test_efficientnet"]
    assert open_run(tmp_path / "hub").names == ("test_efficientnet",)


def test_landmarks_lose_where_the_error_grows(tmp_path):
    faces = [(f"train {i}.png", i, ()) for i in range(10)]
    write_wflw(tmp_path / "wflw", {"train": faces, "test": [("test.png", 50, ())]})
    run = tmp_path / "run"
    hubpath(
        "landmarks", "fit", "--dataset", "wflw", "--data-root", tmp_path / "wflw", "--hub",
        "test_resnet,test_resnet", "--k", 1, "--no-pretrained", "--steps", 2, "--batch-size", 4,
        "--image-size", 64, "--head-width", 8, "--workers", 0, "--validation", 0.3, "--out", run,
    )  # fmt: skip
    said = hubpath("prune", run, "--points", 1000).output
    result = json.loads((run / "prune.json").read_text())
    for row in result["experts"]:
        grown = 100 * (row["without"]["value"] - result["value"])
        assert row["without"]["lost"] == pytest.approx(grown, abs=1e-9)
    assert result["chosen"]["test"]["interval"] is None  # of a single face
    assert "NME" in said


def test_what_has_no_expert_to_spare_or_nothing_to_judge_by_is_refused(run, saved, tmp_path):
    assert "is a saved hub, which has no data" in refused("prune", saved[2]).replace("\n", " ")
    assert "points: expected" in refused("prune", run, "--points", "nan")
    assert "holds no saved hub" in refused("prune", run, "--out", run).replace("\n", " ")
    folder = RunFolder(run)
    folder.write_routes(FixedRoutes([0, 2], [0.5, 0.4], 4))
    try:
        assert "nothing to choose" in refused("prune", run).replace("\n", " ")
    finally:
        folder.write_routes(None)
    hubpath(*FIT, "--hub", "test_resnet,test_resnet", "--k", 2, "--steps", 1, "--out",
            tmp_path / "all")  # fmt: skip
    assert "none can be dropped" in refused("prune", tmp_path / "all").replace("\n", " ")
    hubpath(*FIT, "--hub", HUB, "--k", 1, "--steps", 1, "--validation", 0, "--out",
            tmp_path / "none")  # fmt: skip
    said = refused("prune", tmp_path / "none").replace("\n", " ")
    assert "no validation images, on which experts are dropped" in said
