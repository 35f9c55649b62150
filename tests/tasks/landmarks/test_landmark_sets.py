"""Sets of faces: what is held out, the test set and its parts, notes, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.faces import (
    ATTRIBUTES,
    draw_points,
    own_header,
    write_cofw,
    write_csv,
    write_hrnet,
    write_own,
    write_wflw,
)

from hubpath_fast.data import DataError
from hubpath_fast.tasks.landmarks import FaceDataset, open_faces
from hubpath_fast.tasks.landmarks.settings import LandmarkSettings


def names(split):
    return [face.image for face in split.faces]


def own_rows(*photos):
    return [(photo, draw_points(3, seed)) for seed, photo in enumerate(photos)]


@pytest.fixture
def wflw(tmp_path):
    rows = [f"{photo}.jpg:{i}" for i, photo in enumerate("aabbbcdefgghij")]
    tests = [f"test{i}.jpg:{50 + i}" for i in range(4)]
    lists = {"train": rows, "test": tests, "test_blur": tests[2:], "test_largepose": [tests[0]]}
    write_hrnet(tmp_path, "wflw", lists)
    return tmp_path


def test_validation_is_held_out_of_train_by_photograph(wflw):
    splits = open_faces("wflw", wflw, validation=0.3, seed=1)
    train, held = set(names(splits.train)), set(names(splits.validation))
    assert not train & held
    assert len(held) == 3
    assert len(splits.train) + len(splits.validation) == 14
    assert (len(splits.test), splits.test_is_validation) == (4, False)
    assert all(name.startswith("test") for name in names(splits.test))
    again = open_faces("wflw", wflw, validation=0.3, seed=1)
    assert names(again.validation) == names(splits.validation)
    others = {
        tuple(names(open_faces("wflw", wflw, validation=0.3, seed=s).validation)) for s in range(5)
    }
    assert len(others) > 1
    assert [len(part) for part in splits.parts.values()] == [14, 4]
    assert any("3 of 14" in note or "training faces held out" in note for note in splits.notes)


def test_parts_of_the_test_set(wflw):
    splits = open_faces("wflw", wflw)
    assert splits.subsets == {"blur": (2, 3), "largepose": (0,)}
    assert names(splits.subset("blur")) == ["test2.jpg", "test3.jpg"]
    with pytest.raises(ValueError, match=r"one of this data .*largepose.*, got 'pose'"):
        splits.subset("pose")


def test_parts_by_attributes(tmp_path):
    groups = [(), ("largepose",), ("makeup", "blur"), ATTRIBUTES]
    rows = [(f"t{i}.jpg", 10 + i, some) for i, some in enumerate(groups)]
    write_wflw(tmp_path, {"train": [("a.jpg", 1, ()), ("b.jpg", 2, ())], "test": rows})
    splits = open_faces("wflw", tmp_path)
    assert splits.subsets["largepose"] == (1, 3)
    assert splits.subsets["makeup"] == (2, 3)
    assert splits.subsets["occlusion"] == (3,)


def test_300w_has_a_further_test_set(tmp_path):
    train, common, hard = ["a.jpg:1", "b.jpg:2"], ["c.jpg:3", "d.jpg:4"], ["ibug/e f.jpg:5"]
    lists = {"train": train, "valid": common + hard, "valid_common": common}
    lists |= {"valid_challenge": hard, "test": ["g.jpg:6"]}
    write_hrnet(tmp_path, "300w", lists)
    splits = open_faces("300w", tmp_path)
    assert names(splits.test) == ["c.jpg", "d.jpg", "ibug/e f.jpg"]
    assert splits.subsets == {"common": (0, 1), "challenge": (2,)}
    assert names(splits.subset("test")) == ["g.jpg"]
    (tmp_path / "images" / "g.jpg").unlink()
    splits = open_faces("300w", tmp_path)
    assert splits.others == {}
    assert any("the further test list" in note and "g.jpg" in note for note in splits.notes)


def test_a_part_with_strangers(wflw):
    text = (wflw / "face_landmarks_wflw_test_blur.csv").read_text()
    (wflw / "face_landmarks_wflw_test_blur.csv").write_text(text.replace("test2", "a"))
    with pytest.raises(DataError, match=r"_blur.csv:2: a face that is not in .*_wflw_test.csv"):
        open_faces("wflw", wflw)


def test_counts_beside_the_published_ones(tmp_path):
    write_cofw(tmp_path / "COFW_train_color.mat", 3)
    write_cofw(tmp_path / "COFW_test_color.mat", 2, part="test")
    splits = open_faces("cofw", tmp_path)
    assert [len(s) for s in splits.distinct.values()] == [2, 1, 2]
    assert any("has 3 train, 2 test faces, where 1,345 train, 507 test" in n for n in splits.notes)
    crop, target = FaceDataset(splits.test, 64)[1]
    assert (crop.shape, target.shape) == ((3, 64, 64), (29, 4))


def test_a_published_list_may_have_a_face_twice(wflw):
    """It was published so, and its count is the published one."""
    file = wflw / "face_landmarks_wflw_test.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[1]]))
    splits = open_faces("wflw", wflw)
    assert len(splits.test) == 5
    assert any("1 face stands twice" in note for note in splits.notes)


def test_an_own_list_has_no_test_set(tmp_path):
    file = write_own(tmp_path, own_rows("a.jpg", "a.jpg", "b.jpg", "c d.jpg"))
    splits = open_faces("folder", file, validation=0.4)
    assert splits.test_is_validation
    assert splits.test is splits.validation
    assert set(splits.distinct) == {"train", "validation"}
    assert splits.layout.names == ("left_eye", "right_eye", "mouth")
    assert (splits.layout.unit, splits.layout.flip) == ("diagonal", None)
    assert any("a little too good" in note for note in splits.notes)
    assert any("no face is mirrored" in note for note in splits.notes)


def test_own_lists_in_a_folder(tmp_path):
    write_own(tmp_path, own_rows("a.jpg", "b.jpg"), name="train.csv")
    write_own(tmp_path, own_rows("v.jpg"), name="val.csv")
    write_own(tmp_path, own_rows("t.jpg", "a.jpg"), name="test.csv")
    splits = open_faces(None, tmp_path)
    assert [names(s) for s in splits.distinct.values()] == [
        ["a.jpg", "b.jpg"],
        ["v.jpg"],
        ["t.jpg", "a.jpg"],
    ]
    assert any("1 photograph is in both train and test (a.jpg)" in note for note in splits.notes)
    write_csv(tmp_path / "val.csv", own_header(("left_eye", "nose")), [["v.jpg", 1, 2, 3, 4]])
    with pytest.raises(DataError, match=r"val.csv: 2 landmarks .* expected the 3 of .*train.csv"):
        open_faces(None, tmp_path)


def test_settings_of_an_own_list(tmp_path):
    file = write_own(tmp_path, own_rows("a.jpg", "b.jpg"))
    settings = LandmarkSettings(unit="0-1", flip_pairs="0-1")
    layout = open_faces("folder", file, settings=settings).layout
    assert (layout.unit, layout.flip) == ("0-1", (1, 0, 2))
    for other in (LandmarkSettings(unit="0-7"), LandmarkSettings(flip_pairs="0-3")):
        with pytest.raises(ValueError, match="expected"):
            open_faces("folder", file, settings=other)
    same = draw_points(3, 9)
    same[1] = same[0]
    write_own(tmp_path, [*own_rows("a.jpg", "b.jpg"), ("a.jpg", same)])
    with pytest.raises(DataError, match=r"faces.csv:4: landmarks left_eye and right_eye coincide"):
        open_faces("folder", file, settings=settings)
    assert len(open_faces("folder", file).parts["train"]) == 3


def test_boxes_from_the_points(tmp_path):
    header = ["image", "scale", "center_x", "center_y", "x", "y", "x", "y"]
    rows = [["a.jpg", 0.7, 50, 60, 10.5, 20, 30, 99.2], ["b.jpg", 0.7, 50, 60, 10, 20, 30, 50]]
    write_own(tmp_path, own_rows("a.jpg", "b.jpg"))
    file = write_csv(tmp_path / "boxed.csv", header, rows)
    face = open_faces("csv", file).parts["train"].faces[0]
    assert (face.scale, face.center) == (0.7, (50, 60))
    face = open_faces("csv", file, box="points").parts["train"].faces[0]
    assert (face.scale, face.center) == (80 / 200, (20, 60))
    with pytest.raises(ValueError, match="box: expected one of file, points, got 'detector'"):
        open_faces("csv", file, box="detector")


def test_orientation_is_said(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    file = write_own(tmp_path, own_rows("a.jpg", "b.jpg"))
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.jpg", exif=exif)
    [note] = [note for note in open_faces("csv", file).notes if "EXIF" in note]
    assert "1 photograph carries an EXIF orientation (a.jpg): turned upright" in note


def test_all_problems_are_in_one_message(tmp_path):
    rows = [["a.jpg", 1, 2, 3, 4, 5], *(["gone.jpg", 1, 2, 3, 4, 5, i] for i in range(30))]
    write_own(tmp_path, own_rows("a.jpg"))
    file = write_csv(tmp_path / "faces.csv", own_header(), rows)
    with pytest.raises(DataError) as error:
        open_faces("csv", file)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{file}: 31 problems"
    assert lines[1].startswith(f"  {file}:2: 6 columns, expected 7")
    assert lines[20].startswith(f"  {file}:21: there is no image 'gone.jpg'")
    assert lines[21] == f"  and 11 more; `hubpath data check {file}` lists all"


def test_a_set_that_is_not_there(tmp_path):
    with pytest.raises(DataError) as error:
        open_faces("wflw", tmp_path)
    assert "no train list, expected face_landmarks_wflw_train.csv or list_98pt" in str(error.value)
    assert "no full list" in str(error.value)
    assert "get it: https://wywu.github.io" in str(error.value)


def test_what_cannot_be_held_out(tmp_path):
    file = write_own(tmp_path, own_rows("a.jpg", "a.jpg"))
    with pytest.raises(DataError, match="all faces to train on in one photograph"):
        open_faces("csv", file)
    with pytest.raises(DataError, match="nothing is left to report on"):
        open_faces("csv", file, validation=0)
    with pytest.raises(ValueError, match="validation: expected a share"):
        open_faces("csv", file, validation=1.5)


def test_looking_at_the_test_photographs_alone(wflw):
    (wflw / "images" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2 problems"):
        open_faces("wflw", wflw)
    assert len(open_faces("wflw", wflw, scored=True).test) == 4
    assert len(open_faces("wflw", wflw, verify=False).test) == 4
    (wflw / "images" / "test1.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"test1.jpg"):
        open_faces("wflw", wflw, scored=True)


def test_points_of_a_split(wflw):
    points = open_faces("wflw", wflw).test.points()
    assert (points.dtype, points.shape) == (torch.float64, (4, 98, 2))
    assert np.array_equal(points[1], draw_points(98, 51))
