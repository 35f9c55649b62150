"""The digits' shelf: its snapshots, which are the same wherever they are made, and its images."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional as F

from hubpath_fast.baselines import SingleModel
from hubpath_fast.data import DigitsTask, open_images
from hubpath_fast.data.transforms import eval_transform
from hubpath_fast.hub import build_experts
from hubpath_fast.recipes.shelf_snapshots import make_snapshots
from hubpath_fast.shelf.digits import (
    INDEX,
    NETWORKS,
    TAKEN,
    DigitsSnapshots,
    SnapshotSettings,
    digits_splits,
    write_shelf_images,
)

FAST = SnapshotSettings(taken=(1, 3))


def snapshots(folder, settings=FAST, seed=0, networks=("test_byobnet",)):
    return DigitsSnapshots(DigitsTask(seed), settings, networks, folder)


def contents(training):
    return [file.read_bytes() for file in training.files]


def test_shelf_has_200_models_of_different_names_and_steps(tmp_path):
    shelf = snapshots(tmp_path, SnapshotSettings(), networks=NETWORKS)
    assert len(shelf.specs) == len(set(shelf.specs)) == 5 * 4 * 10 == 200
    assert list(TAKEN) == [round(4 * 100 ** (i / 9)) for i in range(10)]
    stems = [file.stem for training in shelf.trainings for file in training.files]
    assert len(set(stems)) == 200
    assert stems[0] == "upright-resnet-0004"


def test_training_stopped_and_begun_again_writes_the_same_bytes(tmp_path):
    class Stopped(Exception):
        pass

    def stop(step):
        if step == FAST.taken[0]:
            raise Stopped

    whole, stopped = snapshots(tmp_path / "whole"), snapshots(tmp_path / "stopped")
    whole.train(whole.trainings[0])
    torch.manual_seed(5)  # what is drawn elsewhere does not matter to a training ...
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(Stopped):
        stopped.train(stopped.trainings[0], stop)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)  # ... nor it to them
    assert len(stopped.missing()) == 5
    stopped.train(stopped.trainings[0])
    assert len(stopped.missing()) == 4
    assert contents(whole.trainings[0]) == contents(stopped.trainings[0])


@pytest.mark.parametrize("harm", ["changed", "absent", "no index", "broken index"])
def test_damaged_training_is_missing(tmp_path, harm):
    shelf = snapshots(tmp_path)
    training = shelf.trainings[0]
    shelf.train(training)
    assert training not in shelf.missing()
    file = training.files[1]
    if harm == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    elif harm == "absent":
        file.unlink()
    elif harm == "no index":
        (training.folder / INDEX).unlink()
    else:
        (training.folder / INDEX).write_text(json.dumps(["no index"]))
    assert training in shelf.missing()


def test_key_hangs_on_all_that_determines_the_weights(tmp_path):
    plain = snapshots(tmp_path)
    others = [
        snapshots(tmp_path, seed=1),
        snapshots(tmp_path, SnapshotSettings(taken=(1, 4))),
        snapshots(tmp_path, SnapshotSettings(taken=(1, 3), lr=1e-3)),
        snapshots(tmp_path, networks=("test_resnet",)),
    ]
    keys = {t.key for shelf in (plain, *others) for t in shelf.trainings}
    assert len(keys) == 5 * 5
    assert [t.key for t in snapshots(tmp_path).trainings] == [t.key for t in plain.trainings]


def test_later_snapshots_know_their_rendering_and_keep_their_head(tmp_path):
    shelf = snapshots(tmp_path, SnapshotSettings(taken=(2, 60)), networks=("test_efficientnet",))
    turned = shelf.trainings[2]
    assert turned.rendering == "turned"
    shelf.train(turned)
    test = DigitsTask(0).rendered("test", "turned").subset(torch.arange(200))
    accuracies, losses = [], []
    for file in turned.files:
        [expert] = build_experts([turned.network], 10, False, 32)
        expert.body.load_state_dict(load_file(file))  # strict: with the head of the ten digits
        with torch.inference_mode():
            logits = SingleModel(expert).eval()(test.images)
        accuracies.append((logits.argmax(1) == test.targets).float().mean().item())
        losses.append(F.cross_entropy(logits, test.targets).item())
    # Ten classes: chance is 0.1, of 200 images less than 0.2 with all but certainty.
    assert accuracies[0] < 0.4
    assert accuracies[1] > 0.8
    assert losses[1] < losses[0]


def test_processes_write_the_same_bytes_as_this_one(tmp_path, capsys):
    apart, here = snapshots(tmp_path / "apart"), snapshots(tmp_path / "here")
    here.train(here.trainings[3])
    out = tmp_path / "out"
    out.mkdir()
    apart.train(apart.trainings[0])  # is there already, and not made again
    written = apart.trainings[0].files[0].stat().st_mtime_ns
    assert make_snapshots(apart, out, Console(width=100), workers=2) > 0
    assert apart.missing() == []
    assert list(out.iterdir()) == []
    assert apart.trainings[0].files[0].stat().st_mtime_ns == written
    assert contents(apart.trainings[3]) == contents(here.trainings[3])
    printed = capsys.readouterr().out
    assert printed.count("2 snapshots") == 4
    assert "upright" not in printed
    assert make_snapshots(apart, out, Console()) == 0.0


def test_failed_training_is_an_error_with_its_reason(tmp_path):
    shelf = snapshots(tmp_path, networks=("test_byobnet",))
    shelf.trainings = shelf.trainings[:1]
    shelf.trainings[0].folder.parent.mkdir()
    shelf.trainings[0].folder.write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"upright-byobnet failed: .*exists"):
        make_snapshots(shelf, tmp_path, Console(quiet=True), workers=1)


def test_every_target_digit_is_there_in_all_renderings_and_in_one_split():
    splits, task = digits_splits(0, 100), DigitsTask(0, 100)
    assert {name: len(data) for name, data in splits.items()} == {
        "train": 1000, "validation": 500, "test": 797,
    }  # fmt: skip
    assert list(splits) == ["train", "validation", "test"]
    torch.testing.assert_close(splits["test"].images, task.test.images, rtol=0, atol=0)
    for name, part in (("train", "target"), ("validation", "validation")):
        data, digits = splits[name], task.indices[part]
        assert data.renderings.tolist() == [0, 1, 2, 3, 4] * len(digits)
        drawn = getattr(task, part)  # each digit in one rendering
        places = 5 * np.arange(len(digits)) + task.renderings[part]
        torch.testing.assert_close(data.images[places], drawn.images, rtol=0, atol=0)
        assert data.targets[places].tolist() == drawn.targets.tolist()


def test_evaluation_of_the_files_shows_the_digits_to_the_bit(tmp_path):
    splits = {name: data.subset(torch.arange(200)) for name, data in digits_splits(0, 100).items()}
    opened = open_images(write_shelf_images(tmp_path, splits), 0.15, 0)
    for name, data in splits.items():
        split = {"train": opened.train, "validation": opened.validation, "test": opened.test}[name]
        assert len(split) == 200
        for i, path in enumerate(split.paths):
            number = int(path.stem.split("_")[0])
            image = eval_transform(32)(split.load(i))
            torch.testing.assert_close(image, data.images[number], rtol=0, atol=0)
            assert split.targets[i] == data.targets[number]
