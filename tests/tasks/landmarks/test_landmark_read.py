"""Lists of faces in the formats that they are published in, and what is said of wrong ones."""

import builtins

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from support.faces import (
    draw_points,
    hrnet_header,
    hrnet_row,
    own_header,
    wflw_line,
    write_cofw,
    write_csv,
    write_hrnet,
    write_old_cofw,
    write_own,
    write_photo,
    write_wflw,
)

from hubpath_fast.data import DataError
from hubpath_fast.tasks.landmarks import LAYOUTS, box_of_points, read_landmarks

HEADER = "image,x,y,x,y\n"


def refuse(path, *lines, name="csv", images=None, part=None):
    """The faces that are right, where the problems begin with what is given."""
    records, problems = read_landmarks(path, name, images, part)
    wanted = [f"{path}:{line}" if str(line)[:1] != ":" else f"{path}{line}" for line in lines]
    assert [found.startswith(text) for found, text in zip(problems, wanted, strict=True)] == [
        True
    ] * len(lines), "\n".join(problems)
    assert all(", expected " in found for found in problems), problems
    return records


def own_list(folder, text, name="faces.csv"):
    write_photo(folder / "a.jpg")
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def equal(face, points):
    return torch.equal(face.points, torch.from_numpy(points))


@pytest.mark.parametrize("name", ["300w", "wflw"])
def test_hrnet_lists_are_read_by_position(tmp_path, name):
    """Several faces in one photograph, and a name with blanks, as 300W's ibug has one."""
    rows = ["helen/a.jpg:1", "ibug/image_092 _01.jpg:2", "ibug/image_092 _01.jpg:3"]
    faces = write_hrnet(tmp_path, name, {"train": rows})
    records, problems = read_landmarks(tmp_path, name)
    assert problems == []
    assert [record.image for record in records] == [row.partition(":")[0] for row in rows]
    for record, row in zip(records, rows, strict=True):
        assert equal(record, faces[row])
        assert record.points.dtype == torch.float64
        assert (record.scale, *record.center) == box_of_points(torch.from_numpy(faces[row]))
        assert record.origin == LAYOUTS[name].origin
        assert record.size == (200, 160)
        assert record.pixels().shape == (3, 160, 200)
    assert [record.line for record in records] == [2, 3, 4]


def test_a_set_has_its_lists_and_images_where_they_are_unpacked(tmp_path):
    """The file alone, with or without its folder of images, finds the same."""
    write_hrnet(tmp_path / "data", "300w", {"train": ["a.jpg"], "valid_common": ["b.jpg"]})
    file = tmp_path / "data" / "face_landmarks_300w_train.csv"
    for path, images in ((tmp_path, None), (file, None), (file, tmp_path / "data" / "images")):
        records, problems = read_landmarks(path, "300w", images)
        assert (len(records), problems) == (1, [])
        assert records[0].source == tmp_path / "data" / "images" / "a.jpg"
    assert read_landmarks(tmp_path, "300w", part="common")[0][0].image == "b.jpg"


def test_300w_test_is_its_own_list_where_that_is_there(tmp_path):
    write_hrnet(tmp_path, "300w", {"valid": ["full.jpg"]})
    assert read_landmarks(tmp_path, "300w", part="test")[0][0].image == "full.jpg"
    write_hrnet(tmp_path, "300w", {"test": ["further.jpg"]})
    assert read_landmarks(tmp_path, "300w", part="test")[0][0].image == "further.jpg"
    assert read_landmarks(tmp_path, "300w", part="full")[0][0].image == "full.jpg"


def test_wflw_as_published_has_attributes_and_boxes_by_the_rule(tmp_path):
    rows = [("0--Parade/1.jpg", 1, ()), ("0--Parade/2.jpg", 2, ("largepose", "blur"))]
    faces = write_wflw(tmp_path, {"train": rows, "test": rows[1:]})
    records, problems = read_landmarks(tmp_path, "wflw")
    assert problems == []
    assert [record.groups for record in records] == [(), ("largepose", "blur")]
    for record, (photo, seed, _) in zip(records, rows, strict=True):
        points = np.round(faces[photo, seed], 6)
        assert equal(record, points)
        assert (record.scale, *record.center) == box_of_points(torch.from_numpy(points))
    assert len(read_landmarks(tmp_path, "wflw", part="blur")[0]) == 1
    assert len(read_landmarks(tmp_path, "wflw", part="makeup")[0]) == 0
    file = records[0].file
    assert [r.line for r in read_landmarks(file, "wflw", part="blur")[0]] == [2]


