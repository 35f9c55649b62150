"""The list of a run's images: the split stays, whatever has become of the data since."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
from support.source_trees import TREES, image

from hubpath_fast.data import DataError, ImageSplit, cache_splits, open_dataset
from hubpath_fast.data.kept import FileList, data_base, reopen

CLASSES = ("blue", "red")


@pytest.fixture
def flat(tmp_path):
    """Ten images of each class, without splits."""
    for name in CLASSES:
        for i in range(10):
            image(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def parts_of(splits, whole=False):
    if whole:
        return splits.parts
    parts = {"train": splits.train, "validation": splits.validation}
    return parts if splits.test_is_validation else {**parts, "test": splits.test}


class Kept:
    """A list of data as it is now, written and read again, and the splits that it is of."""

    def __init__(self, root, name="folder", whole=False):
        self.root, self.name = root, name
        self.splits = open_dataset(name, root, 0.2, 3)
        base = data_base(name, root)
        self.path = root.parent / "files.csv.gz"
        FileList.of(parts_of(self.splits, whole), self.splits.classes, base).write(self.path)

    def again(self, root=None, seed=3, **options):
        root = self.root if root is None else root
        return reopen(FileList.read(self.path), self.name, root, 0.2, seed, **options)

    def refused(self, **options):
        with pytest.raises(DataError) as caught:
            self.again(**options)
        return str(caught.value)

    def check(self, *changes, **options):
        """The splits are the same, to the order, and that is all there is to say."""
        opened = self.again(**options)
        for split in ("train", "validation", "test"):
            assert getattr(opened, split) == getattr(self.splits, split), split
        assert opened.classes == self.splits.classes
        assert opened.test_is_validation == self.splits.test_is_validation
        assert list(opened.changes) == list(changes)


def added(root, count, first):
    return (
        f"{count} images were added to {root} after this run was begun (e.g. {first}): not used; "
        "start a new run to use them"
    )


def test_nothing_changed(flat):
    kept = Kept(flat)
    kept.check()
    kept.check(scored=True)
    for path in flat.rglob("*.png"):
        os.utime(path, (1, 1))  # what copies and downloads do
    kept.check()
    lines = gzip.decompress(kept.path.read_bytes()).decode().splitlines()
    assert lines[0] == "split,path,class,number,bytes"
    assert len(lines) == 21
    size = (flat / "blue" / "0.png").stat().st_size
    assert any(re.fullmatch(rf"(train|validation),blue/0.png,blue,0,{size}", x) for x in lines)


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["blue/a.png", "red/a.png"], "blue/a.png"),
        (["green/0.png"], "green/0.png"),  # a new class
        (["val/blue/0.png", "val/red/0.png"], "val/blue/0.png"),  # the run began without one
        (["test/blue/0.png", "test/red/0.png"], "test/blue/0.png"),
        (["train/blue/0.png"], "train/blue/0.png"),
    ],
)
def test_what_is_added_is_said_and_not_used(flat, names, first):
    kept = Kept(flat)
    for name in names:
        image(flat / name)
    kept.check(added(flat, len(names), first))
    (flat / names[0]).write_text("broken, but not used either")
    (flat / "empty").mkdir()
    kept.check(added(flat, len(names), first))
    kept.check(added(flat, len(names), first), scored=True)


def test_splits_stay_where_val_or_test_is_added(flat):
    shutil.move(flat, flat.parent / "train")
    (flat.parent / "root").mkdir()
    root = Path(shutil.move(flat.parent / "train", flat.parent / "root" / "train")).parent
    kept = Kept(root)
    for split in ("val", "test"):
        image(root / split / "red" / "0.png")
    kept.check(added(root, 2, "val/red/0.png"))


def split_of(kept, split, n=0):
    path = getattr(kept.splits, split).paths[n]
    return path, path.relative_to(kept.root).as_posix()


REFUSAL = "the data is not what it was when this run was begun: of the {} images of {} {}, "


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_is_gone_or_changed_is_refused_where_it_is_needed(flat, split):
    kept = Kept(flat)
    gone, gone_name = split_of(kept, split)
    other, other_name = split_of(kept, split, 1)
    size = other.stat().st_size
    gone.unlink()
    image(other, (30, 30))
    words = (
        f"1 gone ({gone_name}), 1 changed ({other_name}: {size} bytes then, "
        f"{other.stat().st_size} now)"
    )
    end = "; restore them, or start a new run"
    assert kept.refused() == REFUSAL.format(20, flat, "that it began with") + words + end
    if split == "validation":
        assert kept.refused(scored=True) == REFUSAL.format(4, flat, "that are scored") + words + end
    else:
        kept.check(
            f"the images of {flat} that are not scored are not what they were when this run was "
            f"begun: {words}",
            scored=True,
        )


def test_a_class_that_is_renamed_and_an_image_of_another_class(flat):
    kept = Kept(flat)
    (flat / "red").rename(flat / "crimson")
    said = kept.refused()
    assert "10 gone (red/" in said
    assert "; 10 were added (crimson/0.png, " in said
    (flat / "crimson").rename(flat / "red")
    kept.check()
    (flat / "red" / "0.png").rename(flat / "blue" / "x.png")
    assert "1 gone (red/0.png); 1 were added (blue/x.png)" in kept.refused()


def test_a_dangling_link_is_gone(flat):
    (flat.parent / "elsewhere").mkdir()
    real = Path(shutil.move(flat / "red" / "1.png", flat.parent / "elsewhere" / "1.png"))
    (flat / "red" / "1.png").symlink_to(real)
    kept = Kept(flat)
    kept.check()
    real.unlink()
    assert "1 gone (red/1.png)" in kept.refused()


def test_broken_images_are_named_where_they_are_needed(flat):
    kept = Kept(flat)
    path, _ = split_of(kept, "train")
    path.write_bytes(bytes(path.stat().st_size))
    assert f"1 of 20 images cannot be read; replace or remove: {path}" in kept.refused()
    kept.check(verify=False)
    kept.check(scored=True)


def test_data_that_was_moved(flat, tmp_path):
    kept = Kept(flat)
    moved = Path(shutil.move(flat, tmp_path / "elsewhere"))
    said = kept.refused()
    assert (
        f"the data of this run was in {flat}, which does not exist; if it was moved, give" in said
    )
    opened = kept.again(moved)
    names = [path.relative_to(flat) for path in kept.splits.train.paths]
    assert [path.relative_to(moved) for path in opened.train.paths] == names
    image(tmp_path / "other" / "red" / "a.png")
    assert "20 gone" in kept.refused(root=tmp_path / "other")
    (tmp_path / "empty").mkdir()
    assert "20 gone" in kept.refused(root=tmp_path / "empty")


@pytest.mark.parametrize(("then", "now"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_that_were_copied_into_another_unicode_form(flat, then, now):
    for name in ("café", "blue/ü"):
        image(flat / unicodedata.normalize(then, name) / "é.png")
    image(flat / unicodedata.normalize(then, "café") / "ê.png")
    kept = Kept(flat)
    for path in sorted(flat.rglob("*"), key=lambda path: -len(path.parts)):
        path.rename(path.with_name(unicodedata.normalize(now, path.name)))
    opened = kept.again()
    assert opened.classes == kept.splits.classes
    assert opened.changes == ()
    assert all(path.is_file() for path in opened.train.paths + opened.validation.paths)


def test_odd_file_names(flat):
    names = ["a,b.png", 'say "x".png', "two\nlines.png", " space .png", "r\r.png", "日本.png"]
    for name in names:
        image(flat / "red" / name)
    raw = os.fsdecode(b"latin-\xe9.png")
    shutil.copy(flat / "red" / "0.png", flat / "red" / raw)
    kept = Kept(flat)
    kept.check()
    (flat / "red" / raw).unlink()
    assert "1 gone" in kept.refused()


# --- list files -------------------------------------------------------------------------------


@pytest.fixture
def listed(flat):
    """Lists of the images of the first class twice, and of some beside the lists' folder."""
    root = flat.parent / "lists"
    root.mkdir()
    lines = [f"../data/{name}/{i}.png {name}" for name in CLASSES for i in range(10)]
    lines += [f"{flat}/blue/0.png blue", "../data/blue/0.png blue", "../data/blue/0.png red"]
    (root / "train.txt").write_text("\n".join(lines) + "\n")
    return root


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_list_files_that_are_edited(listed):
    kept, train = Kept(listed), listed / "train.txt"
    kept.check()
    text = train.read_text()
    image(listed.parent / "data" / "red" / "new.png")
    kept.check()  # it is not listed
    edit(train, "../data/red/3.png", "../data/red/new.png red\n../data/red/3.png")
    kept.check(added(listed, 1, "../data/red/new.png"))
    train.write_text(text)
    edit(train, "../data/red/3.png red", "../data/red/3.png blue")
    assert "1 changed (../data/red/3.png: class red then, blue now)" in kept.refused()
    train.write_text(text)
    edit(train, "../data/red/3.png red\n", "")
    assert "1 changed (../data/red/3.png: no longer listed)" in kept.refused()
    train.write_text(text)
    (listed.parent / "data/red/3.png").unlink()
    assert "1 gone (../data/red/3.png)" in kept.refused()


