"""Which images are meant by files, folders, patterns and lists."""

from __future__ import annotations

import io
import os
import sys

import pytest

from hubpath_fast.data.given import Given, find_images
from hubpath_fast.data.text import read_paths

FILES = (
    "a.png", "b.JPG", "a[1].png", "a1.png", "notes.txt", ".hidden.png", "sub/c.png",
    "sub/deep/d,e.png", "sub/.cache/f.png", "[2020]/g.png", "__MACOSX/sub/h.png", "only/x.txt",
    "sub/@eaDir/c.png/SYNOPHOTO_THUMB_S.png", "$RECYCLE.BIN/i.png",
)  # fmt: skip


@pytest.fixture
def photos(tmp_path, monkeypatch):
    for name in FILES:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def paths(*given, stdin: bytes | None = None):
    found, notes = find_images(given, None if stdin is None else io.BytesIO(stdin))
    assert all(item.problem is None for item in found)
    return [item.path.replace(os.sep, "/") for item in found], notes


IN_ORDER = [
    "photos/[2020]/g.png", "photos/a.png", "photos/a1.png", "photos/a[1].png", "photos/b.JPG",
    "photos/sub/c.png", "photos/sub/deep/d,e.png",
]  # fmt: skip


def test_a_folder_is_all_images_below_it_in_order(photos):
    found, [note] = paths("photos")
    assert found == IN_ORDER
    assert note == (
        "photos: left out: 1 hidden image (photos/.hidden.png), 1 hidden folder (photos/sub/.cache)"
        ", 3 folders of the system or of other tools (photos/$RECYCLE.BIN), 2 .txt files "
        "(photos/notes.txt)"
    )
    assert paths("photos/") == (found, [note.replace("photos:", "photos/:", 1)])


def test_files_are_taken_as_given_and_as_often(photos):
    found, [note] = paths("photos/notes.txt", "./photos/a.png", "photos/a.png", "photos/a.png")
    assert found == ["photos/notes.txt", "./photos/a.png", "photos/a.png", "photos/a.png"]
    assert note == "1 of 4 images are given again; each is answered as often as given"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("photos/*.png", ["photos/a.png", "photos/a1.png", "photos/a[1].png"]),
        ("photos/a?.png", ["photos/a1.png"]),
        ("photos/**/*.png", [p for p in IN_ORDER if p.endswith(".png")]),
        ("photos/**", IN_ORDER),  # each once, though folders match, too
        ("photos/*", IN_ORDER),  # as a shell gives it: files, and folders with all below them
        ("photos/s*", IN_ORDER[-2:]),
        ("photos/a[1].png", ["photos/a[1].png"]),  # there is a file of this name
        ("photos/a[0-9].png", ["photos/a1.png"]),
        ("photos/[2020]/*.png", ["photos/[2020]/g.png"]),  # and a folder of this one
        ("photos/[2020]", ["photos/[2020]/g.png"]),
    ],
)
def test_patterns(photos, pattern, found):
    assert paths(pattern)[0] == found


def test_what_hubpath_wrote_is_left_out_and_said(photos):
    figure = photos / "sub/run/report/figures/routes.png"
    figure.parent.mkdir(parents=True)
    figure.write_bytes(b"")
    (photos / "sub/run/log.jsonl").write_bytes(b"")
    (photos / "sub/run/last").mkdir()
    said = "1 folder that hubpath wrote (photos/sub/run)"
    for given in ("photos", "photos/**"):
        found, [note] = paths(given)
        assert found == IN_ORDER
        assert said in note
    found, [note] = paths("photos/*/**/*.png")
    assert found == [IN_ORDER[0], *IN_ORDER[-2:]]
    assert note == (
        "photos/*/**/*.png: left out: 3 folders of the system or of other tools "
        f"(photos/$RECYCLE.BIN), {said}"
    )
    routes = ["photos/sub/run/report/figures/routes.png"]  # by name, whatever it is
    assert paths("photos/sub/run") == (routes, ["photos/sub/run: left out: 1 .jsonl file "
                                                "(photos/sub/run/log.jsonl)"])  # fmt: skip
    assert paths("photos/sub/run/report/*/*.png") == (routes, [])


