"""Data that changes under a run: it goes on with what it began with, or says why it cannot."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from support.checkpoint_files import all_weights
from support.command import hubpath, refused
from support.source_trees import image

from hubpath_fast.data import open_dataset
from hubpath_fast.data.kept import FileList
from hubpath_fast.training import Trainer

CLASSES = ("blue", "red")
FIT = [
    "fit", "--hub", "test_resnet,test_vit", "--no-pretrained", "--steps", 6, "--batch-size", 4,
    "--image-size", 32, "--workers", 0, "--eval-every", 2,
]  # fmt: skip
FILES = "files.csv.gz"


class Stops(Trainer):
    """Stops by itself after three steps."""

    def _step(self, *batch):
        super()._step(*batch)
        if self.state.step == 3:
            self.stop()


@pytest.fixture
def stopped(monkeypatch):
    """stopped(arguments): what ``hubpath`` prints of a training that stops after three steps."""

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr("hubpath_fast.recipes.fit.Trainer", Stops)
            return hubpath(*arguments, status=130).output

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with data/, ten images of each class, and run/, uninterrupted."""
    root = tmp_path_factory.mktemp("whole")
    for name in CLASSES:
        for i in range(10):
            image(root / "data" / name / f"{i}.png")
    hubpath(*FIT, "--data", root / "data", "--out", root / "run")
    return root


@pytest.fixture
def data(whole, tmp_path):
    return shutil.copytree(whole / "data", tmp_path / "data")


def weights(run):
    return all_weights(run / "last")


