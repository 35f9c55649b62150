"""A file of features is known by all that they are a function of."""

from __future__ import annotations

import dataclasses

import pytest
from support.snapshots import spec_of, write_weights

from hubpath_fast.features import plan
from hubpath_fast.features.plan import key_of
from hubpath_fast.features.shelf import ShelfRecord
from hubpath_fast.features.wanted import read_names

RECORD = ShelfRecord(("a", "b"), (3, 2, 1), "fp16", views=2, digest="0", seed=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_weights(tmp_path_factory.mktemp("weights") / "a.safetensors")
    return read_names(spec_of(path), True)[0][1]


def key(model, record=RECORD, name="a", size=32, weights="w", **changed):
    return key_of(dataclasses.replace(record, **changed), name, model, size, weights)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "b"}, {"size": 40}, {"weights": "v"}, {"views": 3}, {"dtype": "fp32"},
        {"digest": "1"}, {"seed": 1}, {"flip": False}, {"min_area": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_features_changes_their_key(model, change):
    assert key(model, **change) != key(model)
    assert key(model) == key(model)


@pytest.mark.parametrize("change", [{"mean": (0.1, 0.2, 0.3)}, {"std": (0.1, 0.2, 0.3)}], ids=str)
def test_so_does_another_preprocessing(model, change):
    assert key(dataclasses.replace(model, **change)) != key(model)


def test_so_does_another_version_of_a_library_that_builds_bodies(model, monkeypatch):
    before = key(model)
    for library in ("timm", "torchvision"):
        with monkeypatch.context() as patch:
            patch.setattr(plan, "version", lambda name, of=library: "0" if name == of else "1")
            first = key(model)
            patch.setattr(plan, "version", lambda name: "1")
            assert key(model) != first
    assert key(model) == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"flip": False}, {"min_area": 0.5}], ids=str)
def test_draws_change_nothing_where_nothing_is_drawn(model, change):
    assert key(model, views=1, **change) == key(model, views=1)


@pytest.mark.parametrize("change", [{"failed": (("x", "y"),)}, {"data": "elsewhere"}], ids=str)
def test_what_features_do_not_depend_on_leaves_the_key(model, change):
    assert key(model, **change) == key(model)
