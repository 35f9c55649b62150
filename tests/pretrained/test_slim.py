"""Frozen bodies that are their names' own weights are left out, and found again or told of."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.saved_hubs import SIZE, TINY, assert_same, hub, images, predictions, saved

import hubpath_fast as hp
from hubpath_fast.checkpoints import INDEX_FILE, CheckpointError
from hubpath_fast.hub import packages
from hubpath_fast.hub.packages import Package
from hubpath_fast.hub.weights import file_digest


@pytest.fixture
def weights(tmp_path):
    """A file of weights, and the name of the network that starts from them."""
    torch.manual_seed(5)
    path = tmp_path / "birds.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path, f"file/{path}?arch={TINY}"


def from_weights(names, **options):
    """As pre-trained: no buffer is changed."""
    torch.manual_seed(0)
    return hp.create_model(names, 3, input_size=SIZE, generator_width=4, **options).eval()


def references(folder):
    return json.loads((folder / INDEX_FILE).read_text())["metadata"]["references"]


def test_only_bodies_that_are_frozen_and_equal_are_left_out(weights, tmp_path):
    path, name = weights
    changed = from_weights(
        [f"{name}&freeze=body", name, f"{name}&freeze=all", f"{name}&freeze=body"]
    )
    with torch.no_grad():
        changed.experts[3].body.conv1[0].weight[0, 0, 0, 0] += 1
    folder = saved(changed, tmp_path / "slim", slim=True)
    found = references(folder)
    assert sorted(found) == ["0", "2"]
    body = {n for n in changed.state_dict() if n.startswith("experts.0.") and ".fc." not in n}
    assert set(found["0"]["tensors"]) == body
    assert found["0"]["sha256"] == file_digest(path, "sha256")
    assert found["0"]["source"] == f"{name}&freeze=body"
    assert_same(hp.from_pretrained(folder), changed)
    sizes = [file.stat().st_size for file in sorted((folder / "experts").iterdir())]
    assert sizes[0] < sizes[1] / 20  # the whole network's


def test_one_expert_of_a_slim_hub_is_whole(weights, tmp_path):
    model = from_weights([f"{weights[1]}&freeze=body", weights[1]])
    folder = saved(model, tmp_path / "slim", slim=True)
    x = images().float() / 255
    with torch.no_grad():
        assert torch.equal(hp.load_expert(folder, 0)(x), model.experts[0](x))
    weights[0].unlink()
    hp.load_expert(folder, 1)  # which leaves nothing out


def test_without_slim_and_of_random_weights_nothing_is_left_out(weights, tmp_path):
    model = from_weights([f"{weights[1]}&freeze=body", weights[1]])
    assert references(saved(model, tmp_path / "whole")) == {}
    random = hub((f"{weights[1]}&freeze=body", weights[1]))
    assert references(saved(random, tmp_path / "random", slim=True)) == {}
    weights[0].unlink()
    assert references(saved(model, tmp_path / "gone", slim=True)) == {}
    assert torch.equal(predictions(hp.from_pretrained(tmp_path / "gone")), predictions(model))


def test_a_source_that_is_gone_or_changed_is_told(weights, tmp_path):
    path, name = weights
    folder = saved(from_weights([f"{name}&freeze=body", name]), tmp_path / "slim", slim=True)
    torch.manual_seed(6)
    save_file(timm.create_model("test_resnet").state_dict(), path)
    for words in ("birds.safetensors is another file now .SHA-256", "there is no file of weights"):
        with pytest.raises(CheckpointError, match=words) as caught:
            hp.from_pretrained(folder)
        assert "\n" not in str(caught.value)
        path.unlink(missing_ok=True)


def test_weights_of_a_package_are_left_out(tmp_path, monkeypatch):
    torch.manual_seed(5)
    network = timm.create_model("test_efficientnet")
    path = tmp_path / "site" / "weights.safetensors"
    path.parent.mkdir()
    save_file(network.state_dict(), path)
    package = Package("1.0", "weights.safetensors", file_digest(path, "sha256"),
                      "test_efficientnet.r160_in1k", "MIT")  # fmt: skip
    monkeypatch.setitem(packages.PACKAGES, "birds", package)
    monkeypatch.setattr(packages, "convert", lambda make, state, source: state)

    class Installed:
        version = "1.0"

        def locate_file(self, name):
            return path.parent / name

    monkeypatch.setattr(packages.PackageSource, "_installed", lambda self: Installed())
    model = from_weights(["package/birds?freeze=body", "package/birds?freeze=body"])
    folder = saved(model, tmp_path / "slim", slim=True)
    assert sorted(references(folder)) == ["0", "1"]
    assert_same(hp.from_pretrained(folder), model)
    monkeypatch.setattr(packages.PackageSource, "_installed", lambda self: None)
    with pytest.raises(CheckpointError, match=r"the package birds 1\.0 is not installed"):
        hp.from_pretrained(folder)


def test_tensors_that_experts_share_are_not_left_out(weights, tmp_path):
    model = from_weights([f"{weights[1]}&freeze=body", f"{weights[1]}&freeze=body"])
    model.experts[1] = model.experts[0]
    folder = saved(model, tmp_path / "slim", slim=True)
    assert references(folder) == {}