def add(data, count=4):
    for name in CLASSES:
        for i in range(count // 2):
            image(data / name / f"new{i}.png")
    return (
        f"{count} images were added to {data} after this run was begun (e.g. blue/new0.png): not "
        "used; start a new run to use them"
    )


def held_out(run):
    return [row.path for row in FileList.read(run / FILES).rows["validation"]]


@pytest.mark.parametrize("cache", [[], ["--cache", "memory"]])
def test_images_that_are_added_are_not_mixed_in(whole, data, tmp_path, stopped, cache):
    out = tmp_path / "run"
    stopped(*FIT, "--data", data, "--out", out, *cache)
    held = held_out(out)
    note = add(data)
    moved = {
        path.relative_to(data).as_posix()
        for path in open_dataset("folder", data, 0.15, 0).validation.paths
    }
    assert moved - set(held)  # drawn anew, training images would be held out now
    output = hubpath("fit", "--resume", "--out", out).output
    assert output.count(note) == 1
    assert weights(out) == weights(whole / "run")
    assert held_out(out) == held
    result = json.loads((out / "result.json").read_text())
    assert result == {
        **json.loads((whole / "run/result.json").read_text()),
        **{name: result[name] for name in ("seconds", "images_per_second")},
    }
    line, said = hubpath("evaluate", out).output.splitlines()
    assert line.startswith(f"validation: accuracy {result['test_accuracy']:.4f}, loss ")
    assert line.endswith(", 4 images")
    assert said == f"note {note}"
    assert note in hubpath("report", out).output


def test_times_of_change_say_nothing(whole, data, tmp_path, stopped):
    stopped(*FIT, "--data", data, "--out", tmp_path / "run")
    for path in data.rglob("*.png"):
        os.utime(path, (1, 1))
    output = hubpath("fit", "--resume", "--out", tmp_path / "run").output
    assert "begun" not in output
    assert weights(tmp_path / "run") == weights(whole / "run")
    assert len(hubpath("evaluate", tmp_path / "run").output.splitlines()) == 1


def test_resuming_needs_all_images_and_evaluating_its_own(data, tmp_path, stopped):
    out = tmp_path / "run"
    stopped(*FIT, "--data", data, "--out", out)
    train, held = (
        data / FileList.read(out / FILES).rows[s][0].path for s in ("train", "validation")
    )
    kept, before = weights(out), {path: path.read_bytes() for path in (train, held)}

    train.unlink()
    said = refused("fit", "--resume", "--out", out)
    assert "the data is not what it was when this run was begun: of the 20 images of" in said
    assert f"1 gone ({train.relative_to(data)}); restore them, or start a new run" in said
    assert weights(out) == kept
    line, note = hubpath("evaluate", out).output.splitlines()
    assert line.endswith(", 4 images")
    assert f"not scored are not what they were when this run was begun: 1 gone ({train}" in (
        note.replace("gone (", f"gone ({data}/")
    )
    train.write_bytes(before[train])

    image(held, (40, 40))
    for command in (["fit", "--resume", "--out", out], ["evaluate", out], ["report", out]):
        said = refused(*command)
        assert f"1 changed ({held.relative_to(data)}: {len(before[held])} bytes then" in said
    held.write_bytes(before[held])
    hubpath("fit", "--resume", "--out", out)


def test_data_that_was_moved(whole, data, tmp_path, stopped):
    out = tmp_path / "run"
    stopped(*FIT, "--data", data, "--out", out)
    moved = shutil.move(data, tmp_path / "moved")
    assert f"was in {data}, which does not exist" in refused("fit", "--resume", "--out", out)
    assert f"was in {data}, which does not exist" in refused("evaluate", out)
    assert "4 images" in hubpath("evaluate", out, "--data-root", moved).output
    other = tmp_path / "other"
    for name in CLASSES:
        for i in range(5):
            image(other / name / f"other{i}.png")
    assert "20 gone" in refused("fit", "--resume", "--out", out, "--data", other)
    hubpath("fit", "--resume", "--out", out, "--data", moved)
    assert weights(out) == weights(whole / "run")
    assert hubpath("evaluate", out).output.startswith("validation: ")  # it knows the place now


def test_all_seeds_draw_from_the_same_images(data, tmp_path, stopped):
    together, alone = tmp_path / "seeds", tmp_path / "alone"
    hubpath(*FIT, "--data", data, "--seeds", "0,7", "--out", alone)
    stopped(*FIT, "--data", data, "--seeds", "0,7", "--out", together)
    note = add(data)
    output = hubpath("fit", "--resume", "--out", together).output
    assert output.count(note) == 2
    for seed in (0, 7):
        assert weights(together / f"seed-{seed}") == weights(alone / f"seed-{seed}")
        assert held_out(together / f"seed-{seed}") == held_out(alone / f"seed-{seed}")
    assert held_out(alone / "seed-0") != held_out(alone / "seed-7")


def test_a_deleted_run_of_seeds_leaves_no_list(data, tmp_path):
    out = tmp_path / "seeds"
    hubpath(*FIT, "--data", data, "--seeds", "0", "--out", out)
    shutil.rmtree(out / "seed-0")
    add(data)
    assert "begun" not in hubpath(*FIT, "--data", data, "--seeds", "0", "--out", out).output
    assert sum(map(len, FileList.read(out / FILES).rows.values())) == 24


def without_checkpoint(run):
    for name in ("last", "best", "log.jsonl", "tensorboard", "result.json"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def test_a_run_that_was_killed_before_its_first_checkpoint(whole, data, tmp_path, stopped):
    out = tmp_path / "run"
    stopped(*FIT, "--data", data, "--out", out)
    without_checkpoint(out)
    held, note = held_out(out), add(data)
    with_others = shutil.copytree(out, tmp_path / "other seed")
    assert note in hubpath("fit", "--resume", "--out", out).output
    assert weights(out) == weights(whole / "run")
    # Of another seed, or begun anew, it is another run.
    assert note not in hubpath("fit", "--resume", "--seed", 5, "--out", with_others).output
    assert sum(map(len, FileList.read(with_others / FILES).rows.values())) == 24
    without_checkpoint(out)
    (out / "fit.json").unlink()
    assert note not in hubpath(*FIT, "--data", data, "--resume", "--out", out).output
    assert held_out(out) != held


def test_a_run_of_an_earlier_version_gets_its_list_when_it_goes_on(whole, data, tmp_path, stopped):
    out = tmp_path / "run"
    stopped(*FIT, "--data", data, "--out", out)
    held = held_out(out)
    (out / FILES).unlink()
    assert hubpath("evaluate", out).output.endswith(", 4 images\n")
    hubpath("fit", "--resume", "--out", out)
    assert held_out(out) == held
    assert weights(out) == weights(whole / "run")


def test_a_damaged_list_is_one_message(data, tmp_path, stopped):
    out = tmp_path / "run"
    stopped(*FIT, "--data", data, "--out", out)
    (out / FILES).write_bytes(b"broken")
    for command in (["fit", "--resume", "--out", out], ["evaluate", out], ["report", out]):
        assert f"{out / FILES}, the list of the images" in refused(*command)


def test_arrays_need_no_list(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / FILES).write_text("of a run of files that was begun here, and never trained")
    hubpath(*FIT, "--dataset", "digits", "--out", out)
    assert not (out / FILES).exists()
    assert hubpath("evaluate", out).output.endswith(", 797 images\n")


def test_a_best_checkpoint_that_was_deleted_is_said_when_a_run_ends(whole, tmp_path):
    out = Path(shutil.copytree(whole / "run", tmp_path / "run"))
    shutil.rmtree(out / "best")
    (out / "result.json").unlink()
    assert f"{out}/best is gone" in hubpath("fit", "--resume", "--out", out).output
    assert json.loads((out / "result.json").read_text())["best_step"] == 6
