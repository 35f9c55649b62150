"""What the next extraction makes of what a killed, a stopped or a failed one has left."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from support.snapshots import spec_of, write_photos, write_weights

from hubpath_fast.features import Shelf, extract
from hubpath_fast.features import shelf as shelf_module
from hubpath_fast.features.pixels import Squares
from hubpath_fast.features.write import write_model
from hubpath_fast.recipes.shelf_extract import ExtractSettings, extract_shelf
from hubpath_fast.shelf.heads import fit_heads


class Killed(BaseException):
    """In place of SIGKILL."""


def killed(*_, **__):
    raise Killed


@pytest.fixture
def made(tmp_path):
    """(shelf, photos, names) of two models of one size."""
    photos = write_photos(tmp_path / "photos")
    names = [spec_of(write_weights(tmp_path / f"w/m{seed}.safetensors", seed)) for seed in (0, 1)]
    extract_shelf(tmp_path / "shelf", names, ExtractSettings(data=str(photos)))
    return tmp_path / "shelf", photos, names


def squares_of(shelf):
    return [path.name for path in shelf.glob("pixels/*.npy")]


def paint(path):
    """Other pixels in as many bytes, and the same time of change."""
    then, pixel = path.stat(), Image.open(path).convert("RGB")
    for level in range(256 * 256):
        pixel.putpixel((0, 0), (level % 256, level // 256, 7))
        pixel.save(path)
        if path.stat().st_size == then.st_size:
            break
    assert path.stat().st_size == then.st_size
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))


def test_decoded_images_are_compared_before_another_extraction_can_find_them(made, monkeypatch):
    shelf, photos, names = made
    paint(photos / "train/cat/1.png")
    larger = names[0].replace("size=32", "size=40")
    with monkeypatch.context() as patch:
        patch.setattr(Squares, "_compare", killed)
        with pytest.raises(Killed):
            extract_shelf(shelf, larger)
    assert squares_of(shelf) == []
    with pytest.raises(ValueError, match=r"1 of the 10 images have other contents .*cat/1\.png"):
        extract_shelf(shelf, larger)


def test_decoded_images_are_gone_after_an_extraction_with_nothing_left_to_compute(
    made, monkeypatch
):
    shelf, _, names = made
    larger = names[0].replace("size=32", "size=40")
    with monkeypatch.context() as patch:
        patch.setattr(Squares, "drop", killed)
        with pytest.raises(Killed):
            extract_shelf(shelf, larger)
    assert len(squares_of(shelf)) == 1
    assert extract_shelf(shelf, larger).computed == []
    assert not (shelf / "pixels").exists()


def test_a_new_shelf_does_not_adopt_features_of_an_attempt_that_was_killed(made, tmp_path):
    shelf, photos, names = made
    other = tmp_path / "other"
    shutil.copytree(shelf / "features", other / "features")
    extract_shelf(other, names[0], ExtractSettings(data=str(photos), validation=0.25))
    assert Shelf.open(other).labels == ("m0",)


@pytest.fixture
def replaced(made, monkeypatch):
    """``made``, killed when the first model's new weights had been computed."""
    shelf, _, names = made
    old = Shelf.open(shelf).models[0]
    write_weights(shelf.parent / "w/m0.safetensors", 9)
    with monkeypatch.context() as patch:
        patch.setattr(extract._Extraction, "_remove", killed)
        with pytest.raises(Killed):
            extract_shelf(shelf, names)
    assert len(list(shelf.glob("features/*"))) == 3
    return shelf, names, old


def test_of_two_files_of_a_model_the_newer_one_is_on_the_shelf(replaced):
    shelf, _, old = replaced
    opened = Shelf.open(shelf)
    assert opened.labels == ("m0", "m1")
    assert opened.models[0].key != old.key


@pytest.mark.parametrize("same", [True, False])
def test_the_older_of_two_files_of_a_model_goes_with_the_next_extraction(replaced, same):
    shelf, names, old = replaced
    kept = {model.key for model in Shelf.open(shelf).models}
    other = spec_of(write_weights(shelf.parent / "w/m5.safetensors", 5))
    done = extract_shelf(shelf, names if same else other)
    assert done.computed == ([] if same else ["m5"])
    left = {path.stem for path in shelf.glob("features/*")}
    assert left - {Shelf.open(shelf).models[-1].key} <= kept
    assert old.key not in left


def test_heads_go_with_the_features_that_they_are_of(made):
    shelf, _, names = made
    for seed in (0, 1):
        fit_heads(Shelf.open(shelf), seed=seed)
    before = {path.name for path in shelf.glob("heads/*")}
    assert len(before) == 4
    path = shelf.parent / "w/m0.safetensors"
    spoil(path)
    extract_shelf(shelf, names)
    assert {path.name for path in shelf.glob("heads/*")} == before  # the weights may come back
    write_weights(path, 9)
    extract_shelf(shelf, names)
    left = {path.name for path in shelf.glob("heads/*")}
    assert len(left) == 2
    assert left < before
    fit_heads(Shelf.open(shelf))
    assert {path.name for path in shelf.glob("heads/*")} > left