@pytest.mark.parametrize("userblock", [512, 0], ids=["as MATLAB writes it", "plain HDF5"])
def test_cofw_as_published(tmp_path, userblock):
    """References to transposed images, in colour and grey; numbers from 1."""
    file = tmp_path / "COFW_train_color.mat"
    points, occluded, images = write_cofw(file, 3, grey=(1,), userblock=userblock)
    records, problems = read_landmarks(tmp_path, "cofw")
    assert problems == []
    for i, record in enumerate(records):
        assert equal(record, points[i])
        assert record.occluded.tolist() == occluded[i].tolist()
        image = images[i] if i != 1 else np.repeat(images[i][..., None], 3, axis=2)
        assert np.array_equal(record.pixels().permute(1, 2, 0), image)
        assert (record.origin, record.size, record.line) == (1, (200, 160), i + 1)
        x, y = record.points[0].round().int().tolist()  # the disc is brightest there
        assert record.pixels()[0, y - 1, x - 1] > 200


def test_an_older_mat_says_the_same_as_a_newer(tmp_path):
    points, occluded, images = write_cofw(tmp_path / "new.mat", 3, part="test", grey=(2,))
    write_old_cofw(tmp_path / "old.mat", points, occluded, images, part="test")
    new, old = (read_landmarks(tmp_path / f"{kind}.mat", "cofw")[0] for kind in ("new", "old"))
    assert len(old) == 3
    for one, other in zip(new, old, strict=True):
        assert torch.equal(one.points, other.points)
        assert torch.equal(one.pixels(), other.pixels())
        assert torch.equal(one.occluded, other.occluded)
        assert one.size == other.size


def test_a_mat_without_its_keys_says_which_are_there(tmp_path):
    file = tmp_path / "COFW_train_color.mat"
    write_cofw(file)
    _, [problem] = read_landmarks(file, "cofw", part="test")
    assert "keys found are IsTr, bboxesTr, phisTr, expected" in problem
    assert "IsT, phisT (test)" in problem


@pytest.mark.parametrize("keep", [0.5, 0.01])
def test_a_mat_that_was_cut_short(tmp_path, keep):
    points, occluded, images = write_cofw(tmp_path / "new.mat")
    write_old_cofw(tmp_path / "old.mat", points, occluded, images)
    for file in tmp_path.glob("*.mat"):
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * keep)])
        _, [problem] = read_landmarks(file, "cofw")
        assert "damaged, cut short or of another version" in problem
        assert "expected COFW's .mat with the keys IsTr, phisTr" in problem


def test_a_mat_with_other_shapes(tmp_path):
    file = tmp_path / "c.mat"
    write_cofw(file)
    with h5py.File(file, "r+") as data:
        stored = data["phisTr"][()]
        del data["phisTr"]
        data["phisTr"] = stored.T
    refuse(file, ": phisTr has 87 x 3 values for 3 images", name="cofw")


def test_a_mat_whose_images_are_no_cell(tmp_path):
    with h5py.File(tmp_path / "new.mat", "w") as data:
        data["IsTr"], data["phisTr"] = np.zeros((3, 8, 8), np.uint8), np.zeros((87, 3))
    savemat(tmp_path / "old.mat", {"IsTr": np.zeros((3, 8, 8), np.uint8), "phisTr": np.zeros(9)})
    for file in (tmp_path / "new.mat", tmp_path / "old.mat"):
        _, [problem] = read_landmarks(file, "cofw")
        assert "IsTr is uint8 [3, 8, 8], no cell of images" in problem


def test_a_single_bad_face_in_a_mat(tmp_path):
    file = tmp_path / "c.mat"
    write_cofw(file)
    with h5py.File(file, "r+") as data:
        data["phisTr"][5, 1] = np.nan
        data[data["IsTr"][0, 2]].attrs["of"] = "face 3"
        del data["#refs#/2"]
        data["#refs#/2"] = np.zeros((4, 5, 6, 7), np.uint8)
        data["IsTr"][0, 2] = data["#refs#/2"].ref
    records = refuse(
        file, "2: a coordinate is not finite", "3: its image is uint8 [4, 5, 6, 7]", name="cofw"
    )
    assert [record.line for record in records] == [1]


def test_without_h5py_the_command_is_named(tmp_path, monkeypatch):
    write_cofw(tmp_path / "c.mat")
    real = builtins.__import__

    def without(name, *rest):
        if name == "h5py":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r'pip install "hubpath_fast\[landmarks\]"'):
        read_landmarks(tmp_path / "c.mat", "cofw")


