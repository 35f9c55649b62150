"""Errors on faces that are known: rows, units, subsets, moved boxes, and what is refused."""

import re

import pytest
import torch
from support.blobs import blob_list, blob_photo, blob_run
from support.command import hubpath, refused

from hubpath_fast.recipes.landmarks_evaluate import (
    FROM_TRUTH,
    _published,
    _rows,
    evaluate_landmarks,
    row_text,
)
from hubpath_fast.recipes.landmarks_predict import predict_landmarks
from hubpath_fast.tasks.landmarks import LAYOUTS, box_of_points, nme
from hubpath_fast.tasks.landmarks.task import Landmarks

# Three faces of different sizes; the second lies at the edge of its photograph.
FACES = [
    ("a.png", [(80.0, 60.0), (121.5, 64.25), (100.75, 110.5)]),
    ("b.png", [(12.0, 20.5), (70.25, 15.0), (45.0, 90.0)]),
    ("c.png", [(60.0, 70.0), (100.0, 72.5), (81.25, 118.0)]),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """train.csv and test.csv, whose photographs lie beside them."""
    folder = tmp_path_factory.mktemp("faces")
    for name, points in FACES:
        blob_photo(folder / name, points)
    blob_photo(folder / "train.png", FACES[0][1])
    blob_photo(folder / "more.png", FACES[2][1])
    blob_list(folder / "train.csv", [("train.png", FACES[0][1]), ("more.png", FACES[2][1])])
    blob_list(folder / "test.csv", FACES)
    return folder


@pytest.fixture
def run(monkeypatch, place):
    """`evaluate` finds this run whatever folder it is given."""
    opened = blob_run(place, validation=0.5)
    monkeypatch.setattr("hubpath_fast.recipes.landmarks_evaluate.open_run", lambda *_: opened)
    return opened


def test_errors_are_those_of_the_points_that_predict_finds(run, place):
    """Two ways to the same numbers: in cells of the crops, and in pixels of the photographs."""
    result = evaluate_landmarks("run")
    truth = torch.tensor([points for _, points in FACES], dtype=torch.float64)
    boxes = []
    for points in truth:
        scale, x, y = box_of_points(points)
        boxes.append((x - 100 * scale, y - 100 * scale, x + 100 * scale, y + 100 * scale))
    found = list(predict_landmarks(run, [place / name for name, _ in FACES], boxes))
    diagonal = (truth.amax(1) - truth.amin(1)).norm(dim=1)
    expected = nme(torch.stack([face.points for face in found]), truth, diagonal)
    assert 0.005 < expected.mean() < 0.03  # some of a cell, each 0.06 of the diagonal
    assert result["nme"] == pytest.approx(expected.mean().item(), rel=1e-3)
    assert result["fr_10"] == 0
    assert result["auc_10"] == pytest.approx((1 - expected / 0.1).mean().item(), rel=1e-3)
    assert (result["n"], result["split"], result["normalizer"]) == (3, "test", "diagonal")
    assert result["empty"] == 0
    assert FROM_TRUTH in result["notes"]


def test_several_units_of_the_same_points(run):
    rows = evaluate_landmarks("run", norms=["diagonal", "0-1", "diagonal"])["rows"]
    assert [row["normalizer"] for row in rows] == ["diagonal", "0-1"]
    assert rows[1]["nme"] > 1.3 * rows[0]["nme"]  # the eyes are nearer than the corners
    assert rows[1]["measured"] == "of the distance of landmarks 0-1"


def test_moved_boxes(run):
    """Colours are found wherever the box is, but not to the same part of a cell."""
    result = evaluate_landmarks("run", jitter=0.1)
    plain, moved = result["rows"]
    assert (plain["jitter"], moved["jitter"]) == (0.0, 0.1)
    assert moved["nme"] != plain["nme"]
    assert moved["nme"] == pytest.approx(plain["nme"], abs=0.03)
    assert evaluate_landmarks("run", jitter=0.1)["rows"] == result["rows"]  # drawn by the seed
    assert row_text(moved).startswith("test, boxes moved by up to 10%: nme ")


def test_another_list(run, place, tmp_path):
    other = blob_list(tmp_path / "other.csv", FACES[:2])
    result = evaluate_landmarks("run", data=other, images=place)
    assert (result["n"], result["split"]) == (2, "other.csv")
    assert result["nme"] < 0.05
    alone = tmp_path / "folder"  # a test list by itself is enough
    alone.mkdir()
    blob_list(alone / "test.csv", FACES)
    folder = evaluate_landmarks("run", data=alone, images=place)
    assert (folder["n"], folder["nme"]) == (3, evaluate_landmarks("run")["nme"])
    (alone / "test.csv").rename(alone / "faces.csv")
    with pytest.raises(ValueError, match=r"no train list, expected train\.csv"):
        evaluate_landmarks("run", data=alone, images=place)


def test_rows_of_parts_by_hand():
    """Errors of 0, 1 and 2 cells in all landmarks of a face, over 10 and 20 cells."""
    truth = torch.zeros(3, 29, 4)
    truth[..., 0] = torch.arange(29.0)
    truth[..., 2:] = torch.tensor([1.0, 10.0])
    truth[:, 9, :2] = truth[:, 8, :2] + torch.tensor([6.0, 8.0])
    truth[:, 17, :2] = truth[:, 16, :2] + torch.tensor([12.0, 16.0])
    found = truth[..., :3].clone()
    found[..., 1] += torch.tensor([0.0, 1.0, 2.0])[:, None]
    found[..., 2] = 1.0
    found[2, :, 2] = 0.05
    parts = {"test": range(3), "largepose": (0, 2)}
    rows = _rows(Landmarks(LAYOUTS["cofw"]), found, truth, parts, ["ocular", "pupil"], 0.0)
    assert [(r["subset"], r["n"], r["normalizer"]) for r in rows] == [
        ("test", 3, "ocular"), ("test", 3, "pupil"),
        ("largepose", 2, "ocular"), ("largepose", 2, "pupil"),
    ]  # fmt: skip
    assert [r["nme"] for r in rows] == pytest.approx([0.1, 0.05, 0.1, 0.05])
    assert [r["fr_10"] for r in rows] == pytest.approx([1 / 3, 0, 1 / 2, 0])
    assert [r["auc_10"] for r in rows] == pytest.approx([1 / 3, 0.5, 0.5, 0.5], abs=1e-6)
    assert [r["empty"] for r in rows] == pytest.approx([1 / 3, 1 / 3, 1 / 2, 1 / 2])
    assert row_text(rows[2]) == (
        "largepose: nme 10.00 % of the inter-ocular distance, fr 10 50.00 %, auc 10 50.00 %, "
        "empty maps 50.00 %, 2 faces"
    )


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"subset": "largepose"}, r"subset: expected one of this data \(none\), got 'largepose'"),
        ({"norms": ["ocular"]}, 'unit: folder has "diagonal" and "I-J", .* got "ocular"'),
        ({"norms": ["0-3"]}, 'expected two of the landmarks 0..2 of folder as "I-J", got "0-3"'),
        ({"jitter": 1.5}, r"jitter: expected a share of the boxes' side in \[0, 1\), got 1.5"),
        ({"data": "x.csv", "subset": "blur"}, "data and subset: give one of them"),
        ({"data": "x.csv", "data_root": "y"}, "data and data-root: give one of them"),
        ({"images": "y"}, "images: the folder of the photographs of --data"),
    ],
)
def test_what_is_refused(run, asked, words):
    with pytest.raises(ValueError, match=words):
        evaluate_landmarks("run", **asked)


