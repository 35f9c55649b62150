"""`hubpath data check` of a user's own folder: everything that is wrong, in one screen."""

from __future__ import annotations

import json
import math
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from support.command import hubpath, refused

from hubpath_fast.data import DataError, check_dataset, open_images
from hubpath_fast.data.copies import equal_files

SIZE = (20, 20)
COLUMNS, LINES = 100, 40


@pytest.fixture
def photos(tmp_path, write_images, monkeypatch):
    """photos/train and photos/test, with 8 and 2 images of red and of green; the current folder is
    the one above, and the terminal 100 columns wide."""
    sizes = {f"{split}/{name}/{i}.png": SIZE
             for split, count in (("train", 8), ("test", 2))
             for name in ("red", "green") for i in range(count)}  # fmt: skip
    write_images(tmp_path / "photos", sizes)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    return tmp_path / "photos"


def checked(*arguments, status=1):
    """The lines of ``data check`` that say something, joined as they were meant; and that they
    fill one screen."""
    output = hubpath("data", "check", *arguments, status=status).output
    shown = sum(max(1, math.ceil(len(line) / COLUMNS)) for line in output.splitlines())
    assert shown < LINES, output
    marks = ("refused ", "look ", "note ")
    return [line for line in output.splitlines() if line.startswith(marks)], output


def test_a_folder_with_one_of_each_problem_is_told_in_one_screen(photos, write_images):
    train, test = photos / "train", photos / "test"
    # What fit refuses.
    (train / "blue").mkdir()
    (train / "blue" / "a.heic").write_bytes(b"x")
    (train / "red" / "note.png").write_text("no image")
    (train / "red" / "empty.jpg").touch()
    os.symlink("gone.jpg", train / "red" / "gone.jpg")
    write_images(photos, {"test/yak/0.png": SIZE})
    # What it leaves out.
    for name in ("b.heic", "c.psd", "d.mp4", "e.svg", "img.0001"):
        (train / "red" / name).write_bytes(b"x")
    (train / "red" / "0001").write_bytes((train / "red" / "0.png").read_bytes())
    (train / "red" / "README").write_text("x")
    (train / "red" / ".old.png").write_bytes(b"x")
    (train / "red" / ".cache").mkdir()
    os.symlink("/not-mounted", train / "grey")
    os.symlink("..", train / "red" / "up")
    write_images(photos, {"train/loose.png": SIZE, "more/red/0.png": SIZE, "loose.png": SIZE})
    (photos / "notes").mkdir()
    write_images(photos, {"__MACOSX/x.png": SIZE, "train/red/@eaDir/x.png": SIZE})
    for name in ("Thumbs.db", "._0.png", ".DS_Store", "notes.txt"):
        (train / "red" / name).write_bytes(b"x")
    write_images(photos, {"hubpath-run/report/figures/x.png": SIZE})
    fit = {"config": {}, "classes": [], "image_size": 8}
    (photos / "hubpath-run" / "fit.json").write_text(json.dumps(fit))
    # What makes figures wrong, and what is good to know.
    shutil.copy(train / "red" / "1.png", test / "red" / "copy.png")
    shutil.copy(train / "red" / "2.png", train / "green" / "copy.png")
    shutil.copy(train / "red" / "3.png", train / "red" / "copy.png")
    write_images(photos, {"train/red/tiny.png": (3, 1), "train/Red/a.png": SIZE})
    for i in range(180):
        write_images(photos, {f"train/red/more/{i}.png": SIZE})

    lines, output = checked("photos")
    assert lines == [
        "refused photos/train has no images of class blue, but 2 .heic files "
        "(photos/train/blue/a.heic)",
        "refused photos/test has images of class yak, which photos/train has not",
        "refused photos/test has no images of 2 of the 4 classes of photos/train: Red, blue",
        "refused train: 1 images are missing: photos/train/red/gone.jpg",
        "refused train: 2 images are broken: " + lines[4].partition("broken: ")[2],
        "look left out: 2 .heic files (photos/train/blue/a.heic)",
        "look left out: 1 folder beside train/ (photos/more)",
        "look left out: 1 image beside train/ (photos/loose.png)",
        "look left out: 1 link to what does not exist (photos/train/grey)",
        "look left out: 1 hidden folder (photos/train/red/.cache)",
        "look left out: 1 hidden image (photos/train/red/.old.png)",
        "look left out: 1 image without the ending .png (photos/train/red/0001)",
        "look left out: 1 file without an ending (photos/train/red/README)",
        "look left out: 1 .psd file (photos/train/red/c.psd)",
        "look left out: 1 .mp4 file (photos/train/red/d.mp4)",
        "look left out: 1 .svg file (photos/train/red/e.svg)",
        "look left out: 1 file with unknown endings (photos/train/red/img.0001)",
        "look left out: 1 image beside the folders of classes (photos/train/loose.png)",
        "look 1 image is in two splits: photos/train/red/1.png (train) = "
        "photos/test/red/copy.png (test)",
        "look 1 image has two classes: photos/train/green/copy.png (green) = "
        "photos/train/red/2.png (red)",
        "note 1 image is there more than once: photos/train/red/3.png = "
        "photos/train/red/copy.png",
        "note 95 % of train are red: always saying so is right as often",
        "note classes with nearly the same name: 'Red' and 'red'",
        "note images with a side below 16 pixels: 1, such as photos/train/red/tiny.png",
        "note left out: 2 folders of the system or of other tools (photos/__MACOSX)",
        "note left out: 1 folder that hubpath wrote (photos/hubpath-run)",
        "note left out: 1 link back to what is read already (photos/train/red/up)",
        "note left out: 3 files of the system (photos/train/red/.DS_Store), 1 folder "
        "without images (photos/notes), 1 .txt file (photos/train/red/notes.txt)",
    ]  # fmt: skip
    for name in ("note.png", "empty.jpg"):
        assert f"photos/train/red/{name} (" in lines[4]
    assert "complete" not in output
    assert "refuses these images, for 5 reasons" in output
    with pytest.raises(DataError, match=r"no images of class blue.*\(2 more of such: `hubpath da"):
        open_images("photos")