def test_other_files_than_a_mat(tmp_path):
    own = own_list(tmp_path, HEADER + "a.jpg,1,2,3,4\n")
    refuse(own, ": no .mat file of MATLAB 5 to 7.3", name="cofw")
    write_cofw(tmp_path / "c.mat")
    refuse(tmp_path / "c.mat", ": a MATLAB file", name="wflw")


@pytest.mark.parametrize(
    "text",
    [
        HEADER + "a.jpg,1,2,30,40\n",
        "\ufeff" + HEADER.replace("\n", "\r\n") + "\r\n a.jpg ,1, 2,30 ,40\r\n",
        "File_Name,x0,y0,x1,y1\n'a.jpg',1,2,30,40\n".replace("'", '"'),
        "image_name,x_0,y_0,x_1,y_1\na.jpg,1,2,30,40",
        (HEADER + "a.jpg,1,2,30,40\n").encode("utf-16"),
    ],
    ids=["plain", "BOM and CRLF", "quotes", "pairs by number", "UTF-16"],
)
def test_an_own_list(tmp_path, text):
    records, problems = read_landmarks(own_list(tmp_path, text), "csv")
    assert problems == []
    assert records[0].points.tolist() == [[1, 2], [30, 40]]
    assert (records[0].scale, *records[0].center) == (38 / 200, 15.5, 21)
    assert (records[0].origin, records[0].source) == (0, tmp_path / "a.jpg")


@pytest.mark.parametrize("name", ["csv", "folder", None])
def test_names_of_an_own_list(tmp_path, name):
    """A name with blanks, several faces in one photograph, points outside of it."""
    points = [draw_points(3, 1), draw_points(3, 2), np.array([[-9.0, 5], [50, 60], [300, 70]])]
    rows = list(zip(["my photo.jpg", "my photo.jpg", "z.png"], points, strict=True))
    records, problems = read_landmarks(write_own(tmp_path, rows), name)
    assert problems == []
    assert all(map(equal, records, points))
    assert [record.outside().sum().item() for record in records] == [0, 0, 2]


@pytest.mark.parametrize(
    ("columns", "cells"),
    [
        ("scale,center_x,center_y", "0.5,60,70"),
        ("center_h,center_w,SCALE", "70,60,0.5"),
        ("box_x0,box_y0,box_x1,box_y1", "10,30,110,110"),
    ],
)
def test_boxes_of_an_own_list(tmp_path, columns, cells):
    """In any order and place; corners give a square about their middle."""
    own = own_list(tmp_path, f"image,x,y,{columns},x,y\na.jpg,1,2,{cells},3,4\n")
    records, problems = read_landmarks(own, "csv")
    assert problems == []
    assert (records[0].scale, *records[0].center) == (0.5, 60, 70)
    assert records[0].points.tolist() == [[1, 2], [3, 4]]


def test_where_photographs_are_looked_for(tmp_path):
    write_photo(tmp_path / "photos" / "sub" / "a.jpg")
    text = HEADER + "sub/a.jpg,1,2,3,4\n" + f"{tmp_path}/photos/sub/a.jpg,5,6,7,8\n"
    own = own_list(tmp_path, text + "sub\\a.jpg,9,6,7,8\n")
    records, problems = read_landmarks(own, "csv", images=tmp_path / "photos")
    assert problems == []
    assert {record.source for record in records} == {tmp_path / "photos" / "sub" / "a.jpg"}
    refuse(own, "2: there is no image 'sub/a.jpg', expected it in",
           "4: there is no image")  # fmt: skip
    _, [problem] = read_landmarks(own, "csv", images=tmp_path / "elsewhere")
    assert problem.startswith(f"{tmp_path / 'elsewhere'}: no such folder")


def test_a_list_without_any_of_its_photographs(tmp_path):
    """Said once; its rows are what they are."""
    write_hrnet(tmp_path, "wflw", {"train": ["a.jpg:1", "b.jpg:2"]})
    (tmp_path / "images").rename(tmp_path / "photos")
    file = tmp_path / "face_landmarks_wflw_train.csv"
    records = refuse(file, ": none of its 2 images is there, expected them in", name="wflw")
    assert equal(records[1], draw_points(98, 2))
    assert records[0].size is None
    assert len(refuse(file, name="wflw", images=tmp_path / "photos")) == 2
    (tmp_path / "other").mkdir()
    refuse(file, "2: there is no image", "3: there is", name="wflw", images=tmp_path / "other")


