"""What a shelf's folder holds, and how one that is damaged is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.shelves import make_shelf

from hubpath_fast.features import Shelf, write, write_shelf
from hubpath_fast.features.shelf import ShelfRecord


def test_a_shelf_gives_back_what_was_put_on_it(tmp_path):
    draw = torch.Generator().manual_seed(0)
    features = {
        "wide": torch.randn(2, 6, 40, generator=draw).half(),
        "narrow": torch.randn(2, 6, 3, generator=draw).half(),
    }
    targets = torch.tensor([0, 1, 1, 0, 1, 0])
    head = torch.randn(4, 3, generator=draw), torch.randn(4, generator=draw)
    pixels = torch.randint(256, (2, 6, 3, 8, 8), generator=draw, dtype=torch.uint8)
    sizes = {"train": 3, "validation": 2, "test": 1}
    about = {"wide": {"ms": 1.5, "name": "timm/wide"}}
    made = write_shelf(
        tmp_path / "s", features, targets, ["a", "b"], sizes, pixels, {"narrow": head}, about
    )
    for shelf in (made, Shelf.open(tmp_path / "s")):
        assert shelf.labels == ("wide", "narrow")
        assert shelf.classes == ("a", "b")
        for i, label in enumerate(shelf.labels):
            assert torch.equal(shelf.features(i), features[label])
        assert torch.equal(shelf.targets, targets)
        assert torch.equal(shelf.pixels(), pixels)
        assert {name: part.tolist() for name, part in shelf.splits.items()} == {
            "train": [0, 1, 2], "validation": [3, 4], "test": [5],
        }  # fmt: skip
        assert shelf.source_head(0) is None
        assert all(torch.equal(a, b) for a, b in zip(shelf.source_head(1), head, strict=True))
        assert (shelf.models[0].ms, shelf.models[0].num_features) == (1.5, 40)
        assert [shelf.find(name) for name in ("wide", "timm/wide", "narrow")] == [0, 0, 1]
        assert (shelf.record.dtype, shelf.record.views, shelf.record.router_size) == ("fp16", 2, 8)


def test_without_test_images_results_are_on_validation(tmp_path):
    shelf = make_shelf(tmp_path / "s", sizes=(40, 20, 0))
    assert shelf.record.test_is_validation
    assert torch.equal(shelf.splits["test"], shelf.splits["validation"])


def test_equal_features_make_equal_files(tmp_path):
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")}
        for name in ("a", "b")
        if make_shelf(tmp_path / name)
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 6


def test_features_are_mapped_and_not_read(tmp_path):
    shelf = make_shelf(tmp_path / "s")
    features, maps = shelf.features(0), Path("/proc/self/maps")
    assert features is shelf.features(0)
    if maps.exists():
        ranges = [line.split() for line in maps.read_text().splitlines()]
        [path] = [
            parts[-1]
            for parts in ranges
            if int(parts[0].split("-")[0], 16)
            <= features.data_ptr()
            < int(parts[0].split("-")[1], 16)
        ]
        assert path == str(tmp_path / "s" / "features" / f"{shelf.models[0].key}.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "shelf.json").unlink(), "is no shelf: no shelf.json"),
        (lambda f: (f / "shelf.json").write_text("{"), "shelf.json is damaged"),
        (lambda f: (f / "shelf.json").write_text('{"format": 9}'), "has the format 9"),
        (lambda f: (f / "targets.safetensors").unlink(), "targets.safetensors is damaged"),
        (lambda f: _cut(f), "is damaged .*delete it and run hubpath shelf extract again"),
        (lambda f: _rename(f), "it is of the key"),
        (lambda f: _other_dtype(f), r"expected fp16 features of shape \[1, 120, \d\], got F32"),
        (lambda f: [p.unlink() for p in (f / "features").iterdir()], "holds no features yet"),
    ],
)
def test_what_is_no_whole_shelf_is_refused(tmp_path, change, words):
    make_shelf(tmp_path / "s")
    change(tmp_path / "s")
    with pytest.raises(ValueError, match=words):
        Shelf.open(tmp_path / "s")


def _cut(folder):
    path = next((folder / "features").iterdir())
    path.write_bytes(path.read_bytes()[:-8])


def _rename(folder):
    path = next((folder / "features").iterdir())
    path.rename(path.with_stem("0" * 24))


def _other_dtype(folder):
    record = json.loads((folder / "shelf.json").read_text())
    (folder / "shelf.json").write_text(json.dumps(record | {"dtype": "fp16"}))


def test_a_shelf_knows_the_closest_name_of_one_that_it_has_not(tmp_path):
    shelf = make_shelf(tmp_path / "s")
    with pytest.raises(ValueError, match=r"no features of a model 'modle2'; did you mean model2"):
        shelf.find("modle2")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"features": {}}, "features: expected at least one model"),
        ({"features": {"a": torch.ones(4, 2), "b": torch.ones(4, 2).half()}}, "all of float16 or"),
        ({"features": {"a": torch.ones(3, 2)}}, r"features of a: expected \[views, 4, D\]"),
        ({"features": {"a": torch.full((4, 2), torch.nan)}}, "features of a: some are not finite"),
        ({"targets": torch.tensor([0, 1, 2, 0])}, r"targets: expected numbers of the 2 classes"),
        ({"sizes": {"train": 3}}, "sizes: expected images of train, validation, test, 4 in all"),
        ({"sizes": {"val": 4}}, "sizes: expected images of train"),
        ({"pixels": torch.ones(4, 3, 8, 8)}, r"pixels: expected uint8 \[1, 4, 3, s, s\]"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, changed, words):
    given = {
        "features": {"a": torch.ones(4, 2)},
        "targets": torch.tensor([0, 1, 0, 1]),
        "classes": ["x", "y"],
        "sizes": {"train": 4},
    }
    with pytest.raises(ValueError, match=words):
        write_shelf(tmp_path / "s", **(given | changed))
    assert not (tmp_path / "s").exists()


def test_a_second_shelf_does_not_take_the_place_of_the_first(tmp_path):
    make_shelf(tmp_path / "s")
    with pytest.raises(ValueError, match="holds a shelf already"):
        make_shelf(tmp_path / "s")


def test_a_shelf_has_only_its_own_models_after_an_attempt_that_was_killed(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    folder, own = tmp_path / "s", tmp_path / "s" / "features" / "mine.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(write, "write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            make_shelf(folder, num_models=3, seed=1)
    assert make_shelf(folder, num_models=2).labels == ("model0", "model1")
    (folder / "shelf.json").unlink()
    own.touch()
    with pytest.raises(ValueError, match=r"mine\.safetensors is damaged"):  # not ours to delete
        make_shelf(folder)
    assert own.exists()


def test_other_splits_or_classes_make_other_keys(tmp_path):
    given = {"features": {"a": torch.ones(4, 2)}, "targets": torch.tensor([0, 1, 0, 1])}
    several = [
        ("one", "xy", {"train": 2, "validation": 2}),
        ("split", "xy", {"train": 3, "validation": 1}),
        ("test", "xy", {"train": 2, "test": 2}),
        ("names", "yx", {"train": 2, "validation": 2}),
        ("same", "xy", {"train": 2, "validation": 2}),
    ]
    made = [write_shelf(tmp_path / n, classes=c, sizes=sizes, **given) for n, c, sizes in several]
    keys = [shelf.models[0].key for shelf in made]
    assert len(set(keys)) == len({shelf.record.digest for shelf in made}) == 4
    assert keys[0] == keys[-1]


def test_records_survive_their_file():
    record = ShelfRecord(("a", "b"), (3, 2, 1), "fp16", 4, failed=(("timm/x", "NaN"),))
    assert ShelfRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_files_are_plain_safetensors(tmp_path):
    shelf = make_shelf(tmp_path / "s", source_classes=5)
    path = tmp_path / "s" / "features" / f"{shelf.models[2].key}.safetensors"
    tensors = load_file(path)
    assert sorted(tensors) == ["features", "source_bias", "source_weight"]
    assert torch.equal(tensors["features"], shelf.features(2))