def test_the_current_folder_and_one_above_it(photos, monkeypatch):
    monkeypatch.chdir(photos / "sub")
    assert paths(".")[0] == ["c.png", "deep/d,e.png"]
    assert paths("..")[0] == [f"..{path.removeprefix('photos')}" for path in IN_ORDER]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("nothing.png", "no such file"),
        ("", "no such file"),
        ("é" * 300, "no such file"),  # longer than a name may be
        ("empty", "a folder without images, at any depth"),
        ("photos/only", "a folder without images, at any depth, only 1 .txt file "
         "(photos/only/x.txt)"),
        ("*.gif", "no file matches this pattern"),
        ("photos/*.txt", "no image matches this pattern, only 1 .txt file (photos/notes.txt)"),
        ("https://example.com/a.png", "addresses are not fetched; download it first"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_in_its_place_with_the_reason(photos, given, problem):
    found, _ = find_images(["photos/a.png", given, "photos/b.JPG"])
    assert found == [Given("photos/a.png"), Given(given, problem), Given("photos/b.JPG")]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_pipes_and_links_to_nothing_are_not_read(photos):
    os.mkfifo(photos / "pipe.png")
    (photos / "link.png").symlink_to("nothing.png")
    (photos / "loop.png").symlink_to("loop.png")
    found, [note] = find_images(["photos"])
    problems = {item.path: item.problem for item in found if item.problem}
    assert problems.pop("photos/loop.png").startswith("cannot be read (")
    assert problems == {"photos/link.png": "a link to what is not there"}
    assert "neither file nor folder (photos/pipe.png)" in note
    assert find_images(["photos/pipe.png"])[0] == [Given("photos/pipe.png", "no regular file")]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_linked_folders_are_followed_once_and_not_upwards(photos, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/z.png").write_bytes(b"")
    (photos / "linked").symlink_to(tmp_path / "other")
    (photos / "sub/linked").symlink_to(tmp_path / "other")
    (photos / "sub/self").symlink_to(photos)
    (photos / "sub/up").symlink_to(tmp_path)
    assert sorted(paths("photos")[0]) == sorted([*IN_ORDER, "photos/linked/z.png"])


def test_a_folder_that_cannot_be_listed_is_named(photos, monkeypatch):
    listed = os.scandir

    def scandir(place):
        if os.path.basename(place) == "deep":
            raise PermissionError(13, "Permission denied", place)
        return listed(place)

    monkeypatch.setattr(os, "scandir", scandir)
    found, _ = find_images(["photos"])
    refused = Given("photos/sub/deep", "a folder that cannot be listed (Permission denied)")
    assert found == [*map(Given, IN_ORDER[:-1]), refused]


@pytest.mark.parametrize(
    "data",
    [
        b"photos/a.png\nphotos/a[1].png\nphotos/sub\n",
        b"\xef\xbb\xbfphotos/a.png\r\nphotos/a[1].png\r\n\r\nphotos/sub",
        b"photos/a.png\0photos/a[1].png\0photos/sub\0",
        "photos/a.png\r\nphotos/a[1].png\r\nphotos/sub\r\n".encode("utf-16"),
        "photos\\a.png\r\nphotos\\a[1].png\r\nphotos\\sub\r\n".encode("utf-32"),
        b"\"photos/a.png\" \r\n  photos/a[1].png\n'photos/sub'\n",
    ],
)
def test_a_list_on_standard_input(photos, data):
    expected = ["photos/a.png", "photos/a[1].png", "photos/sub/c.png", "photos/sub/deep/d,e.png"]
    assert paths("-", stdin=data)[0] == expected
    assert paths("photos/b.JPG", "-", stdin=data)[0] == ["photos/b.JPG", *expected]


def test_a_list_has_names_and_no_patterns(photos):
    assert find_images(["-"], io.BytesIO(b"photos/*.png"))[0] == [
        Given("photos/*.png", "no such file")
    ]
    for empty in (b"", b"\n \r\n", b"\xef\xbb\xbf"):
        problem = Given("-", "standard input lists no paths")
        assert find_images(["-"], io.BytesIO(empty))[0] == [problem]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are text there")
def test_names_of_any_bytes_and_either_form_of_unicode(photos):
    for name in (b"\xff.png", "A\u0308.png".encode(), b"two\nlines.png"):
        (photos / os.fsdecode(name)).write_bytes(b"")
    assert read_paths(b"photos/\xff.png\n") == [os.fsdecode(b"photos/\xff.png")]
    assert paths("-", stdin=b"photos/\xff.png\n")[0] == ["photos/\udcff.png"]
    assert paths("-", stdin=b"photos/two\nlines.png\0")[0] == ["photos/two\nlines.png"]
    assert paths("photos/\u00c4.png")[0] == ["photos/A\u0308.png"]  # as it is on the disk