def test_orientation_turns_own_photographs_and_no_published_ones(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_photo(tmp_path / "a.jpg", exif=exif)
    write_photo(tmp_path / "a.png", exif=exif)
    rows = [["a.jpg", *draw_points(3, 1).ravel()], ["a.png", *draw_points(3, 1).ravel()]]
    own, _ = read_landmarks(write_csv(tmp_path / "own.csv", own_header(), rows), "csv")
    points = draw_points(68, 1)
    published = [hrnet_row("a.jpg", points), hrnet_row("a.png", points)]
    file = write_csv(tmp_path / "face_landmarks_300w_train.csv", hrnet_header(68), published)
    stored, _ = read_landmarks(file, "300w")
    for turned, plain in zip(own, stored, strict=True):
        assert (turned.size, plain.size) == ((160, 200), (200, 160))
        assert torch.equal(turned.pixels(), plain.pixels().transpose(1, 2).flip(2))


def test_all_that_is_wrong_with_an_own_list(tmp_path):
    """Each fault by its line, and the faces around them as they are."""
    (tmp_path / "broken.jpg").write_text("no image")
    whole = write_photo(tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    write_photo(tmp_path / "grey.png")
    Image.open(tmp_path / "grey.png").convert("L").save(tmp_path / "grey.png")
    rows = [
        "a.jpg,1,2,3,4",
        "a.jpg,1,2,3",
        "a.jpg,1,2,3,4,5",
        "a.jpg,1,abc,nan,4",
        "a.jpg,1,inf,,4",
        "gone.jpg,1,2,3,4",
        "broken.jpg,1,2,3,4",
        "cut.jpg,1,2,3,4",
        ",1,2,3,4",
        "a.jpg,5,5,5,5",
        "a.jpg,1000,1000,2000,2000",
        "a.jpg,1,2,3,4",
        '"a.jpg,1,2,3,4',
        "grey.png,-10,-10,20,30",
    ]
    own = own_list(tmp_path, HEADER + "\n".join(rows))
    records = refuse(
        own,
        "3: 4 columns, expected 5",
        "4: 6 columns, expected 5",
        "5: column y is 'abc', column x is 'nan', expected finite numbers",
        "6: column y is 'inf', column x is empty, expected finite numbers",
        "7: there is no image 'gone.jpg'",
        "8: the image 'broken.jpg' cannot be read",
        "9: the image 'cut.jpg' cannot be read",
        "10: no image (its column is empty)",
        "11: all points lie at (5, 5)",
        "12: the box (900, 900 to 2100, 2100) lies outside of the image 'a.jpg'"
        .replace("(900, 900 to 2100, 2100)", "(1000, 1000 to 2000, 2000)"),
        "13: the same face as in line 2",
        "14: no CSV",
    )  # fmt: skip
    assert [(record.image, record.line) for record in records] == [("a.jpg", 2), ("grey.png", 15)]
    assert records[0].points.tolist() == [[1, 2], [3, 4]]
    assert records[1].pixels().shape == (3, 160, 200)


@pytest.mark.parametrize(
    ("columns", "cells", "fault"),
    [
        ("scale,center_x,center_y", "0,50,50", "scale 0, expected a number above 0"),
        ("scale,center_x,center_y", "-1,50,50", "scale -1, expected a number above 0"),
        ("scale,center_x,center_y", "nan,50,50", "column scale is 'nan'"),
        ("scale,center_x,center_y", "1,-500,50", "the box (-600, -50 to -400, 150) lies outside"),
        ("box_x0,box_y0,box_x1,box_y1", "60,10,10,50", "the box 60,10,10,50 is empty"),
    ],
)
def test_boxes_that_are_none(tmp_path, columns, cells, fault):
    good = "a.jpg," + {3: "1,50,50", 4: "1,1,90,90"}[columns.count(",") + 1]
    text = f"image,{columns},x,y,x,y\na.jpg,{cells},1,2,3,4\n{good},5,6,7,8\n"
    assert [r.line for r in refuse(own_list(tmp_path, text), f"2: {fault}")] == [3]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", ": an empty file"),
        ("\n \n", ": an empty file"),
        (HEADER, "1: no face after this line"),
        ("a.jpg,1,2,3,4\n", "1: no header line"),
        (",image,x,y\n0,a.jpg,1,2\n", "1: the first column has no name"),
        ("name,image,x,y\n0,a.jpg,1,2\n", "1: the first column is 'name'"),
        ("image,x,y,x\na.jpg,1,2,3\n", "1: column 4: 'x' is no pair"),
        ("image,left_x,right_y\na.jpg,1,2\n", "1: column 2 and 3: 'left_x' and 'right_y'"),
        ("image,a_x,a_y,a_x,a_y\na.jpg,1,2,3,4\n", "1: the landmark 'a' stands twice"),
        ("image,scale,x,y\na.jpg,1,2,3\n", "1: a part of a box (scale)"),
        ("image\na.jpg\n", "1: no columns of points"),
        ("image;x;y\na.jpg;1;2\n", "1: columns are separated by ';'"),
        ("image,x,y\n\0\0a.jpg,1,2\n", "2: it holds zero bytes"),
        ((HEADER + "b\xfcb.jpg,1,2,3,4\n").encode("latin-1"), "2: the byte 0xfc is no UTF-8"),
    ],
)
def test_whole_lists_that_cannot_be_read(tmp_path, text, fault):
    assert refuse(own_list(tmp_path, text), fault) == []


