"""Decoded caches: the same bytes as decoding, found again, whole or absent, and refused in time."""

from __future__ import annotations

import os
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from hubpath_fast.data import (
    ArraySplit,
    DataError,
    EvalBatches,
    ImageDataset,
    TrainStream,
    cache,
    cache_splits,
    eval_transform,
    open_dataset,
    open_images,
    train_transform,
)
from hubpath_fast.data.transforms import resized_side

SIDE = resized_side(16)  # 18


@pytest.fixture
def splits(animals):
    return open_images(animals, validation=0.25)


@pytest.fixture
def cached(tmp_path):
    def make(splits, mode, **options):
        return cache_splits(splits, SIDE, mode, tmp_path / "cache", **options)

    return make


def batches_of(splits, workers):
    """Some of training, and all of validation and test."""
    stream = TrainStream(ImageDataset(splits.train, train_transform(16)), 6, 4, workers).batches(3)
    taken = list(islice(stream, 4))
    stream.close()
    for part in (splits.validation, splits.test):
        taken += EvalBatches(ImageDataset(part, eval_transform(16)), 4, workers)
    return taken


@pytest.mark.parametrize(("mode", "workers"), [("memory", 0), ("disk", 0), ("disk", 1)])
def test_a_cached_run_sees_the_bytes_of_one_that_decodes(splits, cached, animals, mode, workers):
    expected = batches_of(splits, 0)
    ready = cached(splits, mode)
    assert ready.train.pixels is ready.test.pixels
    assert ready.train.pixels.shape == (26, SIDE, SIDE, 3)
    assert ready.train.pixels.nbytes == cache.cache_bytes(26, SIDE)
    shutil.rmtree(animals)  # nothing is read any more
    for (images, targets), (same, same_targets) in zip(
        expected, batches_of(ready, workers), strict=True
    ):
        assert torch.equal(images, same)
        assert torch.equal(targets, same_targets)


def test_a_disk_cache_is_found_again_whatever_is_held_out(splits, cached, animals, tmp_path):
    told = []
    umask = os.umask(0o027)
    cached(splits, "disk", tell=told.append)
    os.umask(umask)
    [file] = (tmp_path / "cache").iterdir()
    before = file.stat()
    other = open_images(animals, validation=0.4, seed=7)
    again = cached(other, "disk", tell=told.append)
    assert before.st_mode & 0o777 == 0o640  # what the umask leaves to others
    [file] = (tmp_path / "cache").iterdir()
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert told[0].startswith("decoding 26 images into ")
    assert told[1] == f"26 decoded images are in {file}"
    plain = np.asarray(other.test.load(2).resize((SIDE, SIDE), 2))
    assert np.array_equal(np.asarray(again.test.load(2)), plain)


def test_changed_images_and_sizes_make_another_cache(splits, cached, tmp_path):
    cached(splits, "disk")
    os.utime(splits.train.paths[0], ns=(1, 1))
    cached(splits, "disk")
    cache_splits(splits, SIDE + 1, "disk", tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_images_that_were_read_otherwise_are_decoded_again(splits, cached, tmp_path, monkeypatch):
    """FORMAT 1 was written before images were turned upright, scaled and laid on white."""
    assert cache.FORMAT > 1
    good = np.array(cached(splits, "disk").train.pixels)
    [new] = (tmp_path / "cache").iterdir()
    new.unlink()
    with monkeypatch.context() as old:
        old.setattr(cache, "FORMAT", 1)
        old.setattr(cache, "load_image", lambda path: Image.new("RGB", (4, 4)))
        assert not np.array(cached(splits, "disk").train.pixels).any()
    [old_file] = (tmp_path / "cache").iterdir()
    assert np.array_equal(cached(splits, "disk").train.pixels, good)
    assert sorted((tmp_path / "cache").iterdir()) == sorted([old_file, new])


def test_a_damaged_cache_is_made_again(splits, cached, tmp_path):
    good = np.array(cached(splits, "disk").train.pixels)
    [file] = (tmp_path / "cache").iterdir()
    for damage in (file.read_bytes()[:-100], b"", b"\x93NUMPY\x01\x00"):
        file.write_bytes(damage)
        assert np.array_equal(cached(splits, "disk").train.pixels, good)


def test_a_broken_image_is_named_and_leaves_no_file(splits, cached, tmp_path):
    broken = splits.test.paths[3]
    broken.write_bytes(b"no image")
    for mode in ("memory", "disk"):
        with pytest.raises(DataError, match=f"cannot read the image {broken}"):
            cached(splits, mode)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_killed_run_left_is_cleared_away_but_not_what_another_writes(
    splits, cached, tmp_path
):
    cached(splits, "disk")
    [file] = (tmp_path / "cache").iterdir()
    file.unlink()
    old, new = (file.parent / f".{file.name}.{word}" for word in ("old", "new"))
    for left in (old, new):
        left.write_bytes(b"half")
    os.utime(old, (1, 1))
    cached(splits, "disk")
    assert sorted(file.parent.iterdir()) == sorted([new, file])


def test_a_full_disk_leaves_no_file(splits, cached, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cached(splits, "disk")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_does_not_fit_is_refused_before_decoding(splits, cached, monkeypatch):
    size = 26 * SIDE * SIDE * 3  # 25,272 bytes
    monkeypatch.setattr(cache, "load_image", None)
    monkeypatch.setattr(cache, "free_memory", lambda: int(size / 0.8) - 1)
    with pytest.raises(DataError, match=r"0\.0 MiB of memory \(26 of 18 x 18\).*--cache disk"):
        cached(splits, "memory")
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    with pytest.raises(DataError, match="are free there; use another --cache-dir"):
        cached(splits, "disk")


def test_free_memory_is_the_containers_where_there_is_one(tmp_path):
    machine = cache.free_memory()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert cache.free_memory(tmp_path) is None or cache.free_memory(tmp_path) > 1000
    (tmp_path / "memory.max").write_text("1000\n")
    assert cache.free_memory(tmp_path) == 300
    assert machine is None or machine > 300


def test_what_is_decoded_already_stays_as_it_is(splits, cached):
    digits = open_dataset("digits")
    assert cached(digits, "memory") is digits
    assert cached(splits, "none") is splits
    with pytest.raises(ValueError, match="cache: expected one of none, memory, disk, got 'ram'"):
        cached(splits, "ram")


def test_validation_that_stands_in_for_test_stays_the_same_object(animals, cached):
    shutil.rmtree(animals / "test")
    ready = cached(open_images(animals), "memory")
    assert ready.test is ready.validation
    assert isinstance(ready.test, ArraySplit)
