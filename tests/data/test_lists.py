"""List files as other programs write them, and names in other forms than they are stored in."""

from __future__ import annotations

import codecs
import unicodedata

import pytest

from hubpath_fast.data import DataError, open_images
from hubpath_fast.data.folder import find_splits
from hubpath_fast.data.layouts import read_folder
from hubpath_fast.data.lists import read_list
from hubpath_fast.data.names import FileFinder

SIZE = (12, 12)
NFC, NFD = "caf\u00e9", "cafe\u0301"  # café, with one letter and with two


@pytest.fixture
def photos(tmp_path, write_images):
    """Images of café (stored as NFC) and of thé (stored as NFD)."""
    tea = unicodedata.normalize("NFD", "thé")
    names = [f"{name}/{i}.png" for name in (NFC, tea) for i in range(3)]
    return write_images(tmp_path / "photos", dict.fromkeys(names, SIZE))


LINES = [f"{name}/{i}.png {name}" for name in (NFC, "thé") for i in range(3)]
TEXT = "\r\n".join(LINES) + "\r\n"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode("utf-8"),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.encode("cp1252"),
        TEXT.replace("\r\n", "\r").encode("utf-8"),
        TEXT.replace(" ", "\t").encode("utf-8"),
        TEXT.replace("/", "\\").encode("utf-8"),
        unicodedata.normalize("NFD", TEXT).encode("utf-8"),
        "\ufeff".join(TEXT.splitlines(keepends=True)).encode("utf-8"),  # files put together
    ],
    ids=["utf-8", "mark", "utf-16", "be", "le-unmarked", "be-unmarked", "utf-32", "cp1252", "cr",
         "tabs", "backslash", "nfd", "marks"],
)  # fmt: skip
def test_a_list_is_read_in_every_usual_encoding(photos, data):
    (photos / "train.txt").write_bytes(data)
    files = find_splits(photos)["train"]
    assert files.classes == (NFC, "thé")
    assert files.labels == (NFC,) * 3 + ("thé",) * 3
    assert [path.is_file() for path in files.paths] == [True] * 6
    assert len(open_images(photos, validation=0.34).train) == 4


def test_absolute_paths_home_and_blanks_in_classes(photos, monkeypatch):
    monkeypatch.setenv("HOME", str(photos))
    monkeypatch.setenv("USERPROFILE", str(photos))
    lines = [f"{photos}/{NFC}/0.png\tbig cat", f"~/{NFC}/1.png big_cat", f'{NFC}/2.png "big cat"']
    (photos / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    files = read_list(photos / "train.txt")
    assert files.labels == ("big cat", "big_cat", "big cat")
    assert [path.name for path in files.paths] == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        # Letters of a class that are in no path: a guess could name a class wrong.
        ("0.png a\n1.png b\u00e9\n".encode("cp1252"), r"train\.txt, line 2: the byte 0xe9 is no "),
        # Cyrillic: read as Western Windows' letters, the path is not there.
        ("0.png a\n\u0447\u0430\u0439/0.png b\n".encode("cp1251"), "line 2: the byte 0xf7 is no "),
        (b"0.png a\n1.png b\n\x81.png c", "line 3: the byte 0x81 is no UTF-8"),
        # What `>>` of PowerShell makes of a list in UTF-8.
        (b"0.png a\n" + "1.png b\n".encode("utf-16-le"), "line 2: it holds zero bytes"),
        (TEXT.encode("utf-16")[:-1], r"is no UTF-16-LE; was it cut short\?"),
        (b"\0\0\0\0", "line 1: it holds zero bytes"),
        ("0.png a\n1.png b\n\0\n".encode("utf-16-le"), "line 3: it holds zero bytes"),
    ],
)
def test_a_list_that_cannot_be_read_says_where_and_what_to_do(photos, data, message):
    (photos / "train.txt").write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        open_images(photos)
    assert str(photos / "train.txt") in str(caught.value)
    assert "save it as UTF-8" in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a.png,0", "b.png,1"], r"line 1: .*'a\.png,0' \(and 1 more lines\); commas do not sep"),
        (["image,label", "a.png,0"], "'image,label'.*commas do not separate"),
        (["a.png;0", "b.png;1"], r"line 1: .*commas do not separate"),
        (["A.PNG 0", "b.png 1"], r"1 of 2 images that do not exist.*A\.PNG is there, in other cap"),
        (["b c.png,red"], "1 of 1 images.*commas do not separate"),
        (["a.png, 0", "b.png, 1"], "2 of 2 images that do not exist.*commas do not separate"),
        (["image label", "a.png 0", "b.png 1"], "1 of 3 images.*line 1 looks like a header"),
        (["a.png 0", "b.png big cat"], r'stands in quotes \("big cat"\), and each image has one'),
        (["C:\\data\\a.png 0"], "is a path of Windows: write paths relative"),
        (["photos/a.png 0", "photos/b.png 1"], "exists relative to the current folder, not to"),
        (["a.png -1", "b.png 0", "c.png 1"], r"gives 1 images the class -1 \(line 1: a\.png\); as"),
        (["a.png 0", "b.png 20231127120000"], r"up to 20231127120000 but no image of class 1, 2, "),
    ],
)
def test_a_list_that_is_written_otherwise_is_told_how(
    tmp_path, write_images, monkeypatch, lines, message
):
    names = ["a.png", "b.png", "c.png", "b c.png"]
    photos = write_images(tmp_path / "photos", dict.fromkeys(names, SIZE))
    monkeypatch.chdir(tmp_path)
    (photos / "train.txt").write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        open_images(photos)