def test_a_list_with_one_of_each_problem(photos):
    lines = [f"train/red/{i}.png 1" for i in range(8)]
    lines += ["train/red/0.png 3", "train/red/0.png 3", "train/red/gone.png 1", "train/red/1.png",
              "train/red/2.png -1", "train/green/0.png 0"]  # fmt: skip
    (photos / "train.txt").write_text("\n".join(lines))
    (photos / "test.txt").write_text("test/red/0.png 1\ntrain/red/0.png 1\n", encoding="utf-16")
    found, _ = checked("photos")
    assert found == [
        "refused photos/train.txt, line 12: expected a path and a class, separated by a space, but "
        "found 'train/red/1.png'",
        "refused photos/train.txt gives 1 images the class -1 (line 13: train/red/2.png)",
        "refused photos/train.txt names 1 of 12 images that do not exist: "
        "photos/train/red/gone.png",
        "refused photos/train.txt has numbered classes up to 3 but no image of class 2",
        "refused photos/test.txt has no images of 2 of the 3 classes of photos/train.txt: 0, 3",
        "look 1 image is in two splits: photos/train/red/0.png (train and test)",
        "look 1 image has two classes: photos/train/red/0.png (1 and 3)",
        "note images that no list names: 10, such as photos/test/green/0.png",
    ]


def test_litter_alone_is_nothing_wrong_and_a_folder_without_is_complete(photos):
    assert checked("photos", status=0)[1].splitlines()[-1] == "complete"
    assert check_dataset("folder", "photos").complete
    (photos / "train" / "red" / "Thumbs.db").write_bytes(b"x")
    (photos / "train" / "__MACOSX").mkdir()
    lines, output = checked("photos", status=0)
    assert "complete" not in output
    assert "nothing is wrong; what was left out is none of your images" in output
    report = check_dataset("folder", "photos")
    assert (report.sound, report.complete, report.skipped) == (True, False, 2)
    assert [line for line in lines if "left out" in line] == [
        "note left out: 1 folder of the system or of other tools (photos/train/__MACOSX)",
        "note left out: 1 file of the system (photos/train/red/Thumbs.db)",
    ]
    assert "2 of 16 training images held out" in output
    (photos / "train" / "red" / "a.heic").write_bytes(b"x")
    lines, output = checked("photos")
    assert "complete" not in output
    assert "`hubpath fit` trains on these images, and mentions what to look at" in output


def test_fit_says_it_in_a_line(photos):
    shutil.copy(photos / "train" / "red" / "0.png", photos / "test" / "red" / "x.png")
    for name in ("a.heic", "b.psd", "c.mp4", "d.mov", "Thumbs.db"):
        (photos / "train" / "red" / name).write_bytes(b"x")
    assert open_images("photos").notes[1:] == (
        "left out: 1 .heic file (photos/train/red/a.heic), 1 .psd file (photos/train/red/b.psd), "
        "1 .mp4 file (photos/train/red/c.mp4), 1 others; `hubpath data check photos` says more",
        "1 image is in two splits: photos/train/red/0.png (train) = photos/test/red/x.png (test)"
        "; `hubpath data check photos` says more",
    )


def test_copies_are_told_from_files_of_the_same_size(tmp_path):
    """Bitmaps of one size, of which only the first rows differ or only the middle ones do."""
    paths = [tmp_path / f"{i:03}.bmp" for i in range(200)]
    random = np.random.RandomState(0)
    for i, path in enumerate(paths):
        pixels = np.zeros((90, 90, 3), np.uint8)
        pixels[(0 if i % 2 else 45)] = random.randint(0, 255, (90, 3))
        Image.fromarray(pixels).save(path)
    for i, j in ((1, 150), (1, 7), (20, 30)):
        shutil.copy(paths[i], paths[j])
    (tmp_path / "empty").touch()
    names = [*paths, tmp_path / "empty", tmp_path / "empty2", tmp_path / "gone", paths[5]]
    (tmp_path / "empty2").touch()
    assert equal_files(names) == [[1, 7, 150], [5, 203], [20, 30]]


def test_what_users_type(photos, monkeypatch):
    for words in (["photos"], ["photos/"], ["./photos"], ["--root", "photos"],
                  ["folder", "--root", "photos"]):  # fmt: skip
        assert "complete" in hubpath("data", "check", *words).output
    monkeypatch.chdir(photos)
    assert "complete" in hubpath("data", "check", ".").output
    photos.rename(photos.parent / "cars")
    monkeypatch.chdir(photos.parent)
    assert "complete" in hubpath("data", "check", "./cars").output
    assert "`hubpath data check ./cars`" in refused("data", "check", "cars")
    assert "there is no folder photos" in refused("data", "check", "photos")
    assert "leave --root cars out" in refused("data", "check", "digits", "--root", "cars")
    assert "`hubpath data check PATH`" in refused("data", "check", "folder")
    assert "nothing given" in refused("data", "check")
    assert "give it or --root cars" in refused("data", "check", "./cars", "--root", "cars")
    assert "gone/photos does not exist" in refused("data", "check", "gone/photos")
    said = refused("data", "check", "cars/train/red/0.png")
    assert "is a file: give its folder; expected cars/train/red/train/CLASS/IMAGE" in said
    assert "add --data-root DIR" in refused("compare", "--data", "dmlab", "--hub", "test_vit")
