"""``hubpath shelf unfreeze``: a frozen hub's best experts, trained on end to end."""

from __future__ import annotations

import copy
import dataclasses
import json
import shlex
import shutil

import pytest
import torch
from support.body_shelves import OTHER_SIZE, SIZE, images_of, make_body_shelf, make_hub
from support.command import hubpath, refused
from support.shelves import make_shelf

from hubpath_fast.data import load_image
from hubpath_fast.data.kept import FileList
from hubpath_fast.data.transforms import eval_transform
from hubpath_fast.features import Shelf
from hubpath_fast.features.write import write_record
from hubpath_fast.hub.source import PlainTask
from hubpath_fast.recipes.shelf_unfreeze import fit_command, sentence, unfreeze
from hubpath_fast.runs.build import build_seeded
from hubpath_fast.runs.config import FitConfig
from hubpath_fast.runs.start import Start
from hubpath_fast.shelf import unfreeze as shelf_unfreeze
from hubpath_fast.shelf.model import join
from hubpath_fast.shelf.run import open_hub
from hubpath_fast.shelf.save import save_hub
from hubpath_fast.tasks.classification import ACCURACY


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return make_body_shelf(tmp_path_factory.mktemp("bodies"))


def words_of(out):
    return shlex.split((out / "command").read_text())


def begun(out):
    """(the model that the command's run begins with, its settings)."""
    words = words_of(out)
    assert words[:2] == ["hubpath", "fit"]
    config = FitConfig.from_dict(json.loads(hubpath(*words[1:], "--print-config").stdout))
    start = Start.read(config.start)
    model = build_seeded(config, PlainTask(len(start.classes)), config.image_size)
    start.check(start.classes, len(config.hub))
    start.load_into(model)
    return model.eval(), config


def images_of_test(shelf, size=SIZE):
    """The shelf's test images, and their numbers on it."""
    files = images_of(shelf.folder.parent / "data")["test"]
    images = torch.stack([eval_transform(size)(load_image(path)) for path in files])
    return images, shelf.splits["test"].double()


