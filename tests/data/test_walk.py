"""What counts as an image below a folder, which links are followed, and what is left out."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image, features

from hubpath_fast.data import DataError, check_dataset, open_images
from hubpath_fast.data.folder import find_splits
from hubpath_fast.data.kinds import image_endings
from hubpath_fast.data.names import is_gone

SIZE = (12, 12)


@pytest.fixture
def photos(tmp_path, write_images):
    """photos/ with 6 images of red and of green."""
    sizes = {f"{name}/{i}.png": SIZE for name in ("red", "green") for i in range(6)}
    return write_images(tmp_path / "photos", sizes)


@pytest.fixture
def train(photos):
    """() -> (the images of each class by name, what was left out: {reason: (count, example)})."""

    def read():
        files = find_splits(photos)["train"]
        images = {
            name: [
                path.relative_to(photos / name).as_posix()
                for path, label in zip(files.paths, files.labels, strict=True)
                if label == name
            ]
            for name in files.classes
        }
        skipped = {
            s.reason: (s.count, s.example.relative_to(photos).as_posix()) for s in files.skipped
        }
        return images, skipped

    return read


SIX = [f"{i}.png" for i in range(6)]


def test_linked_folders_and_classes_are_followed(photos, train, tmp_path, write_images):
    write_images(tmp_path / "store", {"a.png": SIZE, "deep/b.png": SIZE, "blue/c.png": SIZE})
    os.symlink(tmp_path / "store" / "deep", photos / "red" / "more")
    os.symlink(tmp_path / "store" / "a.png", photos / "red" / "link.png")
    os.symlink(tmp_path / "store" / "blue", photos / "blue")
    images, skipped = train()
    assert images == {"blue": ["c.png"], "green": SIX, "red": [*SIX, "link.png", "more/b.png"]}
    assert skipped == {}


LOOPS = "links back to what is read already"


def test_loops_of_links_end_and_no_class_takes_anothers_images(
    photos, train, tmp_path, write_images
):
    write_images(tmp_path / "store", {"x/a.png": SIZE, "y/b.png": SIZE})
    os.symlink(tmp_path / "store" / "x", photos / "red" / "more")
    os.symlink(tmp_path / "store", tmp_path / "store" / "x" / "up")  # above the link's place
    os.symlink(photos, tmp_path / "store" / "x" / "photos")  # would make green images red
    os.symlink("..", photos / "red" / "up")
    os.symlink(".", photos / "red" / "self")
    os.symlink("more", photos / "red" / "twice")
    os.symlink(photos, photos / "all")
    images, skipped = train()
    assert images == {"green": SIX, "red": [*SIX, "more/a.png"]}
    assert skipped == {LOOPS: (6, "all")}


def test_links_to_nothing_are_named(photos, train):
    os.symlink("/not-mounted", photos / "blue")
    os.symlink("gone", photos / "red" / "more")
    _, skipped = train()
    assert skipped == {"links to what does not exist": (2, "blue")}
    note = open_images(photos).notes[-1]
    assert note.startswith(
        f"left out: 2 links to what does not exist ({photos / 'blue'}); `hubpath"
    )
    # One that is called like an image is an image that is missing.
    os.symlink("gone.png", photos / "red" / "x.png")
    with pytest.raises(DataError, match=r"1 of 13 images cannot be read.*x\.png"):
        open_images(photos)


@pytest.mark.parametrize(
    "ending", ["jfif", "JPE", "gif", "avif", "tif", "TIFF", "jp2", "webp", "tga", "ppm", "apng"]
)
def test_all_that_pillow_decodes_is_read(photos, train, ending):
    Image.new("RGB", SIZE).save(photos / "red" / f"x.{ending}")
    images, skipped = train()
    assert images["red"] == [*SIX, f"x.{ending}"]
    assert skipped == {}


def test_what_is_no_image_is_counted_by_its_kind(photos, train):
    for name in ("a.heic", "b.HEIC", "c.psd", "d.mp4", "e.eps", "notes.txt", "img.0001"):
        (photos / "red" / name).write_bytes(b"x")
    (photos / "red" / "0001").write_bytes((photos / "red" / "0.png").read_bytes())
    (photos / "red" / "README").write_text("x")
    images, skipped = train()
    assert images["red"] == SIX
    assert skipped == {
        ".heic files": (2, "red/a.heic"),
        ".psd files": (1, "red/c.psd"),
        ".mp4 files": (1, "red/d.mp4"),
        ".eps files": (1, "red/e.eps"),
        "files with unknown endings": (1, "red/img.0001"),
        "images without the ending .png": (1, "red/0001"),
        "files without an ending": (1, "red/README"),
        ".txt files": (1, "red/notes.txt"),
    }


def test_what_systems_leave_and_what_is_hidden(photos, train, write_images):
    write_images(
        photos, dict.fromkeys(["__MACOSX/red/a.png", "red/.old/b.png", "red/@eaDir/c.png",
                               "red/.ipynb_checkpoints/d.png", "lost+found/e.png"], SIZE)
    )  # fmt: skip
    for name in ("Thumbs.db", "._0.png", ".DS_Store", "desktop.ini"):
        (photos / "red" / name).write_bytes(b"x")
    (photos / "red" / ".1.png").write_bytes((photos / "red" / "1.png").read_bytes())
    images, skipped = train()
    assert images == {"green": SIX, "red": SIX}
    assert skipped == {
        "hidden folders": (1, "red/.old"),
        "hidden images": (1, "red/.1.png"),
        "folders of the system or of other tools": (4, "__MACOSX"),
        "files of the system": (4, "red/.DS_Store"),
    }


@pytest.mark.parametrize("inside", [".", "red", "red/deep"])
@pytest.mark.parametrize(
    ("file", "held"),
    [
        ("fit.json", {"config": {}, "classes": [], "image_size": 32}),
        ("seeds.json", {"config": {}, "seeds": [0]}),
        ("compare.json", {"settings": {}}),
        ("demo.json", {"settings": {}}),
        ("shelf.json", {"format": 1, "sizes": [], "dtype": "fp16"}),
        ("hub.json", {"format": 1, "shelf": "..", "models": []}),
        ("config.json", {"hubpath_format": 1, "model": {}}),
        ("parts.json", {"hubpath_package": 1}),
        ("log.jsonl", None),
        ("report.html", None),
    ],
)
def test_what_hubpath_wrote_is_no_class(photos, train, write_images, inside, file, held):
    out = photos / inside / "run"
    figures = {"figures/curve.png": SIZE, "best/x.png": SIZE, "seed-0/report/figures/y.png": SIZE}
    write_images(out, figures)
    (out / file).write_text(json.dumps(held))
    images, skipped = train()
    assert images == {"green": SIX, "red": SIX}
    assert skipped == {"folders that hubpath wrote": (1, out.relative_to(photos).as_posix())}


def test_a_class_that_is_called_like_a_run_is_a_class(photos, train, write_images):
    write_images(photos, {"hubpath-run/a.png": SIZE})
    (photos / "hubpath-run" / "fit.json").write_text('{"slim": 3}')
    assert train()[0]["hubpath-run"] == ["a.png"]
    # A folder of runs alone is none; the folder that the user names is read whatever it holds.
    write_images(photos / "runs" / "one", {"figures/a.png": SIZE})
    for folder in (photos, photos / "runs" / "one"):
        (folder / "seeds.json").write_text('{"config": {}, "seeds": [0]}')
    assert list(train()[0]) == ["green", "hubpath-run", "red"]


# --- what is said where nothing can be read ----------------------------------------------------


@pytest.fixture
def forbid(monkeypatch):
    """forbid(folder): it cannot be listed, as without the permission, which root has for all."""
    scandir = os.scandir

    def forbid(folder):
        def refuse(path="."):
            if os.fspath(path) == os.fspath(folder):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)

    return forbid


def test_a_folder_that_cannot_be_read_is_said_to_be_so(photos, train, forbid, write_images):
    write_images(photos, {"red/deep/x.png": SIZE})
    forbid(photos / "red" / "deep")
    assert train() == (
        {"green": SIX, "red": SIX},
        {"folders that cannot be read (Permission denied)": (1, "red/deep")},
    )
    assert "1 folder that cannot be read (Permission denied)" in open_images(photos).notes[-1]
    forbid(photos / "red")
    with pytest.raises(DataError, match=r"class red, but 1 folder that cannot be read \(Permis"):
        open_images(photos)
    forbid(photos)
    with pytest.raises(DataError, match=r"photos cannot be read \(Permission denied\)"):
        open_images(photos)


def test_a_class_of_other_kinds_says_which(photos):
    (photos / "blue").mkdir()
    for name in ("a.heic", "b.heic", "c.mov"):
        (photos / "blue" / name).write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        open_images(photos)
    text = str(caught.value)
    assert f"class blue, but 2 .heic files ({photos / 'blue' / 'a.heic'}), 1 .mov file (" in text
    assert "add some, or remove the class" in text


def test_a_folder_that_lies_otherwise_says_how(tmp_path, write_images):
    write_images(tmp_path, dict.fromkeys(["flat/0.png", "a/b/cat/0.png", "a/b/dog/0.png"], SIZE))
    with pytest.raises(DataError, match="flat holds images, but none in a folder of its class"):
        open_images(tmp_path / "flat")
    with pytest.raises(DataError, match=r"the one class 'b'; .*b holds folders itself: is it the"):
        open_images(tmp_path / "a")
    write_images(tmp_path, dict.fromkeys(["s/Train/cat/0.png", "s/Testing/cat/0.png"], SIZE))
    with pytest.raises(DataError, match=r"holds Testing, Train, which look like splits.*call them"):
        open_images(tmp_path / "s")
    os.symlink("/not-mounted", tmp_path / "flat" / "train")
    with pytest.raises(DataError, match=r"\(but 1 link to what does not exist \(.*train\)\)"):
        open_images(tmp_path / "flat")


def test_a_class_whose_name_is_no_text(photos):
    """As of an archive from a system of another encoding: lines and reports spell its bytes out."""
    os.rename(photos / "red", os.fsencode(photos / "caf") + b"\xe9")
    assert "caf\udce9" in open_images(photos).classes


@pytest.mark.parametrize(("codec", "ending"), [("avif", ".avif"), ("jpg_2000", ".jp2"),
                                               ("webp", ".webp")])  # fmt: skip
def test_what_this_pillow_cannot_decode_is_no_image(monkeypatch, codec, ending):
    assert ending in image_endings.__wrapped__()
    check = features.check
    monkeypatch.setattr(features, "check", lambda name: name != codec and check(name))
    assert ending not in image_endings.__wrapped__()
    assert {".jpg", ".png", ".tif", ".gif", ".bmp"} <= image_endings.__wrapped__()
    assert not {".eps", ".pdf", ".psd", ".wmf", ".mpg", ".h5"} & image_endings.__wrapped__()


def test_an_image_that_may_not_be_looked_at_is_no_missing_one(photos, monkeypatch):
    """As in a folder that may be listed but not entered."""
    forbidden, look = photos / "red" / "0.png", os.stat

    def refuse(path, *args, **kwargs):
        if os.fspath(path) == os.fspath(forbidden):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return look(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    assert not is_gone(forbidden)
    assert is_gone(photos / "red" / "9.png")
    assert is_gone(photos / "red" / "0.png" / "x.png")
    assert is_gone(photos / "red")
    assert check_dataset(root=photos).refused == ()