def test_an_image_that_a_list_names_twice_is_noted(tmp_path, write_images):
    photos = write_images(tmp_path, {"a.png": SIZE, "b.png": SIZE, "c.png": SIZE})
    lines = ["a.png 0", "b.png 1", "a.png 0", "c.png 1"]
    (photos / "train.txt").write_text("\n".join(lines))
    (photos / "val.txt").write_text("c.png 1\nc.png 0")
    assert open_images(photos).notes[1:] == (
        f"1 image is in two splits: {photos / 'c.png'} (train and validation); 1 image has two "
        f"classes: {photos / 'c.png'} (1 and 0); 1 image is there more than once: "
        f"{photos / 'a.png'} (twice); `hubpath data check {photos}` says more",
    )


# --- names in two Unicode forms ---------------------------------------------------------------


def test_folders_in_two_forms_are_one_class(tmp_path, write_images):
    names = {f"{NFC}/0.png": SIZE, f"{NFD}/1.png": SIZE, "tea/0.png": SIZE, "tea/1.png": SIZE}
    root = write_images(tmp_path, names)
    files = read_folder(root)
    assert files.classes == (NFC, "tea")
    assert files.labels == (NFC, NFC, "tea", "tea")
    assert [path.name for path in files.paths[:2]] == ["1.png", "0.png"]  # e comes before é


def test_splits_in_two_forms_have_the_same_classes(tmp_path, write_images):
    names = [f"train/{NFD}/0.png", "train/tea/0.png", f"val/{NFC}/0.png", f"test/{NFC}/0.png",
             "test/tea/0.png"]  # fmt: skip
    splits = open_images(write_images(tmp_path, dict.fromkeys(names, SIZE)))
    assert splits.classes == (NFC, "tea")
    assert splits.test.targets == (0, 1)
    assert splits.validation.targets == (0,)


def test_a_file_is_found_in_another_form_but_no_other_file(tmp_path, write_images):
    write_images(tmp_path, {f"{NFD}/{NFC}.png": SIZE, "x\\y.png": SIZE, "x/y.png": SIZE})

    def find(path):
        return FileFinder().find(path)  # which has read no folder yet

    assert find(tmp_path / NFC / f"{NFD}.png") == tmp_path / NFD / f"{NFC}.png"
    for gone in (tmp_path / NFC / "gone.png", tmp_path / "cafe" / "cafe.png"):
        assert find(gone) == gone
    assert find(f"{tmp_path}/x\\y.png").name == "x\\y.png"  # as it is written comes first
    (tmp_path / "x\\y.png").unlink()
    assert find(f"{tmp_path}/x\\y.png") == tmp_path / "x" / "y.png"
