"""``hubpath shelf prune``: what it foretells is what the smaller hubs do, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support.command import hubpath, refused
from support.shelves import make_hub, make_shelf

from hubpath_fast.model import SumAggregator
from hubpath_fast.recipes import shelf_prune
from hubpath_fast.runs.prune import keep_only
from hubpath_fast.shelf.run import open_hub
from hubpath_fast.shelf.save import open_hub_of, save_hub

M, ALL = 6, 100  # points: any hub is within them


def never_asked(hub, *experts):
    """The hub, saved again."""
    with torch.no_grad():
        hub.model.generator.clean.bias[list(experts)] = -1e3
    save_hub(hub, hub.folder)
    return hub


def accuracy(model, shelf, split):
    numbers = shelf.splits[split]
    with torch.no_grad():
        said = model(numbers.double()).argmax(dim=1)
    return (said == shelf.targets[numbers]).double().mean().item()


@pytest.fixture(params=[("linear", False), ("sum", False), ("sum", True)])
def hub(request, tmp_path):
    shelf = make_shelf(tmp_path / "shelf", M)
    order = reversed(range(M))  # an expert's number is not its model's
    aggregator, renormalize = request.param
    hub = make_hub(shelf, order, spread=3.0, aggregator=aggregator, renormalize=renormalize)
    return never_asked(hub, 0)


def test_what_it_foretells_is_what_smaller_hubs_do(hub, tmp_path):
    shelf, out = hub.shelf, tmp_path / "smaller"
    hubpath("shelf", "prune", shelf.folder, "--points", ALL, "--out", out)
    result = json.loads((shelf.folder / "prune.json").read_text())
    assert result["value"] == pytest.approx(accuracy(hub.model, shelf, "validation"), abs=1e-12)
    assert [row["name"] for row in result["experts"]] == list(hub.labels)
    for i in range(M):
        model = open_hub(hub.folder).model
        model.remove_expert(i)
        found = result["experts"][i]["without"]["value"]
        assert found == pytest.approx(accuracy(model, shelf, "validation"), abs=1e-12)
    model, left = open_hub(hub.folder).model, list(hub.labels)
    for step in result["steps"]:
        model.remove_expert(left.index(step["dropped"]))
        left.remove(step["dropped"])
        assert step["value"] == pytest.approx(accuracy(model, shelf, "validation"), abs=1e-12)
    chosen = result["chosen"]
    assert chosen["kept"] == left
    assert chosen["test"]["value"] == pytest.approx(accuracy(model, shelf, "test"), abs=1e-12)
    assert chosen["test"]["hub"] == pytest.approx(accuracy(hub.model, shelf, "test"), abs=1e-12)
    assert (result["images"], chosen["test"]["images"]) == (30, 30)


def test_the_smaller_hub_is_one_as_fit_makes_it(hub, tmp_path):
    out = tmp_path / "smaller"
    said = hubpath("shelf", "prune", hub.shelf.folder, "--points", ALL, "--out", out).output
    assert f"saved in {out}" in said
    result = json.loads((hub.shelf.folder / "prune.json").read_text())
    smaller = open_hub(out)
    assert list(smaller.labels) == result["chosen"]["kept"]
    assert smaller.settings.experts == str(hub.model.k)
    keep_only(hub.model, [hub.labels.index(label) for label in smaller.labels])
    numbers = torch.arange(hub.shelf.record.num_images).double()
    with torch.no_grad():
        assert torch.equal(smaller.model(numbers), hub.model(numbers))
    assert smaller.labels != hub.labels[:2]  # so that it matters which ones are kept
    # It can be pruned to the same number again, where there is none to spare.
    said = refused("shelf", "prune", hub.shelf.folder, "--hub", out)
    assert "none can be dropped" in said
    # Another one takes its place; the hub that fit goes on from stays.
    hubpath("shelf", "prune", hub.shelf.folder, "--points", ALL, "--out", out)
    (out / "last").mkdir()
    assert "goes on from" in refused("shelf", "prune", hub.shelf.folder, "--out", out)


def test_experts_that_are_never_asked_cost_nothing(tmp_path):
    shelf = make_shelf(tmp_path / "shelf", M)
    never_asked(make_hub(shelf, range(M)), 0, 4)
    said = hubpath("shelf", "prune", shelf.folder).output
    result = json.loads((shelf.folder / "prune.json").read_text())
    assert [result["experts"][i]["asked"] for i in (0, 4)] == [0, 0]
    assert [result["experts"][i]["without"]["lost"] for i in (0, 4)] == [0, 0]
    assert "written: " in said
    never = [row["name"] for row in result["experts"] if row["asked"] == 0]
    assert {"model0", "model4"} <= set(never)
    assert f"{len(never)} of {M} are never asked: {', '.join(never)}" in said
    assert "one of 30 validation images is 3.3 points, so 0.5 cannot be measured" in said


def test_a_smaller_hub_sums_as_the_larger_one_did(tmp_path):
    shelf = make_shelf(tmp_path / "shelf", 64, sizes=(64, 64, 0), dims=(3,))
    hub = make_hub(shelf, range(64))
    assert isinstance(hub.model.aggregator, SumAggregator)  # by their number
    hubpath("shelf", "prune", shelf.folder, "--points", ALL, "--out", tmp_path / "smaller")
    smaller = open_hub(tmp_path / "smaller")
    assert len(smaller.models) == 2
    assert isinstance(smaller.model.aggregator, SumAggregator)


def test_no_training_goes_on_from_a_smaller_hub(tmp_path):
    shelf, out = make_shelf(tmp_path / "shelf", M), tmp_path / "smaller"
    hub = make_hub(shelf, range(M))
    hubpath("shelf", "prune", shelf.folder, "--points", ALL, "--out", out)
    for given in (["--out", out, "--resume"], ["--out", out]):
        said = refused("shelf", "fit", shelf.folder, "--experts", "all", *given)
        assert f"out: {out} is a hub that hubpath shelf prune or add wrote" in said
    # One whose training was killed before its first "last" was saved is no such hub.
    config = next((hub.folder / "best").glob("config.json"))
    config.write_text(json.dumps({**json.loads(config.read_text()), "trainer": {}}))
    said = refused("shelf", "prune", shelf.folder, "--points", ALL, "--out", hub.folder)
    assert "goes on from" in said


def test_a_hub_beside_its_shelf_is_opened_wherever_that_lies_now(tmp_path):
    shelf, hub = make_shelf(tmp_path / "shelf", M), tmp_path / "hub"
    labels = make_hub(shelf, range(M), hub).labels
    moved = shelf.folder.rename(tmp_path / "moved")
    assert open_hub_of(moved, hub).labels == labels
    shutil.copytree(moved, shelf.folder)
    opened = open_hub_of(moved, hub)
    assert opened.shelf.folder == moved
    hubpath("shelf", "prune", moved, "--hub", hub)


def test_a_hub_in_its_shelf_names_that_without_dots(tmp_path):
    shelf = make_shelf(tmp_path / "shelf", M)
    hub = make_hub(shelf, range(M))
    assert open_hub(hub.folder).shelf.folder == shelf.folder.resolve()


def test_what_cannot_be_pruned_is_refused(tmp_path):
    shelf = make_shelf(tmp_path / "shelf", M, sizes=(60, 0, 30))
    make_hub(shelf, range(M))
    assert "no validation images" in refused("shelf", "prune", shelf.folder)
    assert "points: expected" in refused("shelf", "prune", shelf.folder, "--points", "inf")
    for points in (-100, 101):
        said = refused("shelf", "prune", shelf.folder, "--points", points)
        assert "points: expected percentage points above -100" in said
    other = make_shelf(tmp_path / "other", M, seed=1)
    hub = shelf.folder / "hub"
    assert "is of the shelf" in refused("shelf", "prune", other.folder, "--hub", hub)
    assert "holds no hub" in refused("shelf", "prune", other.folder)
    make_hub(shelf, [1], tmp_path / "one", k=1)
    said = refused("shelf", "prune", shelf.folder, "--hub", tmp_path / "one")
    assert "has one expert, which cannot be dropped" in said
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    out = refused("shelf", "prune", shelf.folder, "--out", tmp_path / "full")
    assert "is not empty" in out


def test_without_test_images_nothing_is_confirmed(tmp_path):
    shelf = make_shelf(tmp_path / "shelf", M, sizes=(60, 30, 0))
    make_hub(shelf, range(M))
    said = hubpath("shelf", "prune", shelf.folder, "--points", ALL).output
    assert json.loads((shelf.folder / "prune.json").read_text())["chosen"]["test"] is None
    assert "no test images of their own" in said


def test_its_record_is_the_last_that_it_writes(tmp_path, monkeypatch):
    shelf = make_shelf(tmp_path / "shelf", M)
    make_hub(shelf, range(M))

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(shelf_prune, "save_hub", full)
    with pytest.raises(OSError, match="no space"):
        shelf_prune.prune(shelf.folder, points=ALL, out=tmp_path / "out")
    assert not (shelf.folder / "prune.json").exists()