def test_lists_that_put_images_into_other_splits(listed):
    kept = Kept(listed)
    path = next(p for p in kept.splits.train.paths if p.name == "7.png")
    name = str(path).removeprefix(f"{listed}/")
    (listed / "val.txt").write_text(f"{name} {path.parent.name}\n")
    edit(listed / "train.txt", f"{name} {path.parent.name}\n", "")
    kept.check(
        f"{listed} lists 1 images in another split than when this run was begun (e.g. {name}); "
        "the run keeps its own split"
    )


def test_lists_of_numbers_keep_their_order(flat):
    lines = [f"{name}/{i}.png {n}" for n, name in ((10, "red"), (2, "blue")) for i in range(9)]
    lines += [f"blue/9.png {n:02d}" for n in range(11)]
    (flat / "train.txt").write_text("\n".join(lines))
    kept = Kept(flat)
    assert kept.splits.classes == tuple(map(str, range(11)))
    kept.check()


# --- lists before anything is held out, named sets, arrays --------------------------------------


def test_seeds_draw_from_the_same_images(flat):
    kept = Kept(flat, whole=True)
    other = open_dataset("folder", flat, 0.2, 8)
    kept.check()
    image(flat / "red" / "a.png")
    opened = kept.again(seed=8)
    assert opened.validation == other.validation != kept.splits.validation
    assert opened.train == other.train


