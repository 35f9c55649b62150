"""``hubpath shelf add``: the newcomer gets the images that it knows, and all others stay."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.command import hubpath, refused
from support.shelves import make_hub, make_shelf
from torch import nn

from hubpath_fast.features import Shelf, write_shelf
from hubpath_fast.features.extract import Extracted
from hubpath_fast.recipes import shelf_add as recipe
from hubpath_fast.shelf import add as module
from hubpath_fast.shelf.add import NothingBetter, add_model
from hubpath_fast.shelf.heads import fit_heads
from hubpath_fast.shelf.run import open_hub

M = 4  # models of the shelf; the last is the newcomer, and knows a quarter of the images
SIZES = 120, 120, 120


@pytest.fixture
def shelf(tmp_path):
    return make_shelf(tmp_path / "shelf", M, sizes=SIZES)


def numbers(shelf, split="test"):
    return shelf.splits[split].double()


def same(one, two, x):
    with torch.no_grad():
        return torch.equal(one(x), two(x))


@pytest.mark.parametrize("aggregator", ["linear", "sum"])
@pytest.mark.parametrize(("k", "renormalize"), [(1, False), (3, False), (2, True)])
def test_predictions_of_other_images_stay_bit_equal(shelf, aggregator, k, renormalize):
    hub = make_hub(shelf, range(M - 1), k=k, aggregator=aggregator, renormalize=renormalize)
    if aggregator == "linear":
        nn.init.normal_(hub.model.aggregator.weight)
    before = copy.deepcopy(hub.model.state_dict())
    result, larger = add_model(hub, M - 1, steps=100)
    assert all(torch.equal(value, before[name]) for name, value in hub.model.state_dict().items())
    x = numbers(shelf)
    old, new = hub.model.route(x), larger.model.route(x)
    sent = (new.experts == M - 1).any(dim=1)
    assert 0 < sent.sum() < len(sent)
    assert torch.equal(new.experts[~sent], old.experts[~sent])
    assert torch.equal(new.weights[~sent], old.weights[~sent])
    assert same(larger.model, hub.model, x[~sent])
    # One by one, too; in a mixed batch an expert's product may round otherwise, by its rows.
    assert all(same(larger.model, hub.model, each) for each in x[~sent].split(1))
    torch.testing.assert_close(larger.model(x)[~sent], hub.model(x)[~sent], rtol=1e-5, atol=1e-5)
    [group] = result["groups"]
    assert group["share"] == pytest.approx(sent.double().mean().item())
    assert result["unchanged"] == {"images": int((~sent).sum()), "largest_change": 0.0}


def test_the_newcomer_gets_the_images_that_it_knows(shelf):
    hub = make_hub(shelf, range(M - 1))
    result, larger = add_model(hub, M - 1)
    # Shares are of each class: of one of 41 a third are 14.
    assert (result["fit_images"], result["choose_images"]) == (79, 41)
    assert result["loss"]["after"] < result["loss"]["before"]
    [group] = result["groups"]
    x, known = numbers(shelf), shelf.splits["test"] % M == M - 1
    sent = (larger.model.route(x).experts == M - 1).any(dim=1)
    assert sent[known].double().mean() > 0.9
    assert group["after"] > group["before"] + 0.1
    with torch.no_grad():
        found = (larger.model(x).argmax(dim=1) == shelf.targets[shelf.splits["test"]]).double()
    assert group["after"] == pytest.approx(found.mean().item())
    head = larger.model.experts[-1].layer
    assert torch.equal(head.weight, fit_heads(shelf, [M - 1])[0].weight)


def test_the_larger_hub_is_opened_as_it_was_made(shelf):
    make_hub(shelf, range(2))
    for label, out in (("model3", None), ("model2", shelf.folder / "two")):
        given = [] if out is None else ["--hub", shelf.folder / "hub+model3", "--out", out]
        said = hubpath("shelf", "add", shelf.folder, label, "--steps", 50, *given).output
        assert "changed by at most 0" in said
    opened = open_hub(shelf.folder / "two")
    assert opened.labels == ("model0", "model1", "model3", "model2")
    told = json.loads((shelf.folder / "two" / "add.json").read_text())
    assert told["expert"] == "model2"
    result, larger = add_model(open_hub(shelf.folder / "hub+model3"), 2, steps=50)
    assert told["groups"] == result["groups"]
    assert same(opened.model, larger.model, numbers(shelf))
    assert "prune the hub that it was added to" in refused(
        "shelf", "prune", shelf.folder, "--hub", opened.folder
    )


def test_without_test_images_some_of_validation_are_reported_on(tmp_path):
    shelf = make_shelf(tmp_path / "shelf", M, sizes=(120, 120, 0))
    result, _ = add_model(make_hub(shelf, range(M - 1)), M - 1, steps=100)
    [group] = result["groups"]
    assert group["split"] == "held back"
    assert (result["fit_images"], result["choose_images"], group["images"]) == (61, 29, 30)


def test_what_cannot_be_added_is_refused(shelf, tmp_path, monkeypatch):
    hub = make_hub(shelf, range(M - 1))
    for label, message in (
        ("model1", "is an expert of the hub"),
        ("model9", "no features of a model 'model9'; did you mean"),
    ):
        assert message in refused("shelf", "add", shelf.folder, label)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    said = refused("shelf", "add", shelf.folder, "model3", "--out", tmp_path / "full")
    assert "is not empty" in said
    watching = make_hub(shelf, range(M - 1), router="features:model3")
    with pytest.raises(ValueError, match=r"router .* looks at the features of model3"):
        add_model(watching, 3)
    few = make_shelf(tmp_path / "few", M, sizes=(60, 1, 30))
    with pytest.raises(ValueError, match="1 validation images, too few"):
        add_model(make_hub(few, range(M - 1)), 3)
    asked = []
    monkeypatch.setattr(module, "calibrate", lambda *seen, **_: asked.extend(map(len, seen[:2])))
    with pytest.raises(NothingBetter, match="model3 makes nothing better on the 41 val"):
        add_model(hub, 3)
    assert asked == [79, 41]


def test_two_newcomers_do_not_get_one_folder(tmp_path):
    made = make_shelf(tmp_path / "made", M, sizes=SIZES)
    labels = ("a", "b", "m #2", "m-2")
    shelf = write_shelf(
        tmp_path / "shelf",
        {label: made.features(i) for i, label in enumerate(labels)},
        made.targets,
        made.classes,
        dict(zip(("train", "validation", "test"), SIZES, strict=True)),
        made.pixels(),
    )
    make_hub(shelf, range(2))
    hubpath("shelf", "add", shelf.folder, "m #2", "--steps", 50)
    hubpath("shelf", "add", shelf.folder, "m #2", "--steps", 50)  # in its own place
    said = refused("shelf", "add", shelf.folder, "m-2", "--steps", 50)
    assert "is a hub with m #2 as its last expert, not m-2" in said
    assert open_hub(shelf.folder / "hub+m-2").labels == ("a", "b", "m #2")


def draw_images(folder, random):
    """Twelve images of each of two classes and splits."""
    for split, name in itertools.product(("train", "val", "test"), ("dark", "light")):
        (folder / split / name).mkdir(parents=True)
        for i in range(12):
            pixels = random.integers(0, 128, (32, 32, 3), dtype=np.uint8) + 127 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")


def test_a_model_that_is_not_there_is_extracted_first(tmp_path, monkeypatch):
    shelf, data = tmp_path / "shelf", tmp_path / "data"
    draw_images(data, np.random.default_rng(0))
    given = ["--data", data, "--image-size", 32, "--no-pretrained", "--out", shelf]
    hubpath("shelf", "extract", "--hub", "test_vit,test_byobnet", *given)
    make_hub(Shelf.open(shelf), range(2), k=1)
    said = refused("shelf", "add", shelf, "tiny")
    assert "expected a single model" in said
    said = hubpath("shelf", "add", shelf, "test_resnet", "--steps", 5).output
    opened = open_hub(shelf / "hub+test_resnet")
    assert opened.labels == ("test_vit", "test_byobnet", "test_resnet")
    assert "score fitted on 16 images, chosen on 8 others" in said
    assert "is an expert of the hub" in refused("shelf", "add", shelf, "test_vit")
    failed = Extracted(72, failed=[("test_nfnet", "its features are not finite")])
    monkeypatch.setattr(recipe, "extract_shelf", lambda *_, **__: failed)
    said = refused("shelf", "add", shelf, "test_nfnet")
    assert "name: test_nfnet: its features are not finite" in said