@pytest.mark.parametrize("aggregator", ["linear", "sum"])
@pytest.mark.parametrize("router", ["image", "features:f"])
def test_before_the_first_step_the_hub_says_what_the_frozen_one_said(
    shelf, tmp_path, router, aggregator
):
    hub = make_hub(shelf, tmp_path / "hub", "abd", router, aggregator=aggregator)
    result = unfreeze(shelf.folder, 3, hub, tmp_path / "out")
    assert result["notes"] == []
    model, config = begun(tmp_path / "out")
    frozen = open_hub(hub).model
    images, numbers = images_of_test(shelf)
    with torch.no_grad():
        torch.testing.assert_close(
            model.ask_all(images), frozen.ask_all(numbers), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(model(images), frozen(numbers), rtol=1e-5, atol=1e-5)
    assert (config.image_size, config.k) == (SIZE, 2)
    assert config.aggregator == aggregator
    assert config.data == str(shelf.folder.parent / "data")
    assert config.augment == "none"  # one view, the crop of evaluation, is all that the hub knows
    assert all("bn=running" in name for name in config.hub)
    assert config.router.partition(":")[0] == ("image" if router == "image" else "network")


def test_the_experts_that_go_on_are_those_whose_loss_hurts_most(shelf, tmp_path):
    hub = make_hub(shelf, tmp_path / "hub", "abcd")
    opened = open_hub(hub)
    numbers, model = shelf.splits["validation"], opened.model
    right = []
    for i in range(4):
        without = copy.deepcopy(model)
        without.remove_expert(i)
        with torch.no_grad():
            answers = without.eval()(numbers.double()).argmax(dim=1)
        right.append((answers == shelf.targets[numbers]).float().mean().item())
    result = unfreeze(shelf.folder, 3, hub, tmp_path / "out")
    names = [expert["name"] for expert in result["experts"]]
    [dropped] = set("abcd") - set(names)
    assert right["abcd".index(dropped)] == max(right)
    assert result["loss"]["value"] == pytest.approx(max(right))
    assert (result["of"], result["images"]) == (4, len(numbers))
    assert Start.read(tmp_path / "out" / "start.safetensors").experts == tuple(names)


def test_a_hub_of_one_expert_is_not_called_all(shelf, tmp_path):
    result = unfreeze(shelf.folder, 1, make_hub(shelf, tmp_path / "hub", "a", k=1), tmp_path / "o")
    assert sentence(result, ACCURACY).startswith("its one expert goes on: accuracy ")


def test_training_crops_are_those_of_the_shelfs_views(shelf, tmp_path):
    opened = open_hub(make_hub(shelf, tmp_path / "hub", "ab"))
    cropped = dataclasses.replace(shelf.record, views=4, flip=False, min_area=0.6)
    opened.shelf.record = cropped
    plan = shelf_unfreeze.plan_fit(opened, tmp_path / "out")
    words = shlex.split(fit_command(opened, plan, tmp_path / "out"))[1:]
    values = json.loads(hubpath(*words, "--print-config").stdout)
    assert [values[name] for name in ("augment", "min_area", "flip")] == ["host", 0.6, False]


def test_bodies_of_another_size_resize_inside_and_that_is_said(shelf, tmp_path):
    hub = make_hub(shelf, tmp_path / "hub", "ac")
    result = unfreeze(shelf.folder, 2, hub, tmp_path / "out")
    model, config = begun(tmp_path / "out")
    assert config.image_size == OTHER_SIZE
    assert [f"size={SIZE}" in name for name in config.hub] == [True, False]
    sizes, router = result["notes"]
    assert sizes.startswith(f"images are {OTHER_SIZE} px, and a resizes them to its own size")
    assert router.startswith("the router learned on images resized to 32 px")
    images, numbers = images_of_test(shelf, OTHER_SIZE)
    with torch.no_grad():
        found, expected = model.ask_all(images), open_hub(hub).model.ask_all(numbers)
    torch.testing.assert_close(found[:, 1], expected[:, 1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[:, 0], expected[:, 0], atol=1e-3)


def test_a_router_whose_network_gets_images_resized_is_said_to_begin_close(shelf, tmp_path):
    hub = make_hub(shelf, tmp_path / "hub", "abd", "features:e")
    [note] = unfreeze(shelf.folder, 3, hub, tmp_path / "out")["notes"]
    assert note.startswith("the router looks at e, which resizes images of 32 px to its own size")
    model, config = begun(tmp_path / "out")
    assert config.router.endswith("&size=160")
    assert torch.equal(model.generator.clean.weight, open_hub(hub).model.generator.clean.weight)


def test_the_command_trains_and_goes_on(shelf, tmp_path):
    own = shutil.copytree(shelf.folder, tmp_path / "shelf")
    make_hub(Shelf.open(own), own / "hub", "abd")
    result = hubpath("shelf", "unfreeze", own, "--top", 2)
    assert "2 of 3 experts go on: accuracy" in result.stdout
    words = words_of(own / "unfreeze")
    assert shlex.join(words) in result.stdout
    steps = ["--steps", 2, "--workers", 0, "--batch-size", 8, "--set", "save_every=1"]
    said = hubpath(*words[1:], *steps).stdout
    assert f"trained heads, router, aggregator of {own / 'unfreeze' / 'start.safetensors'}" in said
    hubpath("fit", "--resume", "--out", own / "unfreeze" / "run", "--set", "log_every=1")
    message = refused("shelf", "unfreeze", own)
    assert "unfreeze/run is a run that began with what was written" in message
    assert words_of(own / "unfreeze") == words
    hubpath("shelf", "unfreeze", own, "--out", tmp_path / "all")  # of three, and not of five
    assert words_of(tmp_path / "all")[-1] == str(tmp_path / "all" / "run")


def test_random_bodies_go_on_as_files_on_the_same_split(shelf, tmp_path):
    data, own, out = tmp_path / "data", tmp_path / "shelf", tmp_path / "out"
    shutil.copytree(shelf.folder.parent / "data" / "train", data / "train")
    shutil.copytree(shelf.folder.parent / "data" / "test", data / "test")
    hubpath(
        "shelf", "extract", "--data", data, "--hub", "timm/test_resnet,timm/test_byobnet",
        "--no-pretrained", "--image-size", SIZE, "--validation", 0.3, "--seed", 4, "--dtype",
        "fp32", "--out", own,
    )  # fmt: skip
    drawn = Shelf.open(own)
    make_hub(drawn, own / "hub", drawn.labels)
    unfreeze(own, 2, out=out)
    model, config = begun(out)
    assert all(str(out / "bodies") in name for name in config.hub)
    rows = drawn.images().rows
    cut = eval_transform(SIZE)
    images = torch.stack([cut(load_image(data / row.path)) for row in rows["test"]])
    with torch.no_grad():
        expected = open_hub(own / "hub").model.ask_all(drawn.splits["test"].double())
        torch.testing.assert_close(model.ask_all(images), expected, rtol=1e-5, atol=1e-5)
    hubpath(*words_of(out)[1:], "--steps", 1, "--workers", 0, "--batch-size", 4)
    assert FileList.read(out / "run" / "files.csv.gz").rows == rows
    # Images that were added since, by which another split would be drawn, are not used.
    classes = sorted(path for path in (data / "train").iterdir())
    for i in range(12):
        image = next(classes[i % len(classes)].glob("*.png"))
        shutil.copy(image, image.with_name(f"added{i}.png"))
    again = [*words_of(out)[1:-1], tmp_path / "again"]
    hubpath(*again, "--steps", 1, "--workers", 0, "--batch-size", 4)
    assert FileList.read(tmp_path / "again" / "files.csv.gz").rows == rows
    listed = out / "start.images.csv.gz"
    listed.write_bytes(listed.read_bytes()[:-1])
    message = refused(*words_of(out)[1:-1], tmp_path / "other")
    assert "start.safetensors, is another one than it was written with" in message
    listed.unlink()
    assert "start.safetensors, is gone" in refused(*words_of(out)[1:-1], tmp_path / "other")


@pytest.fixture(scope="module")
def hub(shelf, tmp_path_factory):
    return make_hub(shelf, tmp_path_factory.mktemp("hub") / "hub", "abd")


class TestRefusals:
    @pytest.mark.parametrize("top", [1, 4])
    def test_top_is_from_k_to_all(self, shelf, hub, tmp_path, top):
        message = refused(
            "shelf", "unfreeze", shelf.folder, "--hub", hub, "--top", top, "--out", tmp_path / "x"
        )
        assert "top: expected an integer in 2..3, since an image asks k=2 of the 3" in message
        assert not (tmp_path / "x").exists()

    def test_a_shelf_without_validation_images_says_nothing_of_experts(self, shelf, tmp_path):
        own = Shelf.open(shutil.copytree(shelf.folder, tmp_path / "shelf"))
        train, validation, test = own.record.sizes
        sizes = (train + validation, 0, test)
        write_record(own.folder, dataclasses.replace(own.record, sizes=sizes))
        make_hub(Shelf.open(own.folder), own.folder / "hub", "abd")
        assert "has no validation images" in refused("shelf", "unfreeze", own.folder, "--top", 2)

    def test_features_of_ones_own_have_no_body_to_train(self, tmp_path):
        other = make_shelf(tmp_path / "other")
        make_hub(other, other.folder / "hub", labels=("model0", "model1", "model2"))
        message = refused("shelf", "unfreeze", other.folder, "--top", 2)
        assert "is of features of your own" in message

    def test_a_body_that_ends_in_more_than_a_linear_layer(self, shelf, hub, tmp_path, monkeypatch):
        monkeypatch.setattr(shelf_unfreeze, "ends_linearly", lambda *_: False)
        with pytest.raises(ValueError, match=r"^a: its network ends with more than one linear"):
            unfreeze(shelf.folder, 3, hub, tmp_path / "out")
        assert not (tmp_path / "out" / "command").exists()

    def test_a_hub_that_a_newcomer_has_joined(self, shelf, hub, tmp_path):
        larger = open_hub(hub)
        join(larger.model, shelf, shelf.find("f"))
        models = (*larger.models, shelf.find("f"))
        save_hub(dataclasses.replace(larger, models=models), tmp_path / "larger")
        message = refused(
            "shelf", "unfreeze", shelf.folder, "--hub", tmp_path / "larger", "--top", 3
        )
        assert "unfreeze the hub that it was added to" in message
