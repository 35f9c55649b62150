"""`hubpath data check` of faces, as a user types it."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.command import hubpath, refused
from support.faces import (
    draw_points,
    own_header,
    write_cofw,
    write_csv,
    write_hrnet,
    write_own,
    write_photo,
)

from hubpath_fast.tasks.landmarks import LAYOUTS, read_landmarks
from hubpath_fast.tasks.landmarks import check as check_module
from hubpath_fast.tasks.landmarks.draw import FIRST, HEAD, SECOND, SIDE, draw_pair


def check(*arguments, status):
    """Its lines, of which a long one is whole."""
    return hubpath("data", "check", *arguments, status=status).stdout.splitlines()


def own_rows(*photos):
    return [(photo, draw_points(3, seed)) for seed, photo in enumerate(photos)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_own_list(here):
    points = draw_points(3, 7)
    points[0] = [-30, 500]
    write_own(here / "me", [*own_rows("a.jpg", "a.jpg", "b c.jpg", "d.jpg"), ("e.jpg", points)])
    lines = check("me/faces.csv", status=0)
    text = "\n".join(lines)
    assert lines[-1] == "complete"
    for row in ("landmarks   │ 3 ", "train faces │ 5 ", "photographs │ 4 "):
        assert row in text
    assert "note boxes are made from the points; the rule of the boxes: left and top are" in text
    assert "note 1 of 15 points lie outside of their photographs, in 1 faces, such as" in text
    assert "me/faces.csv:6" in text
    assert "note 1 of 4 photographs show several faces, up to 2 (a.jpg)" in text
    assert "which landmarks change places in a mirror is not known" in text
    assert Image.open("hubpath-check-faces.png").size == (2 * SIDE, SIDE + HEAD)
    check("me/faces.csv", "--out", "drawn/it.png", status=0)
    assert Image.open("drawn/it.png").size == (2 * SIDE, SIDE + HEAD)


def test_photographs_elsewhere(here):
    write_photo("photos/a.jpg")
    write_photo("photos/b.jpg")
    rows = [["a.jpg", *draw_points(3, 1).ravel()], ["b.jpg", *draw_points(3, 2).ravel()]]
    write_csv("lists/faces.csv", own_header(), rows)
    assert check("lists/faces.csv", "--root", "photos", status=0)[-1] == "complete"
    lines = check("lists/faces.csv", status=1)
    assert any("refused lists/faces.csv: none of its 2 images is there" in line for line in lines)
    assert lines[-1] == "`hubpath landmarks fit` refuses these faces, for 1 reason"


def test_all_that_is_wrong_is_listed(here):
    good, rest = ["a.jpg", 1, 2, 3, 4, 5, 6], [["gone.jpg", 1, 2, 3, 4, 5, i] for i in range(40)]
    write_photo("a.jpg")
    write_csv("faces.csv", own_header(), [good, good[:-1], *rest])
    lines = [line for line in check("faces.csv", status=1) if line.startswith("refused")]
    assert lines[0] == "refused faces.csv:3: 6 columns, expected 7 as in the header"
    assert lines[-1].startswith("refused faces.csv:43: there is no image 'gone.jpg'")
    assert len(lines) == 41


def test_a_photograph_that_was_cut_short(here):
    """The head of a BMP is right: only reading its pixels tells."""
    write_own(here, own_rows("a.bmp", "b.bmp"))
    whole = (here / "b.bmp").read_bytes()
    (here / "b.bmp").write_bytes(whole[: len(whole) // 2])
    assert check("faces.csv", status=0)[-1] == "complete"
    lines = check("faces.csv", "--decode", status=1)
    assert any("the image 'b.bmp' cannot be read" in line for line in lines)


def test_a_folder_of_lists(here):
    write_own(here / "me", own_rows("a.jpg", "b.jpg"), name="train.csv")
    write_own(here / "me", own_rows("a.jpg", "c.jpg"), name="test.csv")
    lines = check("me", status=1)
    assert any("1 photograph is in both train and test (a.jpg)" in line for line in lines)
    assert lines[-1].startswith("`hubpath landmarks fit` trains on these faces")


def test_boxes_that_differ_from_the_rule(here):
    write_hrnet(
        here / "set", "300w", {"train": ["a.jpg:1", "b.jpg:2", "c.jpg:3"], "valid": ["d.jpg"]}
    )
    text = "\n".join(check("300w", "--root", "set", status=1))
    assert "note all 4 boxes are those of the rule" in text
    file = here / "set" / "face_landmarks_300w_train.csv"
    lines = file.read_text().splitlines()
    cells = lines[2].split(",")
    lines[2] = ",".join([cells[0], str(float(cells[1]) + 0.1), *cells[2:]])
    file.write_text("\n".join(lines))
    text = "\n".join(check("300w", "--root", "set", status=1))
    assert f"note 1 of 4 boxes differ from the rule, such as {file.relative_to(here)}:3: sc" in text
    assert "--box points takes the rule's" in text


def test_counts_of_a_published_set(here):
    write_cofw("set/COFW_train_color.mat", 3)
    write_cofw("set/COFW_test_color.mat", 2, part="test")
    lines = check("cofw", "--root", "set", status=1)
    assert "wrong train: 3 faces found, 1,345 published" in lines
    assert "wrong full: 2 faces found, 507 published" in lines
    assert any("of the landmarks are said to be occluded" in line for line in lines)
    assert lines[-1] == "not as it was published"
    assert Image.open("hubpath-check-cofw.png").size == (2 * SIDE, SIDE + HEAD)


def test_a_published_set_that_is_whole(here, monkeypatch):
    """With counts that a test can write."""
    write_cofw("set/COFW_train_color.mat", 3)
    write_cofw("set/COFW_test_color.mat", 2, part="test")
    monkeypatch.setattr(check_module, "FACES", {"cofw": {"train": 3, "full": 2}})
    assert check("COFW", "--root", "set", status=0)[-1] == "complete"


def test_what_is_not_there(here):
    assert "dataset 'wflw' lies in a folder; give it (--root DIR)" in refused(
        "data", "check", "wflw"
    )
    assert "gone.csv: no such file" in refused("data", "check", "gone.csv")
    (here / "empty").mkdir()
    lines = check("wflw", "--root", "empty", status=1)
    assert any("no train list, expected face_landmarks_wflw_train.csv" in line for line in lines)
    assert any(line.startswith("note get it: https://wywu.github.io") for line in lines)
    assert "out: a face is drawn where faces are checked" in refused(
        "data", "check", "empty", "--out", "x.png"
    )


def test_the_list_of_sets():
    text = hubpath("data", "list").stdout
    for title, points, train in (
        ("300W", 68, "3,148"),
        ("WFLW", 98, "7,500"),
        ("COFW", 29, "1,345"),
    ):
        [row] = [line for line in text.splitlines() if f"{title} (faces)" in line]
        assert f"{points} landmarks" in row
        assert train in row
    assert "wflw https://wywu.github.io" in text
    assert "its source has to be asked for it" in refused("data", "download", "wflw", "--root", "x")


def test_a_face_and_its_mirror_image(here):
    """Each landmark's mark lies where the crop has its point, in both pictures, in the colour of
    its side."""
    layout = LAYOUTS["cofw"]
    write_cofw("c.mat", 1)
    [face], _ = read_landmarks("c.mat", "cofw")
    sheet = np.asarray(Image.open(draw_pair(face, layout, here / "pair.png"))).astype(int)
    left, right = sheet[HEAD:, :SIDE], sheet[HEAD:, SIDE:]
    side = 200 * 1.25 * face.scale
    points = (face.points - torch.tensor(face.center)) * SIDE / side + SIDE / 2
    seen = 0
    for number, (x, y) in enumerate(points.tolist()):
        others = (points - points[number]).norm(dim=1)
        if others.sort().values[1] < 60:  # covered by another's number
            continue
        other = layout.flip[number]
        colour = FIRST if number < other else SECOND
        if number == other:
            continue
        seen += 1
        swapped = SECOND if colour == FIRST else FIRST
        assert np.abs(left[round(y), round(x)] - colour).max() <= 2
        assert np.abs(right[round(y), round(SIDE - 1 - x)] - swapped).max() <= 2
    assert seen >= 4


def test_a_run_on_a_list_with_faults_is_refused(here):
    """All of them in one message, before anything is built or written."""
    write_own(here, own_rows("a.jpg", "b.jpg"))
    with open("faces.csv", "a", encoding="utf-8") as file:
        file.write("a.jpg,1,2,3,4,5\na.jpg,1,2,3,4,5,nan\ngone.jpg,1,2,3,4,5,6\n")
    command = ("landmarks", "fit", "--data", "faces.csv", "--hub", "tiny", "--no-pretrained")
    text = refused(*command, "--out", "run")
    assert "error: faces.csv: 3 problems" in text
    for fault in (
        "faces.csv:4: 6 columns, expected 7 as in the header",
        "faces.csv:5: column mouth_y is 'nan', expected finite numbers",
        "faces.csv:6: there is no image 'gone.jpg', expected it in",
    ):
        assert fault in text
    assert not (here / "run").exists()