@pytest.mark.parametrize("name", [name for name in TREES if name != "cifar-100"])
@pytest.mark.parametrize("whole", [False, True])
def test_named_sets(name, whole, tmp_path, monkeypatch):
    root, make = tmp_path / "sets", TREES[name][0]
    make(root, monkeypatch)
    kept = Kept(root, name, whole)
    kept.check()
    path = kept.splits.test.paths[0]
    path.unlink()
    said = kept.refused(scored=True)
    assert f"1 gone ({path.relative_to(root).as_posix()})" in said


def test_a_named_sets_own_folder_stands_for_the_one_above(tmp_path, monkeypatch):
    root = tmp_path / "sets"
    TREES["cars"][0](root, monkeypatch)
    opened = Kept(root, "cars").again(root / "stanford_cars")
    assert opened.train == Kept(root, "cars").splits.train


def test_arrays_have_no_list():
    splits = open_dataset("digits")
    assert FileList.of(splits.parts, splits.classes, Path()) is None
    points = ImageSplit((Path("a.png"),), (object(),))
    assert FileList.of({"train": points}, ("x",), Path()) is None


def test_caches_hold_what_the_list_says(flat):
    kept = Kept(flat)
    image(flat / "red" / "a.png")
    told = []
    before = cache_splits(kept.splits, 16, "memory", tell=told.append)
    cached = cache_splits(kept.again(), 16, "memory", tell=told.append)
    assert [text.split(" into")[0] for text in told] == ["decoding 20 images"] * 2
    for split in ("train", "validation"):
        then, now = getattr(before, split), getattr(cached, split)
        assert (then.pixels[then.indices] == now.pixels[now.indices]).all()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"no gzip", gzip.compress(b"", mtime=0), gzip.compress(b"a,b\n", mtime=0),
        gzip.compress(b"split,path,class,number,bytes\n", mtime=0),
        gzip.compress(b"split,path,class,number,bytes\ntrain,a.png,red,x,1\n", mtime=0),
        gzip.compress(b"split,path,class,number,bytes\ntrain,a.png\n", mtime=0),
        gzip.compress(b"split,path,class,number,bytes\nother,a.png,red,0,1\n", mtime=0),
    ],
)  # fmt: skip
def test_a_damaged_list_is_named(tmp_path, content):
    path = tmp_path / "files.csv.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}, the list of the images .* is damaged"):
        FileList.read(path)


def test_a_list_that_was_cut_short_is_damaged(flat):
    kept = Kept(flat)
    kept.path.write_bytes(kept.path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is damaged"):
        FileList.read(kept.path)