def test_a_list_in_windows_encoding_whose_photographs_are_there(tmp_path):
    write_photo(tmp_path / "b\xfcb.jpg")
    text = (HEADER + "b\xfcb.jpg,1,2,3,4\n").encode("cp1252")
    records, problems = read_landmarks(own_list(tmp_path, text), "csv")
    assert (problems, records[0].source) == ([], tmp_path / "b\xfcb.jpg")


def test_all_that_is_wrong_with_a_published_list(tmp_path):
    write_hrnet(tmp_path, "wflw", {"train": ["a.jpg"]})
    points = draw_points(98, 5)
    same_corners = points.copy()
    same_corners[72] = same_corners[60]
    good, one = hrnet_row("a.jpg", points), hrnet_row("a.jpg", same_corners)
    zero = ["a.jpg", 0, *good[2:]]
    file = tmp_path / "face_landmarks_wflw_train.csv"
    write_csv(file, hrnet_header(98), [good, one, zero, good[:-2], good])
    records = refuse(
        file,
        "3: the outer eye corners, landmarks 60 and 72, coincide",
        "4: scale 0",
        "5: 198 columns, expected 200",
        "6: the same face as in line 2",
        name="wflw",
    )
    assert [record.line for record in records] == [2]
    refuse(file, "1: 200 columns, expected 140", name="300w")
    write_csv(file, good, [good])
    refuse(file, "1: the first line is a face, expected a header", name="wflw")


def test_all_that_is_wrong_with_wflw_as_published(tmp_path):
    write_wflw(tmp_path, {"train": [("a.jpg", 1, ())]})
    [file] = tmp_path.rglob("*_train.txt")
    points = draw_points(98, 2)
    line = wflw_line("a.jpg", points)
    lines = [
        line,
        line.replace(" 1 2 33 44 ", " "),
        line.replace(" 44 0 ", " 44 7 "),
        wflw_line("gone.jpg", points),
        "x" + line,
        wflw_line("a.jpg", points[::-1]),
    ]
    file.write_text("\n".join(lines))
    records = refuse(
        file,
        "2: 203 fields, expected 207",
        "3: the attributes 7 0 0 0 0 0, expected 6 of 0 or 1",
        "4: there is no image 'gone.jpg'",
        f"5: column x0 is 'x{points[0, 0]:.6f}'",
        name="wflw",
    )
    assert [record.line for record in records] == [1, 6]
    file.write_text("")
    refuse(file, ": an empty file", name="wflw")


def test_lists_that_are_not_there(tmp_path):
    refuse(tmp_path, ": no train list, expected face_landmarks_300w_train.csv", name="300w")
    refuse(tmp_path / "gone.csv", ": no such file")
    write_hrnet(tmp_path, "wflw", {"train": ["a.jpg"], "test": ["b.jpg"]})
    _, [problem] = read_landmarks(tmp_path, "wflw", part="blur")
    assert "nothing tells which faces are blur, expected face_landmarks_wflw_test_blur" in problem


def test_names_and_parts_that_are_not_known(tmp_path):
    own = own_list(tmp_path, HEADER + "a.jpg,1,2,3,4\n")
    with pytest.raises(ValueError, match="did you mean wflw"):
        read_landmarks(own, "wlfw")
    with pytest.raises(ValueError, match="part: expected one of train, validation, test"):
        read_landmarks(own, "csv", part="blur")
