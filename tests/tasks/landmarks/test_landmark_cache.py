"""Cached windows of faces: the bytes of a run without cache, and files that are not what they
should be."""

import pickle

import numpy as np
import pytest
import torch
from support.faces import draw_points, write_cofw, write_hrnet, write_photo

from hubpath_fast.data import DataError, TrainStream
from hubpath_fast.data.order import Draw
from hubpath_fast.tasks.landmarks import FaceAugment, FaceDataset, open_faces
from hubpath_fast.tasks.landmarks import cache as cache_module
from hubpath_fast.tasks.landmarks.cache import cache_faces

AUGMENT = FaceAugment()
WIDE = FaceAugment(rotation=90, scaling=0.5)


@pytest.fixture
def splits(tmp_path):
    """Two faces in a photograph, a large face that is reduced, and one at the border."""
    root = tmp_path / "wflw"
    lists = {"train": ["a.jpg:1", "a.jpg:2", "b.jpg:3", "c.jpg:4"], "test": ["d.jpg:5"]}
    write_hrnet(root, "wflw", lists)
    big = draw_points(98, 7, (20, 40, 620, 700))
    write_photo(root / "images" / "b.jpg", big, (640, 720), seed=3)
    file = root / "face_landmarks_wflw_train.csv"
    lines = file.read_text().splitlines()
    numbers = ",".join(map(str, big.reshape(-1).tolist()))
    lines[3] = f"b.jpg,3.3,320,370,{numbers}"
    file.write_text("\n".join(lines))
    return open_faces("wflw", root, validation=0.3)


def same(plain, cached, augment, size=64):
    for split, part in plain.distinct.items():
        for how in (augment, None):
            one, other = (FaceDataset(s, size, augment=how) for s in (part, getattr(cached, split)))
            keys = [Draw(i, seed) for i in range(len(part)) for seed in range(6)]
            for a, b in zip(one.__getitems__(keys), other.__getitems__(keys), strict=True):
                assert torch.equal(a[0], b[0])
                assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("mode", ["memory", "disk"])
@pytest.mark.parametrize("augment", [AUGMENT, WIDE], ids=["default", "wide"])
def test_a_cached_run_sees_the_same_bytes(tmp_path, splits, mode, augment):
    told = []
    cached = cache_faces(splits, 64, augment, mode, tmp_path / "cache", told.append)
    assert len(told) == 1
    assert told[0].startswith("cutting 5 faces into")
    for face in cached.train.faces:  # nothing is read from them any more
        if face.source.exists():
            face.source.rename(face.source.with_suffix(".moved"))
    moved = [part.faces for part in cached.distinct.values()]
    with pytest.raises(DataError):
        FaceDataset(splits.train, 64)[0]
    seen = [FaceDataset(part, 64, augment=augment)[0] for part in cached.distinct.values()]
    assert len(seen) == len(moved)
    for path in cached.train.faces[0].source.parent.glob("*.moved"):
        path.rename(path.with_suffix(".jpg"))
    same(splits, cached, augment)


def test_other_sizes_and_larger_reaches_are_read_from_photographs(tmp_path, splits):
    cached = cache_faces(splits, 64, AUGMENT, "memory")
    same(splits, cached, WIDE)
    same(splits, cached, AUGMENT, size=32)
    assert cached.train.store.serves(64, 1.0)
    assert not cached.train.store.serves(64, 3.0)
    assert not cached.train.store.serves(32, 1.0)


