"""A user's folder: its layouts, the held-out split, and everything that is refused."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from hubpath_fast.data import DataError, load_image, open_images
from hubpath_fast.data.splits import stratified_split

SIZE = (12, 12)


def names(split):
    return [path.parent.name + "/" + path.name for path in split.paths]


def test_folders_with_train_and_test(animals):
    splits = open_images(animals, validation=0.25, seed=1)
    assert splits.classes == ("cat", "dog", "emu")
    assert splits.num_classes == 3
    for split in (splits.train, splits.validation, splits.test):
        labels = [splits.classes[target] for target in split.targets]
        assert labels == [path.parent.name for path in split.paths]
    # A quarter of 10, 6 and 4, rounded to even: 2, 2 and 1.
    assert [splits.validation.targets.count(i) for i in range(3)] == [2, 2, 1]
    together = sorted(splits.train.paths + splits.validation.paths)
    assert together == sorted((animals / "train").rglob("*.png"))
    assert names(splits.test) == [
        f"{name}/{i}.png" for name in ("cat", "dog", "emu") for i in (0, 1)
    ]
    assert not splits.test_is_validation
    [note] = splits.notes
    assert "5 of 20 training images held out (seed 1)" in note


def test_holding_out_follows_the_seed(animals):
    first, again, other = (open_images(animals, 0.25, seed).validation for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("folder", ["val", "valid", "validation"])
def test_a_validation_folder_is_used_as_it_is(animals, write_images, folder):
    write_images(animals, {f"{folder}/dog/x.png": SIZE, f"{folder}/emu/y.png": SIZE})
    splits = open_images(animals)
    assert names(splits.validation) == ["dog/x.png", "emu/y.png"]
    assert splits.validation.targets == (1, 2)  # train's numbers, though no cat is here
    assert len(splits.train) == 20
    assert splits.notes == ()


def test_without_a_test_validation_stands_in_and_says_so(animals):
    shutil.rmtree(animals / "test")
    splits = open_images(animals)
    assert splits.test is splits.validation
    assert splits.test_is_validation
    assert "results are on the validation images" in splits.notes[1]


def test_a_plain_folder_of_classes(animals):
    splits = open_images(animals / "train")
    assert splits.classes == ("cat", "dog", "emu")
    assert len(splits.train) + len(splits.validation) == 20
    assert splits.test_is_validation


def test_which_files_are_images(animals):
    """Of any common ending, at any depth; none that are hidden, which other systems leave."""
    train = animals / "train"
    (train / ".cache").mkdir()
    (train / "cat" / "notes.txt").write_text("no image")
    (train / "cat" / "._1.png").write_bytes(b"another system's leftovers")
    (train / "dog" / "deep").mkdir()
    for ending in ("JPG", "jpeg", "webp", "bmp", "tif"):
        Image.new("L", SIZE).save(train / "dog" / "deep" / f"x.{ending}")
    splits = open_images(animals)
    assert splits.classes == ("cat", "dog", "emu")
    assert len(splits.train) + len(splits.validation) == 25


@pytest.mark.parametrize("seed", range(5))
def test_a_split_is_stratified(seed):
    targets = [0] * 40 + [1] * 20 + [2] * 2 + [3]
    kept, held = stratified_split(targets, 0.15, seed)
    assert sorted(kept + held) == list(range(63))
    # 15 % of 40 and of 20; one of two; the only one of a class stays in train.
    assert [sum(targets[i] == c for i in held) for c in range(4)] == [6, 3, 1, 0]


# --- list files -------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path, write_images):
    sizes = {f"img/{i}.png": SIZE for i in range(6)} | {"img/a b.png": SIZE, "img/it's.png": SIZE}
    return write_images(tmp_path / "listed", sizes)


def write_list(root, split, *lines):
    (root / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_list_files_of_numbered_classes(listed):
    write_list(listed, "train", "img/0.png 1", "", "img/1.png 0", "img/2.png 10", "img/3.png 02",
               *(f"img/4.png {i}" for i in range(3, 10)))  # fmt: skip
    write_list(listed, "val", "img/5.png 7")
    write_list(listed, "test", *(f"img/5.png {i}" for i in range(11)))
    splits = open_images(listed)
    assert splits.classes == tuple(map(str, range(11)))  # by number, not by spelling
    assert splits.train.targets == (1, 0, 10, 2, 3, 4, 5, 6, 7, 8, 9)
    assert splits.validation.targets == (7,)
    assert splits.train.paths[2] == listed / "img" / "2.png"


def test_list_files_of_named_classes_and_paths_with_spaces(listed):
    write_list(
        listed,
        "train",
        "img/a b.png dog",
        '"img/a b.png"   dog',
        "'img/a b.png' dog",
        "img/it's.png cat",
        '"img/it\'s.png" "big cat"',
        f"{listed}/img/0.png\tcat",
    )
    splits = open_images(listed)
    assert splits.classes == ("big cat", "cat", "dog")
    files = zip(splits.train.paths + splits.validation.paths,
                splits.train.targets + splits.validation.targets, strict=True)  # fmt: skip
    assert sorted((path.name, target) for path, target in files) == [
        ("0.png", 1), ("a b.png", 2), ("a b.png", 2), ("a b.png", 2), ("it's.png", 0),
        ("it's.png", 1),
    ]  # fmt: skip


def test_list_files_come_before_folders(animals):
    write_list(animals, "train", *(f"train/{c}/{i}.png {c}" for c in ("cat", "dog") for i in "01"))
    assert open_images(animals).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["img/0.png 0", "img/1.png"], r"train\.txt, line 2: expected a path and a class.*'img/1"),
        (["img/0.png 0", "img/9.png 1"], r"names 1 of 2 images that do not exist.*9\.png"),
        (["img/0.png 0", "img/1.png 2"], r"no image of class 1;.*renumber"),
        (["img/0.png 1", "img/1.png 2"], r"no image of class 0;.*subtract 1"),
        (["img/0.png a", "img/1.png a"], r"one class 'a'"),
        (["", " "], r"train\.txt names no images"),
        (["img/0.png a", "img/1.png b"], r"single image a class"),
    ],
)
def test_bad_list_files(listed, lines, message):
    write_list(listed, "train", *lines)
    with pytest.raises(DataError, match=message):
        open_images(listed)


# --- what is refused ----------------------------------------------------------------------


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match=r"gone does not exist; expected .*gone/train/CLASS/IMAGE"):
        open_images(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is a file"):
        open_images(tmp_path / "file")


def test_no_images(tmp_path):
    with pytest.raises(DataError, match="holds no images; expected"):
        open_images(tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train holds no images in folders of classes; expected"):
        open_images(tmp_path)
    Image.new("L", SIZE).save(tmp_path / "train" / "x.png")
    with pytest.raises(DataError, match="only images outside of them, whose class is unknown"):
        open_images(tmp_path)


def test_a_class_without_images(animals):
    (animals / "train" / "yak").mkdir()
    with pytest.raises(DataError, match=r"train has no images of class yak"):
        open_images(animals)


def test_fewer_classes_in_test_than_in_train(animals):
    shutil.rmtree(animals / "test" / "emu")
    (animals / "test" / "dog" / "0.png").unlink()
    with pytest.raises(DataError, match=r"test has no images of 1 of the 3 classes.*: emu\. Acc"):
        open_images(animals)


@pytest.mark.parametrize("split", ["val", "test"])
def test_other_classes_than_in_train(animals, write_images, split):
    write_images(animals, {f"{split}/yak/1.png": SIZE})
    with pytest.raises(DataError, match=rf"{split} has images of class yak.*classes: cat, dog"):
        open_images(animals)


def test_splits_without_train(animals):
    shutil.rmtree(animals / "train")
    with pytest.raises(DataError, match="has test but no train; expected"):
        open_images(animals)


def test_broken_images_are_named(animals):
    empty, cut, text = (animals / "train" / "cat" / f"{i}.png" for i in range(3))
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:400])
    text.write_text("no image")
    with pytest.raises(DataError, match="3 of 26 images cannot be read") as caught:
        open_images(animals)
    for path in (empty, cut, text):
        assert str(path) in str(caught.value)
    assert len(open_images(animals, verify=False).train) == 16  # 20 less 2 of 10, 1 of 6 and 1 of 4


def test_load_image(animals, tmp_path):
    image = load_image(animals / "train" / "cat" / "0.png")
    assert (image.mode, image.size) == ("RGB", (20, 16))
    Image.new("L", SIZE, 7).save(tmp_path / "grey.png")
    assert load_image(tmp_path / "grey.png").getpixel((0, 0)) == (7, 7, 7)
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) - 60])
    for path in (tmp_path / "cut.jpg", tmp_path / "gone.png"):
        with pytest.raises(DataError, match=f"cannot read the image {path}"):
            load_image(path)


def test_bad_share(animals):
    with pytest.raises(
        ValueError, match=r"validation: expected a share from 0 to below 1, got 1\.0"
    ):
        open_images(animals, validation=1.0)
