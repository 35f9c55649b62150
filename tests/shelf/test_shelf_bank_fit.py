"""A hub is fitted as on a GPU, by Triton's interpreter without one: the same hub, files and stops.

All in float64: a gradient that is zero but for rounding, as of a bias before BatchNorm, would be
rounded to another one, of which AdamW makes a step of the full rate.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.shelves import make_shelf

import hubpath_fast.shelf.model
from hubpath_fast.recipes import shelf_fit as recipe
from hubpath_fast.shelf import updates
from hubpath_fast.shelf.executor import GroupedHeads
from hubpath_fast.shelf.settings import ShelfFitSettings
from hubpath_fast.training import Trainer

pytestmark = pytest.mark.either
QUIET = Console(quiet=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 8


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return make_shelf(tmp_path_factory.mktemp("fit") / "shelf", 5, 3, (60, 30, 0), views=2)


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    build = recipe.build
    monkeypatch.setattr(recipe, "build", lambda *arguments: build(*arguments).double())


@pytest.fixture
def calls(monkeypatch):
    """Hubs are run by the kernels; how often all heads were updated at once."""
    monkeypatch.setattr(hubpath_fast.shelf.model, "GroupedHeads", partial(GroupedHeads, "triton"))
    counted, step = [], updates.HeadUpdates.step

    def count(self, *arguments):
        counted.append(1)
        return step(self, *arguments)

    monkeypatch.setattr(updates.HeadUpdates, "step", count)
    return counted


def use_torch(monkeypatch):
    monkeypatch.setattr(hubpath_fast.shelf.model, "GroupedHeads", partial(GroupedHeads, "torch"))


def fit(shelf, out, resume=False, **trainer):
    chosen = {
        "steps": STEPS, "batch_size": 3, "eval_every": 4, "save_every": 4, "log_every": 4,
        "weight_decay": 0.1, "device": DEVICE, **trainer,
    }  # fmt: skip
    given = {"k": 1, "generator_width": 4, "generator_stride": 1, "trainer": chosen}
    settings = ShelfFitSettings.from_dict({"experts": "all", **given})
    return recipe.shelf_fit(shelf.folder, settings, out, resume, QUIET)


def state(folder):
    """Tensors of the last checkpoint, weights and the optimizer's state, and predictions."""
    files = [*(folder / "last").rglob("*.safetensors"), folder / "predictions.safetensors"]
    return {f"{file.name}:{n}": t for file in files for n, t in load_file(file).items()}


def assert_same(ours, theirs):
    """Of float64 after few steps of AdamW, whose epsilon of 1e-8 makes 1e-8 of a rounding; steps
    are counted, and predictions kept, in float32."""
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-6, atol=1e-7, msg=partial(str.__add__, name)
        )


def test_the_hub_and_its_checkpoints_are_those_of_a_cpu(shelf, tmp_path, calls, monkeypatch):
    fit(shelf, tmp_path / "kernels")
    assert len(calls) == STEPS
    use_torch(monkeypatch)
    fit(shelf, tmp_path / "torch")
    assert len(calls) == STEPS
    ours, theirs = state(tmp_path / "kernels"), state(tmp_path / "torch")
    # Of an expert that was never asked a CPU's optimizer keeps nothing, where here are zeros.
    assert ours.keys() >= theirs.keys()
    assert not any(ours[name].any() for name in ours.keys() - theirs.keys())
    assert_same(ours, theirs)


def test_a_training_goes_on_where_it_was_stopped(shelf, tmp_path, calls, monkeypatch):
    fit(shelf, tmp_path / "whole")
    save = Trainer._save

    def stop_after(self, name):
        save(self, name)
        if name == "last" and self.state.step == 4:
            self.stop()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", stop_after)
        assert fit(shelf, tmp_path / "parts")[0].interrupted
    fit(shelf, tmp_path / "parts", resume=True)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert_same(parts, whole)


@pytest.mark.parametrize(
    "trainer", [{"clip_norm": 0.1}, {"schedule": "one-cycle", "cycle_momentum": True}]
)
def test_settings_that_need_gradients_or_move_betas_leave_updates_to_torch(
    shelf, tmp_path, calls, monkeypatch, trainer
):
    fit(shelf, tmp_path / "kernels", **trainer)
    assert not calls
    use_torch(monkeypatch)
    fit(shelf, tmp_path / "torch", **trainer)
    ours, theirs = state(tmp_path / "kernels"), state(tmp_path / "torch")
    assert ours.keys() == theirs.keys()
    assert_same(ours, theirs)
