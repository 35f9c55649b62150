"""The set of emoji: pictures in the right split, from packages that are what npm states."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import tarfile

import pytest
from PIL import Image

from bench import emoji
from hubpath_fast.data import open_dataset


def entry(code: str, category: str, google: bool = True, twitter: bool = True) -> dict:
    return {
        "unified": code,
        "image": code.lower() + ".png",
        "category": category,
        "has_img_google": google,
        "has_img_twitter": twitter,
        "skin_variations": {"1F3FB": {"image": code.lower() + "-1f3fb.png"}},
    }


ANIMALS = [f"1F4{i:02X}" for i in range(20)]
LIST = [
    *(entry(code, "Animals & Nature") for code in ANIMALS),
    *(entry(f"1F6{i:02X}-FE0F", "Objects") for i in range(3)),
    entry("1F3FB", "Component"),
    entry("AAAA", "Objects", google=False),
    entry("BBBB", "Objects", twitter=False),
]


def png(color: tuple[int, int, int], pixels: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (pixels, pixels), (*color, 255)).save(file, "png")
    return file.getvalue()


@pytest.fixture
def package(tmp_path):
    """package(style, entries, ...) -> (the style with its true integrity, the file)."""

    def make(name, entries=LIST, pixels=64, without=(), more=()):
        path = tmp_path / f"emoji-datasource-{name}-16.0.0.tgz"
        files = {"package/emoji.json": json.dumps(entries).encode()}
        for i, one in enumerate(entries):
            if one[f"has_img_{name}"]:
                picture = png((i, 0, 255 if name == "google" else 0), pixels)
                files[f"package/img/{name}/64/{one['image']}"] = picture
        files |= dict.fromkeys(more, b"outside")
        with tarfile.open(path, "w:gz") as archive:
            for file, data in files.items():
                if file not in without:
                    info = tarfile.TarInfo(file)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        sha512 = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
        [style] = [style for style in emoji.STYLES if style.name == name]
        return dataclasses.replace(style, integrity=f"sha512-{sha512}"), path

    return make


@pytest.fixture
def both(package):
    return [package("google"), package("twitter")]


def run(packages, out, paths=None):
    styles = [style for style, _ in packages]
    paths = [path for _, path in packages] if paths is None else paths
    emoji.main([*map(str, paths), "--out", str(out)], styles)


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_pictures_lie_by_split_and_category_in_both_styles(both, tmp_path, capsys):
    out = tmp_path / "sets" / "emoji"
    run(both, out, [path for _, path in reversed(both)])  # in any order
    ordered = sorted(ANIMALS, key=lambda code: hashlib.sha256(code.encode()).hexdigest())
    splits = {"train": ordered[:10], "val": ordered[10:13], "test": ordered[13:]}
    for split, codes in splits.items():
        names = {path.name for path in (out / split / "Animals and Nature").iterdir()}
        assert names == {f"{s}-{c.lower()}.png" for s in ("google", "twitter") for c in codes}
        for code in codes:  # each file is its own emoji's, in its own style
            for style, blue in (("google", 255), ("twitter", 0)):
                file = out / split / "Animals and Nature" / f"{style}-{code.lower()}.png"
                assert Image.open(file).getpixel((0, 0)) == (ANIMALS.index(code), 0, blue, 255)
    # Three emoji: 1.5 of them for training are two, 0.45 for validation none.
    assert [len([*(out / s).glob("Objects/*")]) for s in ("train", "val", "test")] == [4, 0, 2]
    assert sorted(path.name for path in out.iterdir()) == ["test", "train", "val"]
    printed = capsys.readouterr().out
    assert "46 pictures in" in printed
    assert "Animals and Nature         20      6     14\n" in printed
    assert "Noto Emoji, Google, Apache-2.0" in printed
    assert "CC-BY 4.0" in printed
    images = open_dataset("folder", out)
    assert images.classes == ("Animals and Nature", "Objects")
    assert [len(split) for split in (images.train, images.validation, images.test)] == [24, 6, 16]


def test_packages_that_are_not_what_npm_states(both, tmp_path, capsys):
    (google, path), (_, other) = both
    out = tmp_path / "out"
    command = "npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0"
    message = refused(capsys, both, out, [tmp_path / "gone.tgz", other])
    assert f"there is no file {tmp_path / 'gone.tgz'}; get it with `{command}`" in message
    message = refused(capsys, both, out, [path])
    assert f"emoji-datasource-twitter: not given; get both with `{command}`" in message
    path.write_bytes(path.read_bytes() + b"x")
    message = refused(capsys, both, out)
    assert f"{path} is cut short, changed, or another version: its integrity is sha512-" in message
    assert f"expected one of {google.integrity} of emoji-datasource-google@16.0.0" in message
    assert not out.exists()


def test_the_folder_is_new_and_whole(both, package, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert f"{out} is there already; delete it" in refused(capsys, both, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    missing = f"package/img/twitter/64/{LIST[-4]['image']}"
    broken = [both[0], package("twitter", without=(missing,))]
    before = sorted(path.name for path in tmp_path.iterdir())
    assert f"has no file {missing}" in refused(capsys, broken, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # nothing half written
    assert [*out.iterdir()] == []
    run([both[0], package("twitter")], out)  # an empty folder is taken
    assert len([*out.glob("*/*/*.png")]) == 46


@pytest.mark.parametrize("bad", ["../../evil.png", "/evil.png", "a.png/../x.png", "evil.py"])
def test_nothing_is_written_outside_whatever_a_package_says(bad, package, tmp_path, capsys):
    entries = [{**entry("1F400", "Objects"), "image": bad}]
    packages = [package(name, entries, more=("../../evil.txt",)) for name in ("google", "twitter")]
    folder = tmp_path / "a" / "b"
    assert "is no name of an emoji's file" in refused(capsys, packages, folder / "out")
    entries = [{**entry("1F400", "../Objects")}]
    packages = [package(name, entries) for name in ("google", "twitter")]
    assert "is no name of an emoji's file" in refused(capsys, packages, folder / "out")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".tgz"]


def test_pictures_of_another_size_are_refused(package, tmp_path, capsys):
    packages = [package(name, pixels=32) for name in ("google", "twitter")]
    message = refused(capsys, packages, tmp_path / "out")
    assert "is no PNG of 64 x 64 pixels" in message


def test_the_two_packages_that_are_meant():
    assert [style.package for style in emoji.STYLES] == [
        "emoji-datasource-google", "emoji-datasource-twitter",
    ]  # fmt: skip
    for style in emoji.STYLES:
        assert len(base64.b64decode(style.integrity.removeprefix("sha512-"))) == 64
