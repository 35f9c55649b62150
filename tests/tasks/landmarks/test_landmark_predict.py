"""Points in photographs: where they are, whom the run asked, and what is refused."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from support.blobs import NAMES, blob_photo, blob_run
from support.command import hubpath, refused

from hubpath_fast.recipes import landmarks_predict
from hubpath_fast.recipes.landmarks_predict import (
    boxes_of,
    draw_points,
    predict_landmarks,
    read_box,
)

POINTS = [(80.0, 60.0), (121.5, 64.25), (100.75, 110.5)]
BOX = (80.0, 60.0, 122.0, 111.0)
# A cell of the map is 51 * 1.25 / 16 = 3.98 pixels: found to half of it, mostly to a quarter.
CELL = 51 * 1.25 / 16


def found(images, boxes, **run):
    return list(predict_landmarks(blob_run(**run), images, boxes))


@pytest.fixture
def photo(tmp_path):
    return blob_photo(tmp_path / "a.png", POINTS)


def away(face, points=POINTS):
    return (face.points - torch.tensor(points, dtype=torch.float64)).abs().max().item()


def test_points_are_in_pixels_of_the_photograph(photo):
    [face] = found([photo], [BOX])
    assert face.points.dtype == torch.float64
    assert away(face) < CELL / 2
    assert (face.confidence > 0.5).all()
    assert face.error is None
    assert face.empty == 0
    # A finer map finds them finer: there is no shift of half a pixel in the way.
    [fine] = found([photo], [BOX], size=512)
    assert away(fine) < 0.3


def test_whom_it_asked(photo):
    [face] = found([photo], [BOX])
    first, second = torch.tensor([2.0, 1.0]).softmax(0).tolist()
    assert list(face.experts) == ["test_resnet", "test_vit"]
    assert face.experts["test_resnet"] == pytest.approx(first)
    assert face.experts["test_vit"] == pytest.approx(second)


def test_the_whole_photograph(photo):
    """Its middle is between pixel centres: half a pixel off would show at this size."""
    [face] = found([photo], [None], size=512)
    assert face.box == (-0.5, -0.5, 199.5, 159.5)
    assert away(face) < 200 * 1.25 / 128 / 2
    assert away(found([photo], [(-0.5, -0.5, 199.5, 159.5)], size=512)[0]) == away(face)


def test_a_box_that_leaves_the_photograph(photo):
    [face] = found([photo], [(60.0, 40.0, 230.0, 130.0)], size=512)
    assert away(face) < 170 * 1.25 / 128 / 2


def test_a_turned_photograph_is_read_upright(tmp_path):
    """Orientation 6: what is stored lies on its side; the points are those that a viewer shows."""
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = blob_photo(tmp_path / "plain.png", POINTS)
    with Image.open(plain) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    faces = found([tmp_path / "turned.png", plain], [BOX, BOX])
    assert torch.equal(faces[0].points, faces[1].points)
    assert "turned.png has an EXIF orientation (6)" in faces[0].note
    assert faces[1].note is None


def test_one_photograph_with_two_faces_and_many_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(landmarks_predict, "BATCH", 2)
    moved = [(x + 30, y - 20) for x, y in POINTS]
    first, second = blob_photo(tmp_path / "a.png", POINTS), blob_photo(tmp_path / "b.png", moved)
    other = (110.0, 40.0, 152.0, 91.0)
    faces = found(
        [first, second, tmp_path / "gone.png", second, first], [BOX, other, BOX, other, BOX]
    )
    assert [away(faces[i], p) < CELL for i, p in ((0, POINTS), (1, moved), (3, moved), (4, POINTS))]
    assert "gone.png" in faces[2].error
    assert faces[2].points is None


def test_a_box_outside_is_said_and_the_others_are_answered(photo):
    boxes = [
        (300.0, 10, 340, 50),
        BOX,
        (10.0, -60, 50, -2),
        (-60.0, 10, -1, 50),
        (9.0, 160, 30, 190),
    ]
    faces = found([photo] * 5, boxes)
    expected = "a.png: the box 300,10,340,50 lies outside the photograph of 200 x 160 pixels"
    assert faces[0].error.endswith(expected)
    assert away(faces[1]) < CELL / 2
    assert all("lies outside" in face.error for face in faces[2:])


@pytest.mark.parametrize("box", [(50.0, 50.0, 50.9, 50.5), (-1.0, 0.0, 2000.0, 10.0)])
def test_a_box_that_no_face_can_fill(photo, box):
    """A billion pixels a side would ask for more memory than there is."""
    [face] = found([photo], [box])
    assert "pixels a side, expected 1 to 2000 in the photograph of 200 x 160" in face.error


def test_a_photograph_is_drawn_with_its_points(photo, tmp_path):
    [face] = found([photo], [BOX])
    taken = {photo.resolve()}
    drawn = draw_points(face, tmp_path, taken)
    again = draw_points(face, tmp_path, taken)
    assert (drawn.name, again.name) == ("a_points.png", "a-2_points.png")
    picture = np.asarray(Image.open(drawn).convert("RGB"))
    assert picture.shape == (160, 200, 3)
    for x, y in face.points.tolist():
        assert tuple(picture[round(y), round(x)]) in ((0, 230, 118), (0, 0, 0))
    assert tuple(picture[60, 100]) == (255, 214, 0)  # the box's upper edge
    nothing = found([blob_photo(tmp_path / "b.png", [(500, 500)] * 3)], [BOX])[0]
    assert nothing.empty == 3
    assert nothing.points[0].tolist() == pytest.approx(
        [101 - 63.75 / 2 + CELL / 2, 85.5 - 63.75 / 2 + CELL / 2]
    )
    picture = np.asarray(Image.open(draw_points(nothing, tmp_path, taken)).convert("RGB"))
    x, y = nothing.points[0].tolist()
    assert tuple(picture[round(y), round(x)]) in ((255, 82, 82), (0, 0, 0))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("30,40,210", "got 3 numbers, '30,40,210'"),
        ("30,40,210,a", "expected x0,y0,x1,y1 in pixels, .* or image, got '30,40,210,a'"),
        ("30,40,nan,260", "got '30,40,nan,260'"),
        ("30,40,30,260", "got the empty box '30,40,30,260'"),
        ("30,260,210,40", "with x0 < x1 and y0 < y1"),
        ("", "expected x0,y0,x1,y1"),
    ],
)
def test_what_is_no_box(text, words):
    with pytest.raises(ValueError, match=words):
        read_box(text)


def test_boxes_of_photographs():
    assert read_box(" 30, 40,210.5,260") == (30.0, 40.0, 210.5, 260.0)
    assert read_box("image") is None
    assert boxes_of(["image"], 3) == [None] * 3
    assert boxes_of(["1,2,3,4", "image"], 2) == [(1.0, 2.0, 3.0, 4.0), None]
    with pytest.raises(ValueError, match="one for all 3 photographs or one for each, got 2"):
        boxes_of(["image", "image"], 3)
    with pytest.raises(ValueError, match=r"box: nothing given, .* --box image"):
        boxes_of([], 3)


class TestCommand:
    @pytest.fixture(autouse=True)
    def run(self, monkeypatch):
        monkeypatch.setattr("hubpath_fast.runs.folder.open_run", lambda *_: blob_run())

    def test_it_writes_pictures_and_points(self, photo, tmp_path):
        out = tmp_path / "out"
        command = ("landmarks", "predict", "run", photo, "--box", "80,60,122,111", "--out", out)
        said = hubpath(*command).stdout
        assert f"{photo}: 3 points, mean confidence 0." in said
        assert "experts: test_resnet 0.73, test_vit 0.27" in said
        assert f"points of 1 of 1 faces in {out / 'points.csv'}" in said
        assert sorted(path.name for path in out.iterdir()) == ["a_points.png", "points.csv"]
        with open(out / "points.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        assert rows[0] == ["image", "name", "x", "y", "confidence"]
        assert [row[:2] for row in rows[1:]] == [[str(photo), name] for name in NAMES]
        for row, (x, y) in zip(rows[1:], POINTS, strict=True):
            assert abs(float(row[2]) - x) < CELL / 2
            assert abs(float(row[3]) - y) < CELL / 2
            assert 0.5 < float(row[4]) <= 1

    def test_what_was_drawn_is_not_read_again(self, photo, tmp_path):
        given = (
            "landmarks",
            "predict",
            "run",
            tmp_path,
            "--box",
            "image",
            "--out",
            tmp_path / "out",
        )
        for _ in range(2):
            assert "points of 1 of 1 faces" in hubpath(*given).stdout

    def test_some_photographs_have_no_answer(self, photo, tmp_path):
        (tmp_path / "text.png").write_text("no image")
        given = ("landmarks", "predict", "run", photo, tmp_path / "text.png")
        result = hubpath(*given, "--box", "image", "--out", tmp_path / "out", status=1)
        assert "text.png" in result.stderr
        assert "1 of 2 images have no points" in result.stderr
        assert "points of 1 of 2 faces" in result.stdout

    def test_no_photograph_has_an_answer(self, photo, tmp_path):
        given = ("landmarks", "predict", "run", photo, "--out", tmp_path / "out")
        said = refused(*given, "--box", "900,900,950,950")
        assert "the box 900,900,950,950 lies outside the photograph of 200 x 160 pixels" in said

    def test_a_stop_keeps_what_was_found(self, photo, tmp_path, monkeypatch):
        def stopped(*asked):
            yield from found([photo], [BOX])
            raise KeyboardInterrupt

        monkeypatch.setattr(landmarks_predict, "predict_landmarks", stopped)
        out = tmp_path / "out"
        given = ("landmarks", "predict", "run", photo, photo, "--box", "image", "--out", out)
        result = hubpath(*given, status=130)
        assert f"stopped after 1 of 2 images; {out / 'points.csv'} holds" in result.stderr
        assert len((out / "points.csv").read_text().splitlines()) == 1 + 3

    def test_wrong_options(self, photo, tmp_path):
        given = ("landmarks", "predict", "run", photo, "--out", tmp_path / "out")
        assert "got 3 numbers, '30,40,210'" in refused(*given, "--box", "30,40,210")
        assert "box: nothing given" in refused(*given)
        given = ("landmarks", "predict", "run", photo, "--box", "image", "--out", photo)
        assert "out: expected a folder, got the file" in refused(*given)
        given = ("landmarks", "predict", "run", tmp_path / "none.png", "--box", "image")
        assert "nothing to read" in refused(*given, "--out", tmp_path / "out")
