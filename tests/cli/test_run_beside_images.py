"""A run, its seeds, its report and a comparison in the folder of its images, as of ``--data .``."""

from __future__ import annotations

import json
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image
from support.command import hubpath, refused

from hubpath_fast.runs.folder import RunFolder

FIT = [
    "fit", "--hub", "test_resnet,test_vit", "--no-pretrained", "--image-size", 32, "--steps", 2,
    "--batch-size", 4, "--workers", 0,
]  # fmt: skip


@pytest.fixture
def photos(tmp_path, monkeypatch):
    random = np.random.RandomState(0)
    for name in ("red", "green"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            pixels = random.randint(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path / "photos")
    return tmp_path / "photos"


def test_a_run_among_the_folders_of_its_images_is_no_class(photos):
    assert "2 classes, 14 train, 2 validation" in hubpath(*FIT, "--data", ".").output
    first = hubpath("evaluate", "hubpath-run").output
    hubpath("report", "hubpath-run")  # draws figures, which are PNG files
    assert (photos / "hubpath-run" / "report" / "figures").is_dir()
    assert hubpath("evaluate", "hubpath-run").output == first
    text = hubpath(*FIT, "--data", ".", "--out", "runs/seeds", "--seeds", "0,1").output
    assert text.count("2 classes, 14 train, 2 validation") == 2
    assert "left out: 2 folders that hubpath wrote (hubpath-run)" in text
    assert "2 classes, 14 train" in hubpath(*FIT, "--data", ".", "--resume").output
    # A copy of a run under another name; the report of one elsewhere.
    shutil.copytree("hubpath-run", "green/old")
    shutil.move("hubpath-run/report", "report")
    assert hubpath("evaluate", "hubpath-run").output == first


def test_a_run_of_data_here_is_looked_at_from_elsewhere(photos, monkeypatch):
    """The folder that holds ``photos`` looks like data with one class, photos."""
    hubpath(*FIT, "--data", ".", "--seeds", "0,1")
    first = hubpath("evaluate", "hubpath-run/seed-1").output
    monkeypatch.chdir(photos.parent)
    assert hubpath("evaluate", "photos/hubpath-run/seed-1").output == first
    folder = RunFolder(photos / "hubpath-run")
    assert folder.seeds()[0].data == folder.seed(1).record().config.data == str(photos)
    monkeypatch.chdir(photos)
    assert hubpath(*FIT, "--data", ".", "--seeds", "0,1", "--resume").output.count("is done") == 2


def test_a_run_is_not_written_into_a_class(photos):
    for out in (".", "red", "red/run", "../photos"):
        assert "lies in the data's folder" in refused(*FIT, "--data", ".", "--out", out)
    assert "among the images of" in refused(*FIT, "--data", ".", "--out", "red/run")


def test_a_run_whose_classes_were_named_in_another_form_goes_on(photos):
    """As of a run on macOS, whose folders' names were written letter by accent."""
    (photos / "red").rename("caf\u00e9")
    hubpath(*FIT, "--data", ".", "--out", "run")
    first = hubpath("evaluate", "run").output
    (photos / "caf\u00e9").rename("cafe\u0301")
    for file in ("fit.json", "last/config.json", "best/config.json"):
        held = json.loads((photos / "run" / file).read_text(encoding="utf-8"))
        text = unicodedata.normalize("NFD", json.dumps(held, ensure_ascii=False))
        assert "e\u0301" in text
        (photos / "run" / file).write_text(text, encoding="utf-8")
    assert hubpath("evaluate", "run").output == first
    assert hubpath("evaluate", "run", "--data", ".").output
    assert "2 classes" in hubpath(*FIT, "--data", ".", "--out", "run", "--resume").output
    assert RunFolder(photos / "run").record().classes == ("caf\u00e9", "green")
