"""What is wrong with a saved hub is said in one sentence, and nothing of it is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from support.saved_hubs import OUTPUTS, SIZE, TINY, hub, saved
from torch import nn

import hubpath_fast as hp
from hubpath_fast.checkpoints import INDEX_FILE, CheckpointError, SavedModel


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return saved(hub(), tmp_path_factory.mktemp("written") / "hub")


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "hub")


def refused(folder, words, **options) -> str:
    with pytest.raises(ValueError, match=words) as caught:
        hp.from_pretrained(folder, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


FIRST, SECOND = "experts/00-test_resnet.safetensors", "experts/01-test_efficientnet.safetensors"


@pytest.mark.parametrize("file", [FIRST, "router.safetensors", INDEX_FILE])
def test_a_missing_file_is_named(file, folder):
    (folder / file).unlink()
    assert "is missing" in refused(folder, re.escape(file))


def test_a_truncated_expert_is_named(folder):
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 100)
    refused(folder, "01-test_efficientnet.* is truncated or damaged")


def test_swapped_experts_are_told_by_their_hash(tmp_path):
    folder = saved(hub((TINY, TINY)), tmp_path / "hub")
    one, two = sorted((folder / "experts").iterdir())
    held = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(held)
    refused(folder, "00-test_resnet-1.* is the file of another save or model: .*SHA-256")


def test_an_index_that_names_other_tensors_is_told(folder):
    path = folder / INDEX_FILE
    index = json.loads(path.read_text())
    index["weight_map"]["experts.0.fc.scale"] = FIRST
    path.write_text(json.dumps(index))
    refused(folder, "experts.0.fc.scale is in .*by the index, in none in fact")


def test_an_expert_of_another_architecture_is_told_by_its_tensors(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model"]["experts"][0]["spec"] = "timm/test_nfnet"
    path.write_text(json.dumps(config))
    refused(folder, "is of another model")


def test_a_newer_format_is_told(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hubpath_format": 2}))
    refused(folder, "is of format 2, .*open it with a newer hubpath_fast")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("k"), "does not describe a hub .it lacks 'k'"),
        (lambda m: m.update(k=9), r"does not describe a hub .*1\.\.2"),
        (lambda m: m.update(experts=5), "does not describe a hub"),
        (lambda m: m["experts"][0].update(spec="timm/no_such_net"), "names what cannot be built"),
        (lambda m: m["generator"].update(kind="oracle"), "does not describe a hub .*generator"),
        (lambda m: m["task"].update(classes=["a", "b"]), "names 2 classes for 3 outputs"),
    ],
)
def test_a_config_that_says_something_else_is_named(change, words, folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model"]["task"] = {"name": "classification", "classes": ["a", "b", "c"]}
    change(config["model"])
    path.write_text(json.dumps(config))
    assert str(path) in refused(folder, words)


def test_folders_of_other_things_are_told(folder, tmp_path):
    import timm

    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path / "plain")
    refused(tmp_path / "plain", "holds a plain model of timm, test_resnet, .*local-dir:")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"empty holds no saved hub \(no config.json\)")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "fit.json").write_text('{"config": {}, "classes": [], "image_size": 32}')
    refused(tmp_path / "run", "run holds a run of `hubpath fit`; .*RUN/best")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is damaged")
    (folder / "config.json").write_text('{"model_type": "vit"}')
    refused(folder, "holds no saved hub")
    (folder / "config.json").write_text('{"trainer": {}, "run": {}}')
    refused(folder, "holds weights of an earlier version.*`hubpath save RUN DIR`")


class Bird(nn.Module):
    def __init__(self, outputs=OUTPUTS):
        super().__init__()
        self.layer = nn.Linear(3 * SIZE * SIZE, outputs)

    def forward(self, x):
        return self.layer(x.flatten(1))


def test_modules_that_no_name_builds_are_asked_for_by_a_list(tmp_path):
    model = hub((TINY, Bird()), generator=nn.Sequential(hp.PathwayGenerator(2)))
    folder = saved(model, tmp_path / "hub")
    refused(folder, r"modules: .*\(1: Bird, 'generator': Sequential\); give modules=\{1: Bird, ")
    refused(folder, r"modules: .*'generator'", modules={1: Bird()})
    refused(folder, r"0\.\.1, 'generator' or 'aggregator', got 2", modules={2: Bird()})
    refused(folder, "expected an nn.Module for 1, got type; make it first", modules={1: Bird})
    with pytest.raises(ValueError, match=r"module: .*\(1: Bird\); give module="):
        hp.load_expert(folder, 1)
    assert isinstance(hp.load_expert(folder, 1, module=Bird()), Bird)


def test_nothing_is_loaded_where_anything_is_wrong(tmp_path):
    folder = saved(hub((Bird(), Bird())), tmp_path / "hub")
    mine, other = Bird(), Bird(outputs=7)
    before = mine.layer.weight.clone()
    refused(folder, "is of another model: .*layer", modules={0: mine, 1: other})
    assert torch.equal(mine.layer.weight, before)


def test_no_such_expert_is_told(folder):
    for which in (2, -3, "resnet", True):
        with pytest.raises(ValueError, match=r"expected a number in 0\.\.1 or one of test_resnet"):
            hp.load_expert(folder, which)


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (["a", "b"], "expected 3 names, one for each output, got 2"),
        (["a", "b", "a"], "'a' occurs twice"),
        ("abc", "expected a list of names"),
        ([1, 2, 3], "expected a list of names"),
    ],
)
def test_other_class_lists_are_refused_and_nothing_is_written(classes, words, tmp_path):
    model = hub()
    with pytest.raises(ValueError, match=f"classes: {words}"):
        model.save_pretrained(tmp_path / "hub", classes=classes)
    assert model.origin.task is None
    assert not (tmp_path / "hub").exists()


def test_a_config_of_something_else_makes_no_saved_hub(tmp_path):
    (tmp_path / "config.json").write_text('{"model": {"name": "x"}, "data": 1}')
    (tmp_path / "thesis.py").touch()
    with pytest.raises(ValueError, match="is not empty and holds no saved hub"):
        hub().save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "thesis.py"]


def test_what_lies_beside_a_saved_hub_is_kept_when_it_is_saved_again(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("main")
    (folder / "notes.txt").write_text("mine")
    old = sorted(p.name for p in (folder / "experts").iterdir())
    hub((TINY, TINY)).save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / ".git" / "HEAD").read_text() == "main"
    new = sorted(p.name for p in (folder / "experts").iterdir())
    assert new == ["00-test_resnet-1.safetensors", "01-test_resnet-2.safetensors"] != old


def test_a_folder_of_something_else_is_not_replaced(folder, tmp_path):
    model = hub()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    with pytest.raises(ValueError, match="is not empty and holds no saved hub"):
        model.save_pretrained(tmp_path / "photos")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        model.save_pretrained(tmp_path / "photos" / "a.png")
    (folder / "state.pt").touch()
    with pytest.raises(ValueError, match="a checkpoint that its run goes on from"):
        model.save_pretrained(folder)


def test_bytes_that_changed_are_found_when_asked(folder):
    with open(folder / FIRST, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    hp.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"00-test_resnet.* is damaged"):
        SavedModel(folder).verify()
