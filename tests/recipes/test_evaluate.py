"""``hubpath evaluate RUN --data OTHER``: all that is given is scored, and it is said what was."""

from __future__ import annotations

import re
import shutil
import unicodedata

import pytest
from PIL import Image
from support.command import hubpath, refused
from support.source_trees import TREES, image

CLASSES = ("blue", "café", "red")
FIT = [
    "fit", "--hub", "test_resnet,test_vit", "--no-pretrained", "--steps", 2, "--batch-size", 4,
    "--image-size", 32, "--workers", 0,
]  # fmt: skip


def fill(folder, counts, size=(20, 16)):
    """counts: {"red": 3} or {"test/red": 3}."""
    for name, count in counts.items():
        for i in range(count):
            image(folder / name / f"{i}.png", size)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trained on 8 images of each class, without splits."""
    root = tmp_path_factory.mktemp("evaluate")
    fill(root / "data", dict.fromkeys(CLASSES, 8), (32, 32))
    hubpath(*FIT, "--data", root / "data", "--out", root / "run")
    return root / "run"


@pytest.fixture
def other(tmp_path):
    return tmp_path / "other"


def scored(run, data, *options):
    """(name, images, the notes) of ``hubpath evaluate``."""
    lines = hubpath("evaluate", run, "--data", data, *options).output.splitlines()
    found = re.fullmatch(r"(\w+): accuracy \d\.\d{4}, loss \d+\.\d{4}, (\d+) images", lines[0])
    assert all(line.startswith("note ") for line in lines[1:])
    return found[1], int(found[2]), [line.removeprefix("note ") for line in lines[1:]]


ALL = dict.fromkeys(CLASSES, 5)


@pytest.mark.parametrize(
    ("counts", "name", "count", "where", "why"),
    [
        (ALL, "all", 15, "", " (no splits there: all of them)"),
        ({f"train/{c}": 4 for c in CLASSES}, "train", 12, "/train",
         " (no test or validation there)"),
        ({f"test/{c}": 4 for c in CLASSES}, "test", 12, "/test", ""),
        ({f"val/{c}": 4 for c in CLASSES}, "validation", 12, "/val", ""),
        ({f"valid/{c}": 2 for c in CLASSES}, "validation", 6, "/valid", ""),
        ({f"{s}/{c}": n for c in CLASSES for s, n in (("train", 5), ("val", 3), ("test", 2))},
         "test", 6, "/test", ""),
        ({f"{s}/{c}": n for c in CLASSES for s, n in (("train", 5), ("val", 3))},
         "validation", 9, "/val", ""),
    ],
)  # fmt: skip
def test_what_is_scored_of_a_folder(run, other, counts, name, count, where, why):
    expected = f"scored the {count} images of {other}{where}{why}"
    assert scored(run, fill(other, counts)) == (name, count, [expected])


def test_images_of_some_classes(run, other):
    name, count, notes = scored(run, fill(other, {"red": 3, "blue": 1}))
    assert (name, count) == ("all", 4)
    assert notes[1:] == ["2 of the run's 3 classes are there: blue, red"]
    shutil.rmtree(other / "blue")
    assert scored(run, other)[1:] == (
        3,
        [
            f"scored the 3 images of {other} (no splits there: all of them)",
            "1 of the run's 3 classes are there: red",
        ],
    )


def test_targets_are_those_of_the_run(run, tmp_path):
    """The same images as each class in turn: its accuracy is the share that is taken for it, and
    the shares add up to 1."""
    pictures = [Image.effect_noise((32, 32), 20 * i).convert("RGB") for i in range(12)]
    total = 0.0
    for label in CLASSES:
        (tmp_path / label / label).mkdir(parents=True)
        for i, picture in enumerate(pictures):
            picture.save(tmp_path / label / label / f"{i}.png")
        line = hubpath("evaluate", run, "--data", tmp_path / label).output
        total += float(re.search(r"accuracy (\d\.\d{4})", line)[1])
    assert total == pytest.approx(1.0, abs=2e-4)


def test_list_files(run, other):
    fill(other, {"img": 4})
    (other / "test.txt").write_text("img/0.png red\nimg/1.png blue\n")
    assert scored(run, other)[:2] == ("test", 2)
    (other / "more.txt").write_text("img/0.png red\nimg/1.png blue\nimg/2.png red\n")
    name, count, notes = scored(run, other / "more.txt")
    assert (name, count) == ("all", 3)
    assert notes[0].startswith(f"scored the 3 images of {other}/more.txt")
    shutil.rmtree(other / "img")
    assert "that do not exist" in refused("evaluate", run, "--data", other)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_in_either_unicode_form(run, other, form):
    fill(other, {unicodedata.normalize(form, "café"): 2, "red": 1})
    assert scored(run, other)[:2] == ("all", 3)


def test_classes_that_the_run_does_not_know(run, other):
    said = refused("evaluate", run, "--data", fill(other, {"red": 2, "yak": 1}))
    assert f"{other} has images of class yak, which the run does not know. Its classes" in said
    assert "blue, café, red" in said
    shutil.rmtree(other)
    fill(other, {"pictures/red": 2, "pictures/blue": 2})
    assert f"did you mean {other}/pictures" in refused("evaluate", run, "--data", other)


def test_images_without_classes(run, other):
    image(other / "a.png")
    said = refused("evaluate", run, "--data", other)
    assert f"{other} holds 1 images outside of folders of classes" in said
    assert "hubpath predict" in said
    fill(other, {"red": 2})
    _, count, notes = scored(run, other)
    assert count == 2
    assert f"left out: 1 image beside the folders of classes ({other}/a.png)" in notes[-1]


def test_folders_of_classes_beside_a_split_are_named(run, other):
    notes = scored(run, fill(other, {"test/red": 2, "red": 3}))[2]
    assert f"left out: 1 folder beside test/ ({other}/red)" in notes[-1]


def test_what_is_no_data(run, other):
    assert f"{other} does not exist" in refused("evaluate", run, "--data", other)
    other.mkdir()
    assert "holds no images" in refused("evaluate", run, "--data", other)
    image(other / "x.png")
    assert "is a file" in refused("evaluate", run, "--data", other / "x.png")
    said = refused("evaluate", run, "--data", other, "--data-root", other)
    assert "data and data-root: give one of them" in said


def test_only_what_is_scored_must_be_whole(run, other):
    fill(other, {"train/red": 2, "test/red": 2})
    (other / "train/red/0.png").write_text("no image")
    assert scored(run, other)[:2] == ("test", 2)
    (other / "test/red/0.png").write_text("no image")
    assert f"{other}/test/red/0.png" in refused("evaluate", run, "--data", other)


def test_the_runs_own_folder_is_not_scored_where_it_was_trained_on(run):
    data = run.parent / "data"
    alone = hubpath("evaluate", run).output
    name, count, [note] = scored(run, data)
    assert (name, count) == ("validation", 3)  # 15 % of 8, rounded: one of each class
    assert note == f"{data} is the run's own data: scored the 3 images that it held out"
    assert hubpath("evaluate", run, "--data", data).output.startswith(alone)


def test_images_that_the_run_was_trained_on_are_counted(run, tmp_path):
    moved = shutil.copytree(run.parent / "data", tmp_path / "moved")
    _, count, notes = scored(run, moved)
    assert count == 24
    assert notes[-1].startswith("21 of them are images that the run was trained on")
    assert hubpath("evaluate", run, "--data-root", moved).output == hubpath("evaluate", run).output
    linked = tmp_path / "linked"
    linked.symlink_to(run.parent / "data", target_is_directory=True)
    assert scored(run, linked)[:2] == ("validation", 3)


def test_a_run_that_held_nothing_out(tmp_path, other):
    fill(tmp_path / "data", {f"{s}/{c}": 3 for s in ("train", "test") for c in ("blue", "red")})
    out = tmp_path / "run"
    hubpath(*FIT, "--data", tmp_path / "data", "--validation", 0, "--out", out)
    assert "test: accuracy" in hubpath("evaluate", out).output
    assert scored(out, fill(other, {"blue": 2, "red": 2}))[:2] == ("all", 4)


def test_a_class_that_is_called_train(tmp_path, other):
    fill(tmp_path / "data", {"train/train": 3, "train/bus": 3})
    out = tmp_path / "run"
    hubpath(*FIT, "--data", tmp_path / "data", "--out", out)
    assert scored(out, fill(other, {"train": 3, "bus": 2}))[:2] == ("all", 5)


def test_the_digits_lie_in_no_folder(tmp_path, other):
    out = tmp_path / "run"
    said = refused(*FIT, "--dataset", "digits", "--data", fill(other, {"3": 2}), "--out", out)
    assert f"the digits come with scikit-learn and lie in no folder, got {other}" in said
    said = refused(*FIT, "--dataset", "digits", "--data-root", other, "--out", out)
    assert "lie in no folder" in said
    hubpath(*FIT, "--dataset", "digits", "--out", out)
    assert "lie in no folder" in refused("evaluate", out, "--data-root", other)
    assert scored(out, other)[:2] == ("all", 2)


def test_a_named_set_and_other_images_of_its_classes(tmp_path, monkeypatch, other):
    root, out = tmp_path / "sets", tmp_path / "run"
    TREES["cars"][0](root, monkeypatch)
    hubpath(*FIT, "--dataset", "cars", "--data-root", root, "--validation", 0.5, "--out", out)
    assert hubpath("evaluate", out).output.endswith(", 2 images\n")
    for place in (root, root / "stanford_cars"):
        said = refused("evaluate", out, "--data", place)
        assert "is laid out as Stanford Cars is published, which the run was trained on" in said
        assert f"give --data-root {place}, not --data" in said
    moved = root.rename(tmp_path / "moved")
    assert "fit --resume --data-root DIR" in refused("evaluate", out)
    assert hubpath("evaluate", out, "--data-root", moved).output.endswith(", 2 images\n")
    assert scored(out, fill(other, {"Acura RL Sedan 2012": 3}))[:2] == ("all", 3)


def test_a_best_checkpoint_that_is_gone_is_said(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copied / "best")
    for command in ("evaluate", "report"):
        assert (
            f"{copied}/best is gone: the weights are those of the last step"
            in hubpath(command, copied).output
        )
