"""Data sets by name: each source's real layout, its splits, and everything that is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.source_trees import TREES, image

from hubpath_fast.data import (
    DATASETS,
    ArraySplit,
    DataError,
    EvalBatches,
    ImageDataset,
    check_dataset,
    eval_transform,
    named,
    open_dataset,
)
from hubpath_fast.data.sources import PUBLISHED

FILES = [name for name in TREES if name != "cifar-100"]
SPLITS = ("train", "validation", "test")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """tree(name): the root of a small set in that layout, whose published counts are its own."""

    def write(name):
        make, classes, counts = TREES[name]
        root = tmp_path / name
        make(root, monkeypatch)
        own = {split: count for split, count in zip(SPLITS, counts, strict=True) if count}
        small = dataclasses.replace(PUBLISHED[name], classes=len(classes), counts=own)
        monkeypatch.setitem(PUBLISHED, name, small)
        return root

    return write


def test_the_published_numbers_are_those_of_the_papers():
    counts = {name: (entry.classes, *entry.counts.values()) for name, entry in PUBLISHED.items()}
    assert counts == {
        "cifar-100": (100, 50_000, 10_000),
        "coco-70": (70, 56_000, 7_000, 7_000),
        "aircraft": (100, 6_667, 3_333),
        "cars": (196, 8_144, 8_041),
        "indoors": (67, 5_360, 1_340),
        "dmlab": (6, 65_550, 22_628, 22_735),
        "eurosat": (10, 16_200, 5_400, 5_400),
    }


@pytest.mark.parametrize("name", TREES)
def test_each_layout_opens_with_its_own_splits(tree, name):
    root = tree(name)
    _, classes, counts = TREES[name]
    whole = open_dataset(name, root, validation=0)
    assert whole.classes == classes
    assert tuple(len(getattr(whole, split)) for split in SPLITS) == counts
    assert not whole.test_is_validation
    held = open_dataset(name, root, validation=0.5)
    if counts[1]:
        assert (len(held.train), len(held.validation)) == counts[:2]
        assert held.notes == ((PUBLISHED[name].note,) if PUBLISHED[name].note else ())
    else:  # one of the two images of each class
        assert sorted(held.validation.targets) == [0, 1]
        assert "2 of 4 training images held out (seed 0)" in held.notes[0]
    batches = EvalBatches(ImageDataset(held.test, eval_transform(8)), 3)
    images = torch.cat([images for images, _ in batches])
    assert images.shape == (counts[2], 3, 8, 8)


@pytest.mark.parametrize("name", ["aircraft", "cars", "indoors", "coco-70", "dmlab"])
def test_targets_follow_the_annotations(tree, name):
    """Classes alternate by file in all layouts but in that of folders without a list of classes."""
    train = open_dataset(name, tree(name), validation=0).train
    files = sorted(zip([path.name for path in train.paths], train.targets, strict=True))
    assert [target for _, target in files] == ([1, 1, 0, 0] if name == "indoors" else [0, 1, 0, 1])


def test_cifar_keeps_torchvisions_pixels(tree):
    from torchvision.datasets import CIFAR100

    root = tree("cifar-100")
    splits = open_dataset("cifar100", root, validation=0)
    data = CIFAR100(str(root), train=False)
    for i, (pixels, target) in enumerate(data):
        assert np.array_equal(np.asarray(splits.test.load(i)), np.asarray(pixels))
        assert splits.test.targets[i] == target


def test_eurosats_split_is_the_same_for_every_seed_and_stratified(tree):
    root = tree("eurosat")
    first, other = (open_dataset("eurosat", root, seed=seed) for seed in (0, 1))
    paths = [getattr(first, split).paths for split in SPLITS]
    assert paths == [getattr(other, split).paths for split in SPLITS]
    assert len({path for part in paths for path in part}) == 20
    for split, count in zip(SPLITS, (6, 2, 2), strict=True):
        assert [getattr(first, split).targets.count(i) for i in (0, 1)] == [count, count]


def test_the_root_may_be_the_sets_own_folder(tree):
    root = tree("cars")
    assert len(open_dataset("cars", root / "stanford_cars", validation=0).train) == 4


def test_digits_and_folder_have_names_too(animals):
    digits = open_dataset("digits", seed=3)
    assert [len(getattr(digits, split)) for split in SPLITS] == [240, 60, 797]
    assert [len(open_dataset("digits", validation=0).train)] == [300]
    assert len(open_dataset("folder", animals, validation=0).train) == 20
    assert len(open_dataset("ImageFolder", animals, validation=0).validation) == 0


def test_names():
    assert named.find_dataset("CIFAR_100") == "cifar-100"
    assert named.find_dataset("Stanford-Cars") == "cars"
    with pytest.raises(ValueError, match=r"'car' is unknown; did you mean cars.*There are cifar"):
        open_dataset("car", ".")
    with pytest.raises(ValueError, match="lies in a folder, and none is given"):
        open_dataset("cars")
    assert set(DATASETS) == {*PUBLISHED, "folder", "digits", "300w", "wflw", "cofw"}
    with pytest.raises(ValueError, match="use `hubpath landmarks fit --dataset wflw`"):
        open_dataset("WFLW", ".")


@pytest.mark.parametrize("name", TREES)
def test_a_missing_set_says_what_where_from_and_where_to(tmp_path, name):
    root = tmp_path / "nowhere"
    with pytest.raises(DataError) as caught:
        open_dataset(name, root)
    text = str(caught.value)
    assert f"{PUBLISHED[name].title} is not in {root}" in text
    assert "expected:" in text
    assert f"found:\n  {root} (missing)" in text
    assert "https://" in text.partition("get it: ")[2]


def test_a_wrong_layout_is_shown_as_trees(tree):
    root = tree("cars")
    (root / "stanford_cars" / "devkit" / "cars_meta.mat").rename(root / "cars_meta.mat")
    with pytest.raises(DataError) as caught:
        open_dataset("cars", root)
    text = str(caught.value)
    assert "has no devkit/cars_meta.mat" in text
    expected, found = text.split("found:")
    assert "└─ devkit/\n        ├─ cars_meta.mat" in expected
    assert "├─ stanford_cars/" in found
    assert "└─ cars_meta.mat" in found
    assert "00001.jpg" in found


def test_a_large_folder_is_drawn_short(tmp_path):
    for i in range(20):
        image(tmp_path / f"{i:02}.png")
    (tmp_path / "a" / "b" / "c" / "d").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        open_dataset("dmlab", tmp_path)
    found = str(caught.value).partition("found:")[2]
    assert "└─ and 13 more" in found
    assert "c/" in found
    assert "d/" not in found


@pytest.mark.parametrize("name", FILES)
def test_missing_and_broken_images_are_named(tree, name):
    root = tree(name)
    splits = open_dataset(name, root, validation=0)
    gone, broken = splits.train.paths[0], splits.train.paths[1]
    broken.write_text("no image")
    with pytest.raises(DataError, match=r"1 of \d+ images cannot be read") as caught:
        open_dataset(name, root, validation=0)
    assert str(broken) in str(caught.value)
    gone.unlink()
    if name != "eurosat":  # whose files are its own list
        with pytest.raises(DataError, match="images that do not exist") as caught:
            open_dataset(name, root, validation=0)
        assert str(gone) in str(caught.value)


def test_other_counts_than_published_are_noted(tree, monkeypatch):
    published = PUBLISHED["cars"]
    root = tree("cars")
    monkeypatch.setitem(PUBLISHED, "cars", published)
    note = open_dataset("cars", root).notes[-1]
    assert "has 4 train, 2 test images, where 8,144 train, 8,041 test are published" in note
    assert check_dataset("cars", root).problems == (
        "classes: 2 found, 196 published",
        "train: 4 found, 8144 published",
        "test: 2 found, 8041 published",
    )


def test_damaged_cifar_is_not_unpickled(tree):
    root = tree("cifar-100")
    file = root / "cifar-100-python" / "train"
    file.write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(DataError, match=r"cannot be read \(Dataset not found or corrupted"):
        open_dataset("cifar-100", root)


def test_class_gaps_and_strange_classes_in_lists(tree):
    root = tree("dmlab")
    (root / "train.txt").write_text("train/train0.jpg 0\ntrain/train1.jpg 2\n")
    with pytest.raises(DataError, match=r"train\.txt has numbered classes up to 2 but no image"):
        open_dataset("dmlab", root)
    (root / "train.txt").write_text("train/train0.jpg 0\n")
    with pytest.raises(DataError, match=r"val\.txt has images of class 1, of which .* has none"):
        open_dataset("dmlab", root)
    root = tree("indoors")
    (root / "TestImages.txt").write_text("yard/e.jpg")
    with pytest.raises(DataError, match="has the class yard, which TrainImages"):
        open_dataset("indoors", root)
    (root / "TestImages.txt").write_text("e.jpg")
    with pytest.raises(DataError, match=r"expected lines of CLASS/IMAGE, but found 'e\.jpg'"):
        open_dataset("indoors", root)
    (root / "TestImages.txt").write_text("attic/e.jpg")
    with pytest.raises(DataError, match=r"no test images of 1 of its 2 classes: bar;"):
        open_dataset("indoors", root)


@pytest.mark.parametrize("name", TREES)
def test_check_passes_a_whole_set(tree, name):
    root = tree(name)
    report = check_dataset(name, root, decode=True)
    assert report.problems == ()
    assert report.complete
    _, classes, counts = TREES[name]
    found = {what: (count, published) for what, count, published in report.counts}
    assert found["classes"] == (len(classes), len(classes))
    for split, count in zip(SPLITS, counts, strict=True):
        if count:
            assert found[split] == (count, count)


def test_check_names_all_that_is_wrong(tree):
    root = tree("dmlab")
    (root / "train" / "train0.jpg").unlink()
    cut = root / "train" / "train1.jpg"
    cut.write_bytes(cut.read_bytes()[:-60])
    (root / "test.txt").write_text("train/train2.jpg 0\ntest/test0.jpg 0\n")
    assert len(check_dataset("dmlab", root).problems) == 3  # the cut one looks whole
    problems = "\n".join(check_dataset("dmlab", root, decode=True).problems)
    assert f"train: 1 images are missing: {root / 'train' / 'train0.jpg'}" in problems
    assert f"train: 1 images are broken: {cut}" in problems
    assert "test: no images of 1 classes: 1" in problems
    assert f"{root / 'train' / 'train2.jpg'} (train and test)" in problems


def test_check_of_a_users_own_folder(animals):
    report = check_dataset("folder", animals)
    assert report.counts == (("classes", 3, None), ("train", 16, None), ("validation", 4, None),
                             ("test", 6, None))  # fmt: skip
    assert report.complete


def test_an_array_split_shares_its_pixels():
    pixels = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    split = ArraySplit(pixels, (5, 6, 7))
    part = split.subset([2, 0]).subset([1, 0])
    assert part.targets == (5, 7)
    assert part.pixels is pixels
    assert np.array_equal(np.asarray(part.load(1)), pixels[2])
    with pytest.raises(ValueError, match="targets: expected 3, one an image, got 2"):
        ArraySplit(pixels, (1, 2))
    with pytest.raises(ValueError, match=r"pixels: expected uint8 \[m, H, W, 3\]"):
        ArraySplit(pixels.astype(np.float32), (1, 2, 3))
