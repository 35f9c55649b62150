"""Experts from files have short names wherever people read them, and their files stand once."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import timm
import torch
from support.command import hubpath
from support.compare import settings_of
from support.pages import Page, read_csv

from hubpath_fast.compare.methods import choose_methods, methods_of
from hubpath_fast.compare.tables import describe, retitled
from hubpath_fast.data import DigitsTask, write_image_folder
from hubpath_fast.recipes.predict import predict

NAMES = ["fold0/test_resnet", "fold1/test_resnet", "my-birds", "test_vit"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_image_folder(DigitsTask(0, 60), tmp_path_factory.mktemp("digits"), limit=60)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Two files of equal stem that says nothing, one that says something, and a name."""
    folder, texts = tmp_path_factory.mktemp("runs"), []
    for name in ("fold0/model_best.pth.tar", "fold1/model_best.pth.tar", "my-birds.pth"):
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save({"state_dict": timm.create_model("test_resnet").state_dict()}, folder / name)
        texts.append(f"file/{folder / name}?arch=timm/test_resnet")
    return [*texts, "test_vit?freeze=body"]


@pytest.fixture(scope="module")
def run(digits, hub, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "run"
    said = hubpath(
        "fit", "--data", digits, "--hub", ",".join(hub), "--no-pretrained", "--image-size", 32,
        "--batch-size", 8, "--workers", 0, "--steps", 2, "--out", out,
    ).output  # fmt: skip
    return out, said


def test_fit_says_each_file_once(run, hub):
    _, said = run
    assert f"hub   {', '.join(NAMES)} (random weights), K = 2 of 4" in said
    for name, source in zip(NAMES, hub, strict=True):
        assert said.count(source) == 1
        assert f"\n      {name} = {source}\n" in said


def test_events_are_under_short_names(run):
    data = b"".join(path.read_bytes() for path in (run[0] / "tensorboard").iterdir())
    assert all(f"load/{name}".encode() in data for name in NAMES)
    assert b"file/" not in data


def test_predict_and_the_report_use_short_names(run, digits, hub, tmp_path):
    out, _ = run
    [found] = predict(out, [next((digits / "test").rglob("*.png"))])
    assert set(found.experts) <= set(NAMES)
    hubpath("report", out)
    figures = out / "report/figures"
    assert [line[0] for line in read_csv(figures / "mean_weight.csv")[1:]] == NAMES
    assert [f"weight of {n}" for n in NAMES] == [
        column for column in read_csv(figures / "samples.csv")[0] if column.startswith("weight of")
    ]
    page = Page((out / "report/report.html").read_text())
    for name, source in zip(NAMES, hub, strict=True):
        assert page.texts["td"].count(source) == 1  # the legend
        assert name in page.texts["th"]
    assert not any("file/" in text for text in page.texts["p"])


def test_a_report_of_names_alone_has_no_legend(digits, tmp_path):
    options = ["--hub", "test_resnet,test_vit", "--no-pretrained", "--image-size", 32]
    options += ["--batch-size", 8, "--workers", 0, "--steps", 1, "--out", tmp_path / "run"]
    said = hubpath("fit", "--data", digits, *options).output
    assert "hub   test_resnet, test_vit (random weights), K = 2 of 2" in said
    assert " = test_resnet" not in said
    hubpath("report", tmp_path / "run")
    assert "model, file or folder" not in (tmp_path / "run/report/report.html").read_text()


def test_tables_of_a_comparison(tmp_path, hub):
    settings = settings_of(tmp_path, ",".join(hub[1:3]))
    methods = methods_of(settings)
    alone = [m for m in methods if m.name.startswith("single:")]
    assert [m.name for m in alone] == ["single:test_resnet", "single:my-birds"]
    assert [m.title for m in alone] == ["single: test_resnet", "single: my-birds"]
    legend = f"Hub: test_resnet = {hub[1]}, my-birds = {hub[2]}. K = 1."
    assert describe(settings, (0,)).startswith(legend)
    # The names that earlier versions gave are understood, and their tables shown under new ones.
    assert choose_methods(f"single:{hub[1]}", methods) == alone[:1]
    comma = replace(alone[0], name="single:a,b", full="single:file/x,y/a,b.pth?arch=test_resnet")
    for text in ("single:a,b", f"{comma.full},single:my-birds", "ensemble, single:A,B"):
        assert choose_methods(text, [comma, *methods])[0] == comma
    with pytest.raises(ValueError, match="methods: 'single:a' is unknown"):
        choose_methods("single:a,c", [comma, *methods])
    old = {"method": f"single:{hub[2]}", "title": f"single: {hub[2]}", "mean": 0.5}
    assert retitled(old, methods) == {**old, "title": "single: my-birds"}
    other = {"method": "of-another-version", "title": "Other"}
    assert retitled(other, methods) == other


def test_warnings_of_a_collapse_use_short_names(digits, hub, tmp_path):
    options = ["--hub", ",".join(hub), "--no-pretrained", "--image-size", 32, "--batch-size", 8]
    options += ["--set", "trainer.collapse_entropy=1.0", "--workers", 0, "--steps", 3]
    options += ["--set", "trainer.log_every=1", "--out", tmp_path / "run"]
    with pytest.warns(UserWarning, match="the routing has collapsed") as seen:
        hubpath("fit", "--data", digits, *options)
    texts = [str(warning.message) for warning in seen]
    told = [text for text in texts if "the routing has collapsed" in text]
    assert re.search(r"expert \d \((.*?)\) has", told[0])[1] in NAMES
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert any("routing has collapsed" in json.dumps(json.loads(line)) for line in lines)
    assert not any("model_best" in line for line in lines)