def test_a_file_is_found_again_whatever_is_held_out(tmp_path, splits):
    told, folder = [], tmp_path / "cache"
    cache_faces(splits, 64, AUGMENT, "disk", folder, told.append)
    root = splits.train.faces[0].file.parent
    other = open_faces("wflw", root, validation=0.6, seed=3)
    cached = cache_faces(other, 64, AUGMENT, "disk", folder, told.append)
    assert told[1] == f"5 faces are in {next(folder.glob('*.faces'))}"
    same(other, cached, AUGMENT)
    write_photo(root / "images" / "c.jpg", seed=99)
    changed = cache_faces(splits, 64, AUGMENT, "disk", folder, told.append)
    assert told[2].startswith("cutting 5 faces")
    same(splits, changed, AUGMENT)
    cache_faces(splits, 32, AUGMENT, "disk", folder, told.append)
    assert len(list(folder.glob("*.faces"))) == 3
    assert [path for path in folder.iterdir() if path.suffix != ".faces"] == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data[:100] + data[101:],
        lambda data: data[:-300] + b"\0" * 300,
        lambda data: data[:-400] + bytes([data[-400] ^ 1]) + data[-399:],
        lambda data: b"x" + data,
    ],
    ids=["half", "empty", "a byte less", "no end", "an index with another number", "a byte more"],
)
def test_a_damaged_file_is_written_again(tmp_path, splits, damage):
    told, folder = [], tmp_path / "cache"
    cache_faces(splits, 64, AUGMENT, "disk", folder)
    [file] = folder.glob("*.faces")
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(damage(whole))
    cached = cache_faces(splits, 64, AUGMENT, "disk", folder, told.append)
    assert told[0].startswith("cutting 5 faces")
    assert file.read_bytes() == whole
    same(splits, cached, AUGMENT)


def test_cofw_is_cached_too(tmp_path):
    write_cofw(tmp_path / "COFW_train_color.mat", 3, grey=(1,))
    write_cofw(tmp_path / "COFW_test_color.mat", 2, part="test")
    splits = open_faces("cofw", tmp_path)
    for mode in ("memory", "disk"):
        same(splits, cache_faces(splits, 64, AUGMENT, mode, tmp_path / "cache"), AUGMENT)


def test_workers_read_from_the_cache(tmp_path, splits):
    cached = cache_faces(splits, 64, AUGMENT, "disk", tmp_path / "cache")
    datasets = [FaceDataset(s, 64, augment=AUGMENT) for s in (splits.train, cached.train)]
    streams = [TrainStream(d, 4, 1, w).batches() for d, w in zip(datasets, (0, 2), strict=True)]
    for _, own, others in zip(range(2), *streams, strict=False):
        assert all(map(torch.equal, own, others))
    for stream in streams:
        stream.close()


def test_a_file_is_mapped_anew_in_other_processes(tmp_path, splits):
    """Not sent to them: what is pickled is small."""
    cached = cache_faces(splits, 64, AUGMENT, "disk", tmp_path / "cache")
    data = pickle.dumps(cached.train.store)
    assert len(data) < 3000
    again = pickle.loads(data)
    assert len(again) == 5
    for place in range(5):
        assert torch.equal(again[place].pixels, cached.train.store[place].pixels)


def test_a_cache_that_does_not_fit(tmp_path, splits, monkeypatch):
    monkeypatch.setattr(cache_module, "free_memory", lambda: 1000)
    with pytest.raises(DataError, match=r"need .* of memory .* use --cache disk or --cache none"):
        cache_faces(splits, 64, AUGMENT, "memory")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be made"):
        cache_faces(splits, 64, AUGMENT, "disk", tmp_path / "file" / "cache")
    with pytest.raises(ValueError, match="cache: expected one of none, memory, disk, got 'ram'"):
        cache_faces(splits, 64, AUGMENT, "ram")
    assert cache_faces(splits, 64, AUGMENT, "none") is splits


def test_a_broken_photograph_is_named_and_nothing_left(tmp_path, splits):
    splits.test.faces[0].source.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"d.jpg"):
        cache_faces(splits, 64, AUGMENT, "disk", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_photograph_is_decoded_once_for_all_its_faces(tmp_path, splits, monkeypatch):
    read, original = [], cache_module.Face.pixels
    monkeypatch.setattr(
        cache_module.Face, "pixels", lambda face: (read.append(face.image), original(face))[1]
    )
    cached = cache_faces(splits, 64, AUGMENT, "memory")
    assert sorted(read) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    store = cached.train.store
    assert store.index.shape == (5, 6)
    assert int(store.index[:, 5].max()) >= 10  # the large face, 825 pixels to 64
    assert np.all(store.index[:, 5] >= 1)
