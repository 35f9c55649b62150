"""``hubpath budget``, and how other commands follow what it found."""

from __future__ import annotations

import json
import re

import pytest
import torch
from support.command import hubpath, refused

from hubpath_fast.model import FixedRoutes
from hubpath_fast.recipes import budget as recipe
from hubpath_fast.recipes.budget import policy_for
from hubpath_fast.recipes.evaluate import evaluate
from hubpath_fast.runs.folder import RunFolder, open_run

HUB = "test_resnet,test_efficientnet,test_resnet"
FIT = [
    "fit", "--dataset", "digits", "--hub", HUB, "--no-pretrained", "--k", 2, "--lr", 3e-3,
    "--steps", 12, "--batch-size", 16, "--image-size", 32, "--workers", 0,
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget") / "run"
    hubpath(*FIT, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def said(run):
    return hubpath("budget", run).output


@pytest.fixture(scope="module")
def result(run, said):
    return json.loads((run / "budget.json").read_text())


def test_it_writes_the_curve_and_the_figures(run, said, result):
    assert (run / "budget.png").read_bytes().startswith(b"\x89PNG")
    assert "hub under a budget" in (run / "budget.svg").read_text()
    assert re.search(r"at \d+ of 13 budgets.* better on validation images", said)
    assert len(result["curve"]) == 13
    assert [len(row["experts"]) for row in result["ensembles"]] == [1, 2, 3]
    assert result["images"] == {"validation": 60, "test": 797}
    times = result["milliseconds"]
    least = times["router"] + min(times["experts"])
    assert result["curve"][0]["budget"] == pytest.approx(least, rel=1e-12)
    values = [point["validation"]["value"] for point in result["curve"]]
    assert values == sorted(values)
    for point in result["curve"]:
        assert point["validation"]["milliseconds"] <= point["budget"] * (1 + 1e-9)
    for row in result["cascades"]:
        assert row["validation"]["milliseconds"] <= row["budget"] * (1 + 1e-9)


def test_what_it_foretells_is_what_an_evaluation_finds(run, result):
    plain = evaluate(run)
    assert plain["accuracy"] == pytest.approx(result["hub"]["test"]["value"], abs=1e-12)
    for point in (result["curve"][0], result["curve"][6]):
        found = evaluate(run, budget_ms=point["budget"])
        assert found["accuracy"] == pytest.approx(point["test"]["value"], abs=1e-12)
        forwards = sum(found["routes"]["share"])
        assert forwards == pytest.approx(point["test"]["forwards"], abs=1e-9)
    for row in result["top_mass"][:2]:
        found = evaluate(run, top_mass=row["policy"]["top_mass"])
        assert found["accuracy"] == pytest.approx(row["test"]["value"], abs=1e-12)


def test_a_prediction_follows_a_budget(run, result, tmp_path):
    from PIL import Image

    Image.new("RGB", (32, 32), "white").save(tmp_path / "a.png")
    least = result["curve"][0]["budget"]
    plain = hubpath("predict", run, tmp_path / "a.png").output
    cheap = hubpath("predict", run, tmp_path / "a.png", "--budget-ms", least * 1.0001).output
    assert plain.split("experts: ")[1].count(",") == 1
    assert cheap.split("experts: ")[1].count(",") <= 1
    scored = hubpath("evaluate", run, "--budget-ms", least * 1.0001).output
    assert 1 <= float(re.search(r"([0-9.]+) experts an image, by the policy", scored)[1]) < 2
    assert "experts an image, by the policy" in hubpath("evaluate", run, "--top-mass", 0.9).output


def test_wrong_budgets_are_refused(run, result):
    least = result["curve"][0]["budget"]
    text = refused("evaluate", run, "--budget-ms", least / 2)
    assert "budget-ms: expected at least" in text
    assert "the cheapest expert" in text
    for wrong in ("nan", -1, 0, "inf"):
        text = refused("evaluate", run, f"--budget-ms={wrong}")
        assert "budget-ms: expected a finite number of milliseconds above 0" in text
    assert "give one of them" in refused("evaluate", run, "--budget-ms", 9, "--top-mass", 0.9)
    assert "top_mass: expected a number above 0" in refused("evaluate", run, "--top-mass", 0)


def test_without_a_sweep_a_budget_is_measured_then(run, tmp_path, result):
    kept = (run / "budget.json").read_bytes()
    (run / "budget.json").unlink()
    try:
        found = evaluate(run, budget_ms=1e9)  # whatever this machine takes
        assert not (run / "budget.json").exists()
    finally:
        (run / "budget.json").write_bytes(kept)
    assert sum(found["routes"]["share"]) <= 2


def test_a_damaged_file_or_one_of_another_device_is_refused(run, result):
    path = run / "budget.json"
    kept = path.read_bytes()
    try:
        path.write_text("{")
        assert "budget.json is damaged" in refused("evaluate", run, "--budget-ms", 5)
        path.write_text(json.dumps(result | {"device": "cuda:0"}))
        text = refused("evaluate", run, "--budget-ms", 5)
        assert "has the times of cuda, got cpu" in text
        point = result["curve"][-1]
        for wrong in (
            {"curve": []},
            {"curve": [point | {"budget": 1e6}]},
            {"curve": [point | {"budget": [1]}]},
            {"experts": 3},
            {"device": 3},
        ):
            path.write_text(json.dumps(result | wrong))
            assert "budget.json is damaged" in refused("evaluate", run, "--budget-ms", 500)
        path.write_text("[1]")
        assert "budget.json is damaged" in refused("evaluate", run, "--budget-ms", 500)
    finally:
        path.write_bytes(kept)


def test_what_was_measured_of_another_model_is_refused(run, result):
    opened = open_run(run)
    assert policy_for(run, opened.model, 1e6) is not None
    opened.model.k = 1
    with pytest.raises(ValueError, match="measured of another model"):
        policy_for(run, opened.model, 1e6)
    opened = open_run(run)
    with torch.no_grad():
        next(opened.model.generator.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="measured of another model"):
        policy_for(run, opened.model, 1e6)


def test_a_budget_below_the_cheapest_is_refused_before_experts_are_asked(
    run, result, tmp_path, monkeypatch
):
    model, got = open_run(run).model, []
    monkeypatch.setattr(recipe, "BUDGET", "none.json")
    monkeypatch.setattr(recipe, "ask", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match="budget-ms: expected at least"):
        policy_for(run, model, 1e-9)
    monkeypatch.setattr(
        recipe, "open_held_out", lambda opened, run, root, why: got.append(root) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        recipe.follow(run, model, 5.0, data_root=tmp_path)
    assert got == [tmp_path]


def test_fixed_routes_leave_nothing_to_choose(run, result):
    folder = RunFolder(run)
    folder.write_routes(FixedRoutes([0, 2], [0.5, 0.4], 3))
    try:
        assert "nothing to choose" in refused("budget", run)
        assert sum(evaluate(run, top_mass=0.5)["routes"]["share"]) == 1.0
    finally:
        folder.write_routes(None)


def test_a_run_without_validation_images_is_refused(tmp_path):
    hubpath(*FIT, "--steps", 1, "--validation", 0, "--out", tmp_path / "run")
    assert "holds out no validation images" in refused("budget", tmp_path / "run")
