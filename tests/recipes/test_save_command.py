"""`hubpath save`, and the commands that take a saved hub or a checkpoint as they take a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.command import hubpath, refused
from support.saved_hubs import hub, saved

import hubpath_fast as hp
from hubpath_fast.recipes.evaluate import evaluate
from hubpath_fast.recipes.predict import predict
from hubpath_fast.runs.folder import open_run

ARCHIVE = Path(__file__).parents[1] / "data_files" / "old_run.tar.xz"  # of format 0


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eight images of two of the digits' classes, by class."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(8):
        path = folder / str(i % 2) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (30 * i, 255 - 20 * i, 10)).save(path)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ["--preset", "tiny", "--dataset", "digits", "--no-pretrained", "--steps", "2"]
    hubpath("fit", *options, "--set", "generator_width=2", "--set", "eval_every=1", "--out", out)
    return out


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    out = tmp_path_factory.mktemp("old") / "run"
    shutil.unpack_archive(ARCHIVE, out, filter="data")
    return out


@pytest.fixture(params=["run", "old"])
def any_run(request):
    return request.getfixturevalue(request.param)


def test_a_saved_run_predicts_as_the_run_does(any_run, photos, tmp_path):
    text = hubpath("save", any_run, tmp_path / "hub").stdout
    assert f"saved in {tmp_path / 'hub'}" in text.replace("\n", "")
    files = sorted(photos.rglob("*.png"))
    found, expected = predict(tmp_path / "hub", files), predict(any_run, files)
    assert found == expected  # labels, probabilities, which experts by what name
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one.probabilities, two.probabilities)
    ran, opened = open_run(any_run), open_run(tmp_path / "hub")
    assert (opened.classes, opened.image_size) == (ran.classes, ran.image_size)
    assert opened.config.trainer == ran.config.trainer
    assert evaluate(tmp_path / "hub", photos) == evaluate(any_run, photos)


def test_the_commands_take_a_saved_hub(run, photos, tmp_path):
    hubpath("save", run, tmp_path / "hub")
    one, two = (hubpath("predict", at, photos).stdout for at in (run, tmp_path / "hub"))
    assert one == two
    assert "experts: test_" in one
    said = refused("evaluate", tmp_path / "hub").replace("\n", " ")
    assert "has no data of its own; give what to score it on by --data" in said
    assert "8 images" in hubpath("evaluate", tmp_path / "hub", "--data", photos).stdout
    told = refused("landmarks", "predict", tmp_path / "hub", photos, "--box", "image", "--out",
                   tmp_path / "points").replace("\n", " ")  # fmt: skip
    assert "use `hubpath evaluate" in told


@pytest.mark.parametrize(("name", "any_run"), [("best", "run"), ("last", "run"), ("last", "old")],
                         indirect=["any_run"])  # fmt: skip
def test_a_checkpoint_of_a_run_is_opened_with_the_runs_data(name, any_run):
    opened = open_run(any_run / name)
    assert opened.folder.path == any_run.resolve()
    assert evaluate(any_run / name)["n"] == 797


def test_a_checkpoint_elsewhere_is_opened_as_a_saved_hub(run, photos, tmp_path):
    shutil.copytree(run / "best", tmp_path / "copy")
    assert evaluate(tmp_path / "copy", photos) == evaluate(run / "best", photos)
    assert hp.from_pretrained(run / "best").k == 2


def test_routes_that_a_run_keeps_are_saved(run, tmp_path):
    kept = shutil.copytree(run, tmp_path / "run")
    (kept / "routes.json").write_text(json.dumps({"experts": [3, 1], "weights": [0.75, 0.25]}))
    hubpath("save", kept, tmp_path / "hub")
    assert hp.from_pretrained(tmp_path / "hub").generator.experts == (3, 1)


def test_nothing_of_this_machine_is_written_down(run, tmp_path):
    hubpath("save", run, tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["run"]["fit"]["k"] == 2
    assert str(tmp_path.parent) not in json.dumps(config)
    assert not {"data", "cache_dir"} & set(config["run"]["fit"])


def test_folders_that_hold_something_else_are_not_written_over(run, tmp_path):
    assert "holds no saved hub" in refused("save", run, run).replace("\n", " ")
    assert "goes on from" in refused("save", run, run / "best").replace("\n", " ")
    assert "holds no run" in refused("save", tmp_path, tmp_path / "hub").replace("\n", " ")


def test_a_hub_without_class_names_is_told(photos, tmp_path):
    folder = saved(hub(), tmp_path / "hub")
    assert "classes=[...]" in refused("predict", folder, photos)
    saved(hub(), folder, classes=["0", "1", "2"])
    assert hubpath("predict", folder, photos).stdout.count("experts:") == 8
