"""A run keeps its faces: what is said and what is refused where the data is another now."""

import pytest
from PIL import Image
from support.faces import draw_points, write_cofw, write_hrnet, write_own, write_photo

from hubpath_fast.data import DataError
from hubpath_fast.data.kept import FileList
from hubpath_fast.tasks.landmarks import open_faces
from hubpath_fast.tasks.landmarks.kept import face_list, reopen_faces


def names(split):
    return [face.image for face in split.faces]


@pytest.fixture
def root(tmp_path):
    lists = {"train": [f"{photo}.jpg:{i}" for i, photo in enumerate("aabcde")]}
    lists |= {"test": ["s.jpg:20", "t.jpg:21"], "test_blur": ["t.jpg:21"]}
    write_hrnet(tmp_path / "wflw", "wflw", lists)
    return tmp_path / "wflw"


def keep(splits, path):
    """As a run writes and reads it."""
    face_list(splits.distinct).write(path)
    return FileList.read(path)


def rows_of(root, name="train"):
    file = root / f"face_landmarks_wflw_{name}.csv"
    return file, file.read_text().splitlines()


def test_nothing_has_changed(tmp_path, root):
    splits = open_faces("wflw", root, seed=4, validation=0.4)
    kept = keep(splits, tmp_path / "files.csv.gz")
    again = reopen_faces(kept, "wflw", root, validation=0.4, seed=9)  # the draw is kept
    for split, part in splits.distinct.items():
        assert names(again.distinct[split]) == names(part)
    assert (again.changes, again.subsets) == ((), splits.subsets)
    assert again.layout == splits.layout


def test_a_folder_that_was_moved_and_other_orders(tmp_path, root):
    splits = open_faces("wflw", root)
    kept = keep(splits, tmp_path / "files.csv.gz")
    moved = root.rename(tmp_path / "elsewhere")
    file, lines = rows_of(moved)
    file.write_text("\n".join([lines[0], *lines[:0:-1]]))
    again = reopen_faces(kept, "wflw", moved)
    assert names(again.train) == names(splits.train)
    assert again.changes == ()
    with pytest.raises(DataError, match="does not exist; if it was moved, give its place now"):
        reopen_faces(kept, "wflw", root)


def test_faces_that_were_added(tmp_path, root):
    splits = open_faces("wflw", root)
    kept = keep(splits, tmp_path / "files.csv.gz")
    file, lines = rows_of(root)
    cells = lines[1].split(",")
    file.write_text("\n".join([*lines, ",".join([*cells[:4], "99", *cells[5:]])]))
    again = reopen_faces(kept, "wflw", root)
    assert names(again.train) == names(splits.train)
    [change] = again.changes
    assert change.startswith("1 faces were added to WFLW")
    assert "not used; start a new run" in change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda cells: [*cells[:4], "99", *cells[5:]], "1 changed (b.jpg: other points or another"),
        (lambda cells: [cells[0], "2.5", *cells[2:]], "1 changed (b.jpg: other points or another"),
        (lambda cells: ["gone.jpg", *cells[1:]], "1 changed (b.jpg: no longer listed"),
    ],
    ids=["another point", "another box", "another photograph"],
)
def test_rows_that_were_changed(tmp_path, root, change, words):
    splits = open_faces("wflw", root)
    kept = keep(splits, tmp_path / "files.csv.gz")
    file, lines = rows_of(root)
    lines[3] = ",".join(change(lines[3].split(",")))
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match="not what it was when this run was begun") as error:
        reopen_faces(kept, "wflw", root)
    assert f"of the 8 faces of WFLW ({root}) that it began with, {words}" in str(error.value)
    scored = reopen_faces(kept, "wflw", root, scored=True)
    assert names(scored.test) == ["s.jpg", "t.jpg"]
    assert "that are not scored are not what they were" in scored.changes[-1]


def test_photographs_that_are_gone_or_others(tmp_path, root):
    kept = keep(open_faces("wflw", root), tmp_path / "files.csv.gz")
    write_photo(root / "images" / "s.jpg", seed=5)
    (root / "images" / "t.jpg").unlink()
    for scored in (False, True):
        with pytest.raises(DataError, match=r"1 gone \(t.jpg\), 1 changed \(s.jpg: \d+ bytes then"):
            reopen_faces(kept, "wflw", root, scored=scored, what="comparison")


def test_a_broken_photograph_of_the_same_size(tmp_path, root):
    kept = keep(open_faces("wflw", root), tmp_path / "files.csv.gz")
    photo = root / "images" / "s.jpg"
    photo.write_bytes(b"x" * photo.stat().st_size)
    with pytest.raises(DataError, match=r"1 of \d photographs cannot be read; restore: .*s.jpg"):
        reopen_faces(kept, "wflw", root)
    assert len(reopen_faces(kept, "wflw", root, verify=False).test) == 2


def test_a_face_in_another_split(tmp_path):
    rows = [(f"{photo}.png", draw_points(3, i)) for i, photo in enumerate("abcd")]
    write_own(tmp_path, rows[:3], name="train.csv")
    write_own(tmp_path, rows[3:], name="test.csv")
    splits = open_faces(None, tmp_path)
    kept = keep(splits, tmp_path / "files.csv.gz")
    write_own(tmp_path, rows[:2], name="train.csv")
    write_own(tmp_path, rows[2:], name="test.csv")
    for name, _ in rows:  # of the sizes that they had
        Image.open(tmp_path / name).save(tmp_path / name)
    kept = FileList(
        {
            split: [row._replace(size=(tmp_path / row.path).stat().st_size) for row in some]
            for split, some in kept.rows.items()
        }
    )
    again = reopen_faces(kept, None, tmp_path)
    assert names(again.test) == ["d.png"]
    assert set(names(again.train) + names(again.validation)) == {"a.png", "b.png", "c.png"}
    [change] = again.changes
    assert "lists 1 faces in another split" in change


def test_faces_before_anything_is_held_out(tmp_path, root):
    """What all runs of a comparison draw from, each by its own seed."""
    splits = open_faces("wflw", root)
    face_list(splits.parts).write(tmp_path / "files.csv.gz")
    kept = FileList.read(tmp_path / "files.csv.gz")
    assert set(kept.rows) == {"train", "test"}
    one, other = (reopen_faces(kept, "wflw", root, validation=0.4, seed=s) for s in (0, 1))
    assert names(one.validation) == names(open_faces("wflw", root, validation=0.4).validation)
    assert names(one.validation) != names(other.validation)


def test_faces_of_a_mat(tmp_path):
    write_cofw(tmp_path / "COFW_train_color.mat", 4)
    write_cofw(tmp_path / "COFW_test_color.mat", 2, part="test")
    kept = keep(open_faces("cofw", tmp_path), tmp_path / "files.csv.gz")
    assert kept.rows["test"][1].path == "COFW_test_color.mat#2"
    assert reopen_faces(kept, "cofw", tmp_path).changes == ()
    write_cofw(tmp_path / "COFW_test_color.mat", 1, part="test")
    with pytest.raises(DataError, match=r"2 changed|1 changed"):
        reopen_faces(kept, "cofw", tmp_path)


def test_other_settings_make_other_boxes(tmp_path, root):
    file, lines = rows_of(root)
    lines[1] = ",".join([lines[1].split(",")[0], "2.0", *lines[1].split(",")[2:]])
    file.write_text("\n".join(lines))
    kept = keep(open_faces("wflw", root), tmp_path / "files.csv.gz")
    with pytest.raises(DataError, match="another box"):
        reopen_faces(kept, "wflw", root, box="points")
