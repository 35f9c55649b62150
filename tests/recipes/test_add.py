"""`hubpath add`: what it saves, what it reports on, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image
from support.command import hubpath, refused

import hubpath_fast as hp
from hubpath_fast.data import DigitsTask
from hubpath_fast.recipes import add as recipe
from hubpath_fast.runs.data import open_to_score
from hubpath_fast.runs.folder import open_run

HUB = ["--hub", "test_resnet,test_efficientnet", "--no-pretrained", "--workers", 0]
SMALL = ["--dataset", "digits", "--image-size", 32, "--batch-size", 12, "--steps", 2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("add") / "run"
    hubpath("fit", *HUB, *SMALL, "--out", out)
    return out


@pytest.fixture(scope="module")
def striped(tmp_path_factory):
    """80 striped digits, CLASS/NUMBER.png."""
    folder = tmp_path_factory.mktemp("add-data")
    digits = DigitsTask(0).rendered("target", "striped")
    for i in range(80):
        place = folder / digits.classes[digits.targets[i]]
        place.mkdir(exist_ok=True)
        Image.fromarray(digits.images[i, 0].numpy()).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def added(run, striped):
    """(OUT, what was printed)."""
    out = run.parent / "hub"
    more = ["--data", striped, "--out", out, "--no-pretrained", "--steps", 60]
    return out, hubpath("add", run, "test_byobnet", *more).stdout


def test_the_larger_hub_opens_anywhere_and_says_what_was_reported(run, added):
    out, printed = added
    result = json.loads((out / "add.json").read_text())
    model = hp.from_pretrained(out)
    assert model.origin.labels[-1] == result["label"] == "test_byobnet"
    own, given = result["groups"]
    assert (own["split"], own["images"], given["split"]) == ("test", 797, "held back")
    opened = open_run(run)
    test = open_to_score(opened.folder, opened.config).test
    for which, of in (("before", opened), ("after", dataclasses.replace(opened, model=model))):
        predictions, weights = recipe._predicted(of, test, "cpu")
        scores = opened.task.scores(predictions, torch.tensor(test.targets))
        assert own[which] == pytest.approx(scores.mean().item(), abs=1e-12)
    assert own["share"] == pytest.approx((weights[:, 2] > 0).double().mean().item())
    assert f"{100 * own['after']:.1f}" in printed
    assert "test_byobnet: fitted on" in printed


def test_what_the_hub_had_learned_is_the_same_to_the_bit(run, added):
    before, after = open_run(run).model, hp.from_pretrained(added[0])
    assert torch.equal(after.input_mean[:2], before.input_mean)
    for name in ("clean", "noise", "stem"):
        old, new = getattr(before.generator, name), getattr(after.generator.generator, name)
        assert torch.equal(old.weight, new.weight)
    assert torch.equal(before.aggregator.weight, after.aggregator.aggregator.weight)
    for old, new in zip(before.experts, after.experts, strict=False):
        pairs = zip(old.state_dict().values(), new.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_images_that_it_does_not_get_keep_experts_and_weights_to_the_bit(run, added):
    before, after = open_run(run).model, hp.from_pretrained(added[0])
    digits = DigitsTask(0)
    x = torch.cat([digits.test.images[:200], digits.rendered("test", "striped").images[:50]])
    with torch.no_grad():
        old, new = before.route(x), after.route(x)
    kept = ~(new.experts == 2).any(dim=1)
    assert 0 < kept.sum() < len(x)
    assert torch.equal(new.experts[kept], old.experts[kept])
    assert torch.equal(new.weights[kept], old.weights[kept])
    result = json.loads((added[0] / "add.json").read_text())
    # Rounding of float32: an expert's products depend on how many rows it gets.
    assert result["unchanged"]["largest_change"] < 1e-5


def test_no_image_is_in_two_parts(run, striped):
    own, given = recipe._groups(open_run(run), striped, None)
    assert (len(own.fit), len(own.choose), len(own.report)) == (240, 60, 797)
    parts = [set(part.paths) for part in (given.fit, given.choose, given.report)]
    assert len(set().union(*parts)) == sum(map(len, parts)) == 80
    [alone] = recipe._groups(open_run(run), None, None)
    assert len(alone.fit) + len(alone.choose) == 60
    assert not set(alone.fit.indices) & set(alone.choose.indices)
    assert len(alone.report) == 797
    assert [len(part) / 80 for part in parts] == pytest.approx([0.5, 0.25, 0.25], abs=0.1)


def test_the_run_is_left_as_it_is(run, added):
    names = {path.name for path in run.iterdir()}
    assert "add.json" not in names
    assert len(open_run(run).model.experts) == 2


def test_wrong_input_is_refused_before_anything_is_fitted(run, striped, tmp_path, added):
    def said(name="test_byobnet", run=run, out=tmp_path / "hub", *more):
        return " ".join(refused("add", run, name, "--out", out, "--no-pretrained", *more).split())

    assert "timm/test_resnet.r160_in1k is in the hub already, as test_resnet" in said("test_resnet")
    assert "already" in said("timm/test_resnet.r160_in1k?lr=0.1")
    assert "did you mean test_byobnet" in said("test_byobnett")
    assert "is a saved hub, which has no images of its own" in said(run=added[0])
    occupied = tmp_path / "photos"
    occupied.mkdir()
    (occupied / "a.txt").write_text("x")
    assert "photos" in said(out=occupied)
    assert (occupied / "a.txt").read_text() == "x"
    assert "photos" in said("test_byobnet", run, tmp_path / "hub", "--data", occupied)
    assert not (tmp_path / "hub").exists()


def test_a_run_that_holds_nothing_out_is_refused(run, tmp_path):
    other = tmp_path / "run"
    hubpath("fit", *HUB, *SMALL, "--validation", 0, "--out", other)
    said = " ".join(refused("add", other, "test_byobnet", "--out", tmp_path / "hub").split())
    assert "holds out no validation images" in said


def test_a_run_with_fixed_routes_is_refused(run, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    kept = {"experts": [0, 1], "weights": [0.5, 0.5]}
    (other / "routes.json").write_text(json.dumps(kept))
    said = " ".join(refused("add", other, "test_byobnet", "--out", tmp_path / "hub").split())
    assert "this is a FixedRoutes" in said


def test_a_newcomer_of_no_use_is_not_saved(run, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "calibrate", lambda *a: None)
    out = tmp_path / "hub"
    said = refused("add", run, "test_byobnet", "--out", out, "--no-pretrained", "--steps", 1)
    assert "makes nothing better" in " ".join(said.split())
    assert not out.exists()