def spoil(path):
    state = load_file(path)
    state["conv1.0.weight"][:] = float("nan")
    save_file(state, path)


def test_a_model_whose_new_weights_fail_is_on_the_shelf_again_when_the_old_ones_are_back(made):
    shelf, _, names = made
    before, path = Shelf.open(shelf).models, shelf.parent / "w/m0.safetensors"
    spoil(path)
    assert extract_shelf(shelf, names).failed
    opened = Shelf.open(shelf)
    assert opened.labels == ("m1",)
    assert [name for name, _ in opened.record.failed] == [names[0]]
    write_weights(path, 0)
    assert Shelf.open(shelf).labels == ("m1",)
    assert extract_shelf(shelf, names).there == ("m0", "m1")
    opened = Shelf.open(shelf)
    assert opened.models == before
    assert opened.record.failed == ()


def test_a_model_is_on_the_shelf_as_soon_as_it_succeeds(made, monkeypatch):
    shelf, _, names = made
    path = shelf.parent / "w/m0.safetensors"
    spoil(path)
    extract_shelf(shelf, names)
    write_weights(path, 9)
    with monkeypatch.context() as patch:
        patch.setattr(extract._Extraction, "_remove", killed)
        patch.setattr(extract._Extraction, "_failures_written", contextlib.nullcontext)
        with pytest.raises(Killed):
            extract_shelf(shelf, names)
    assert Shelf.open(shelf).labels == ("m0", "m1")


@pytest.mark.parametrize("step", ["extract.make_plan", "extract._Extraction._first"])
def test_failures_stay_known_when_the_next_extraction_stops_before_it_comes_to_them(
    made, monkeypatch, step
):
    shelf, _, names = made
    spoil(shelf.parent / "w/m0.safetensors")
    extract_shelf(shelf, names)
    before = Shelf.open(shelf).record.failed
    with monkeypatch.context() as patch:
        patch.setattr(f"hubpath_fast.features.{step}", interrupted)
        with pytest.raises(InterruptedError):
            extract_shelf(shelf, names)
    assert Shelf.open(shelf).record.failed == before


def interrupted(*_):
    raise InterruptedError("stopped by SIGTERM")


def test_models_that_are_all_refused_before_anything_is_computed_are_in_the_record(made):
    shelf, _, names = made
    small = names[0].replace("size=32", "size=7")
    assert extract_shelf(shelf, small).failed
    assert [name for name, _ in Shelf.open(shelf).record.failed] == [small]


def test_files_that_others_are_writing_into_the_shelf_stay(made):
    shelf, _, names = made
    others, own = shelf / ".rank.json.0.part", shelf / ".router.safetensors.0.part"
    others.touch()
    own.touch()
    extract_shelf(shelf, names)
    assert others.exists()
    assert not own.exists()


def test_a_shelf_opens_while_an_extraction_puts_a_file_in_anothers_place(made, monkeypatch):
    shelf, _, _ = made
    read, old = shelf_module.read_model, Shelf.open(shelf).models[0]
    features = Shelf.open(shelf).features(0)

    def replacing(path, record):
        if path.stem == old.key:
            write_model(shelf, dataclasses.replace(old, key="f" * 24), features)
            path.unlink()
        return read(path, record)

    with monkeypatch.context() as patch:
        patch.setattr(shelf_module, "read_model", replacing)
        opened = Shelf.open(shelf)
    assert [model.key[:1] for model in opened.models if model.label == "m0"] == ["f"]
    assert len(opened.models) == 2


def test_a_link_to_a_file_that_is_gone_is_damaged(made):
    shelf, _, _ = made
    (shelf / "features" / "0.safetensors").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"0\.safetensors is damaged"):
        Shelf.open(shelf)


def test_random_weights_do_not_take_the_place_of_pre_trained_ones_or_the_other_way_round(
    made, tmp_path
):
    shelf, photos, names = made
    before = Shelf.open(shelf).models
    with pytest.raises(ValueError, match=r"pretrained: .* has True, got False; the features of a"):
        extract_shelf(shelf, names, ExtractSettings(pretrained=False))
    assert Shelf.open(shelf).models == before
    random = ExtractSettings(data=str(photos), pretrained=False)
    extract_shelf(tmp_path / "random", names[0], random)
    before = Shelf.open(tmp_path / "random").models
    with pytest.raises(ValueError, match=r"pretrained: .* has False, got True"):
        extract_shelf(tmp_path / "random", names, ExtractSettings(pretrained=True))
    done = extract_shelf(tmp_path / "random", [*names, "timm/test_vit4?size=160"])
    assert len(done.computed) == 2  # of which the last has no other weights
    after = Shelf.open(tmp_path / "random").models
    assert after[0] == before[0]
    assert all(model.weights.startswith("random:") for model in after)