def test_lists_in_the_form_of_a_published_set_count_pixels_as_it_does(tmp_path):
    """300W's from 1, a user's from 0; columns alone do not tell."""
    own, published = tmp_path / "own.csv", tmp_path / "face_landmarks_300w_test.csv"
    own.write_text("image,x,y\na.png,1,2\n")
    published.write_text("image_name,scale,center_w,center_h,original_0_x,original_0_y\n")
    of_300w = blob_run().config.replace(dataset="300w")
    assert _published(of_300w, published) == "300w"
    assert _published(of_300w, own) is None
    assert _published(of_300w, tmp_path) is None
    assert _published(of_300w, tmp_path / "COFW_test_color.mat") == "300w"
    assert _published(blob_run().config, published) is None


def test_a_list_of_other_landmarks(run, place, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("image,nose_x,nose_y,chin_x,chin_y\na.png,10,10,20,30\n")
    with pytest.raises(ValueError, match="other landmarks than the run"):
        evaluate_landmarks("run", data=other, images=place)


@pytest.fixture(scope="module")
def wflw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wflw")
    (folder / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    header = ",".join(
        ["image_name,scale,center_w,center_h"]
        + [f"original_{i}_{axis}" for i in range(98) for axis in "xy"]
    )
    rows = {}
    for i in range(8):
        points = 40 + 100 * torch.rand(98, 2, dtype=torch.float64, generator=generator)
        blob_photo(folder / "images" / f"{i}.png", points[:3].tolist())
        scale, x, y = box_of_points(points)
        values = [f"{i}.png", scale, x, y, *points.flatten().tolist()]
        rows[i] = ",".join(map(str, values))
    lists = {
        "train": range(5),
        "test": range(5, 8),
        "test_largepose": (5, 7),
        "test_blur": (6,),
    }
    for name, numbers in lists.items():
        path = folder / f"face_landmarks_wflw_{name}.csv"
        path.write_text("\n".join([header, *(rows[i] for i in numbers)]) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(wflw, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    hubpath(
        "landmarks", "fit", "--dataset", "wflw", "--data-root", wflw, "--hub",
        "test_resnet,test_resnet", "--no-pretrained", "--steps", 1, "--batch-size", 2,
        "--image-size", 64, "--head-width", 8, "--workers", 0, "--out", out,
    )  # fmt: skip
    return out


class TestCommand:
    """A mini WFLW and a real run on it, of one step."""

    def test_every_subset_has_its_row(self, trained):
        said = hubpath("landmarks", "evaluate", trained, "--norm", "ocular,pupil").stdout
        lines = [line for line in said.splitlines() if ": nme " in line]
        found = [
            re.match(r"(\w+): nme [\d.]+ % of the (inter-\w+) .*, (\d) faces", x) for x in lines
        ]
        assert [match.groups() for match in found] == [
            ("test", "inter-ocular", "3"), ("test", "inter-pupil", "3"),
            ("largepose", "inter-ocular", "2"), ("largepose", "inter-pupil", "2"),
            ("blur", "inter-ocular", "1"), ("blur", "inter-pupil", "1"),
        ]  # fmt: skip
        assert "note boxes come from the true points" in said

    def test_one_subset(self, trained, wflw):
        whole = evaluate_landmarks(trained)["rows"]
        part = evaluate_landmarks(trained, subset="largepose", data_root=wflw)
        assert part["split"] == "largepose"
        assert [part["rows"][0][key] for key in ("nme", "n")] == [whole[1]["nme"], 2]
        said = refused("landmarks", "evaluate", trained, "--subset", "pose")
        assert "subset: expected one of this data (largepose, blur), got 'pose'" in said

    def test_the_runs_own_form_of_lists(self, trained, wflw):
        """As HRNet writes them, or as a user's own: both have 98 landmarks."""
        blur = evaluate_landmarks(trained, subset="blur")
        listed = evaluate_landmarks(
            trained, data=wflw / "face_landmarks_wflw_test_blur.csv", images=wflw / "images"
        )
        assert (listed["nme"], listed["n"]) == (blur["nme"], 1)

    def test_faces_that_it_was_trained_on(self, trained, wflw):
        train = evaluate_landmarks(trained, data=wflw / "face_landmarks_wflw_train.csv")
        assert train["n"] == 5
        [note] = [note for note in train["notes"] if "trained on" in note]
        assert note.startswith("4 of the 5 are faces that the run was trained on")  # 1 was held out
        test = evaluate_landmarks(trained, data=wflw / "face_landmarks_wflw_test.csv")
        assert not [note for note in test["notes"] if "trained on" in note]

    def test_commands_of_another_task(self, trained, wflw, tmp_path):
        for command in (("evaluate", trained), ("predict", trained, wflw / "images" / "0.png")):
            said = refused(*command)
            assert f"{trained} is a run of `hubpath landmarks fit`" in said
            assert f"use `hubpath landmarks evaluate {trained}`" in said
        other = tmp_path / "digits"
        hubpath(
            "fit", "--dataset", "digits", "--hub", "test_resnet,test_resnet", "--no-pretrained",
            "--steps", 1, "--batch-size", 4, "--image-size", 32, "--out", other,
        )  # fmt: skip
        for command in (
            ("evaluate", other),
            (
                "predict",
                other,
                wflw / "images" / "0.png",
                "--box",
                "image",
                "--out",
                tmp_path / "o",
            ),
        ):
            said = refused("landmarks", *command)
            assert f"{other} is a run of `hubpath fit`; use `hubpath evaluate {other}`" in said
        assert not (tmp_path / "o").exists()

    def test_predict_names_the_landmarks(self, trained, wflw, tmp_path):
        out = tmp_path / "out"
        photo = wflw / "images" / "6.png"
        hubpath("landmarks", "predict", trained, photo, "--box", "40,40,140,140", "--out", out)
        rows = (out / "points.csv").read_text().splitlines()
        assert len(rows) == 1 + 98
        assert rows[98].startswith(f"{photo},97,")
