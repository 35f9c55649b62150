"""`hubpath landmarks fit` on a user's list, and what other commands say of its runs."""

import gzip
import json
import shutil

import numpy as np
import pytest
from support.checkpoint_files import all_weights
from support.command import hubpath, refused
from support.faces import own_header, write_csv, write_own
from test_cli import Stops

HUB = ["--hub", "test_resnet,test_efficientnet", "--no-pretrained", "--image-size", 64]
FIT = ["landmarks", "fit", *HUB, "--head-width", 8, "--batch-size", 4, "--workers", 0]


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """16 photographs of two faces each."""
    root, rng = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    rows = []
    for i in range(16):
        for left in (30, 110):
            eyes = [[left, 50], [left + 40, 50], [left + 20, 90]]
            rows.append((f"photo {i}.jpg", np.array(eyes) + rng.uniform(-8, 8, (3, 2))))
    write_own(root, rows)
    return root


@pytest.fixture(scope="module")
def run(faces, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    hubpath(*FIT, "--data", faces / "faces.csv", "--steps", 6, "--out", out)
    return out


def weights(run):
    return all_weights(run / "last")


def test_a_run_says_what_its_errors_are_shares_of(faces, tmp_path):
    out = tmp_path / "run"
    result = hubpath(*FIT, "--data", faces / "faces.csv", "--steps", 2, "--out", out)
    said = " ".join(result.stdout.split())
    assert "3 landmarks (subpixel targets, sigma 1.5 cells, errors over diagonal)" in said
    assert "held out, by photograph" in said
    assert "(of the diagonal of the points' box) of 4 images, fr 10" in said
    held = json.loads((out / "result.json").read_text())
    assert (held["normalizer"], held["targets"]) == ("diagonal", "subpixel")
    assert {"test_nme", "test_fr_10", "test_auc_10", "test_empty"} <= set(held)
    # Networks that were hardly trained answer with zeros, which is said.
    assert held["test_empty"] > 0.5
    assert "the networks answer with zeros" in said
    record = json.loads((out / "fit.json").read_text())
    assert record["landmarks"] == ["left_eye", "right_eye", "mouth"]
    assert record["config"]["task"] == "landmarks"


def test_no_photograph_is_on_both_sides_of_the_split(run):
    with gzip.open(run / "files.csv.gz", "rt") as listed:
        rows = [line.split(",") for line in listed][1:]
    train, held = ({r[1] for r in rows if r[0] == split} for split in ("train", "validation"))
    assert len(train) == 14
    assert len(held) == 2
    assert not train & held
    assert len(rows) == 32


def test_a_stopped_run_goes_on_to_the_same_weights(faces, run, tmp_path, monkeypatch):
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr("hubpath_fast.recipes.fit.Trainer", Stops)
        options = ["--data", faces / "faces.csv", "--steps", 6, "--out", cut]
        hubpath(*FIT, *options, status=130)
    said = refused("landmarks", "fit", "--resume", "--targets", "published", "--out", cut)
    assert "fit.landmarks.targets: 'absent' there, 'published' now" in said
    hubpath("landmarks", "fit", "--resume", "--out", cut)
    assert weights(cut) == weights(run)


@pytest.mark.parametrize("how", ["memory", "disk"])
def test_a_cached_run_is_the_same_to_the_bit(faces, run, tmp_path, how):
    out = tmp_path / "cached"
    more = ["--cache", how, "--cache-dir", tmp_path / "cache"]
    hubpath(*FIT, "--data", faces / "faces.csv", "--steps", 6, "--out", out, *more)
    assert weights(out) == weights(run)


def test_seeds(faces, tmp_path):
    out = tmp_path / "seeds"
    options = ["--data", faces / "faces.csv", "--steps", 2, "--seeds", "0,1", "--out", out]
    result = hubpath(*FIT, *options)
    held = json.loads((out / "result.json").read_text())
    assert held["seeds"] == [0, 1]
    assert len(held["test_nme"]["values"]) == 2
    assert "test_nme:" in result.stdout


def test_heads_first(faces, tmp_path):
    out = tmp_path / "heads"
    options = ["--data", faces / "faces.csv", "--steps", 12, "--warm-up", "heads:1"]
    hubpath(*FIT, *options, "--out", out)
    assert json.loads((out / "result.json").read_text())["warm_up_forwards"] == 2 * 28


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_commands_of_classes_name_those_of_landmarks(run, command, tmp_path):
    said = refused(command, run, *([tmp_path / "photo.jpg"] if command == "predict" else []))
    assert f"is a run of `hubpath landmarks fit`; use `hubpath landmarks evaluate {run}`" in said


def test_fit_names_the_command_of_the_other_task(run):
    assert "use `hubpath landmarks fit`" in refused("fit", "--resume", "--out", run)
    said = refused("landmarks", "fit", "--preset", "tiny", "--out", run)
    assert "preset tiny is of the task classification; use `hubpath fit`" in said
    said = refused("fit", "--preset", "landmarks-wflw", "--out", run)
    assert "preset landmarks-wflw is of the task landmarks; use `hubpath landmarks fit`" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "wflw", "--data-root", "."], "use `hubpath landmarks fit --dataset wflw`"),
        (["--data", ".", "--set", "sigma=2"], "sigma: of landmarks, and this run learns classes"),
    ],
)
def test_fit_refuses_what_is_of_landmarks(options, message):
    said = " ".join(refused("fit", "--hub", "test_resnet", *options).split())
    assert message in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "mixup=0.2"], "mixup: for classes alone"),
        (["--set", "crops=10"], "crops: for classes alone"),
        (["--image-size", 100], "image_size: expected a multiple of 32"),
        (["--flip-pairs", "0-7"], "pairs: expected landmarks 0..2, got 0-7"),
        (["--unit", "ocular"], 'unit: folder has "diagonal" and "I-J"'),
        (["--unit", "eyes"], "unit: expected one of ocular, pupil, diagonal"),
        (["--sigma", 0], "sigma: expected a number above 0"),
        (["--targets", "cell"], "targets: expected one of subpixel, published"),
    ],
)
def test_wrong_settings_are_one_message(faces, tmp_path, options, message):
    out = tmp_path / "run"
    said = refused(*FIT, "--data", faces / "faces.csv", *options, "--steps", 2, "--out", out)
    assert message in " ".join(said.split())
    assert not (out / "fit.json").exists()


def test_all_that_is_wrong_with_a_list_is_in_one_message(faces, tmp_path):
    shutil.copytree(faces, tmp_path / "faces")
    good = [10, 10, 50, 10, 30, 40]
    rows = [
        ["photo 0.jpg", *good],
        ["photo 1.jpg", *good[:-1]],
        ["photo 2.jpg", *good[:-1], "x"],
        ["photo 3.jpg", *good[:-1], "nan"],
        ["gone.jpg", *good],
        ["photo 4.jpg", *good],
    ]
    write_csv(tmp_path / "faces" / "bad.csv", own_header(), rows)
    place = tmp_path / "faces" / "bad.csv"
    said = " ".join(refused(*FIT, "--data", place, "--out", tmp_path / "run").split())
    assert "4 problems" in said
    for line in (3, 4, 5, 6):
        assert f"bad.csv:{line}:" in said


def test_without_data_a_list_is_asked_for(tmp_path):
    said = refused(*FIT, "--out", tmp_path / "run")
    assert "data: nothing given; use --data faces.csv" in said


def test_digits_are_learned_by_other_commands(tmp_path):
    said = refused(*FIT, "--dataset", "digits", "--out", tmp_path / "run")
    assert "`hubpath landmarks demo`" in said
