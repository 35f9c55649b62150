"""A hub is fitted on a shelf, goes on after a stop, and is opened again."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.shelves import make_shelf

from hubpath_fast.features import Shelf, write_shelf
from hubpath_fast.recipes.shelf_fit import asked_settings, shelf_fit
from hubpath_fast.shelf.choice import choose_models
from hubpath_fast.shelf.heads import fit_heads
from hubpath_fast.shelf.model import build_hub
from hubpath_fast.shelf.run import open_hub, read_result
from hubpath_fast.shelf.settings import ShelfFitSettings
from hubpath_fast.shelf.stream import ShelfStream
from hubpath_fast.training import NonFiniteLoss, Trainer

QUIET = Console(quiet=True)
SIZES = (60, 30, 30)


def settings(**changes):
    """Few steps, of a hub of four models."""
    trainer = {"steps": 40, "batch_size": 16, "eval_every": 10, "save_every": 10, "log_every": 10}
    trainer |= changes.pop("trainer", {})
    small = {"generator_width": 4, "generator_stride": 1, "trainer": trainer}
    return ShelfFitSettings.from_dict(small | changes)


def fit(shelf, out=None, resume=False, **changes):
    return shelf_fit(shelf.folder, settings(**changes), out, resume, QUIET)


def same_weights(one, other):
    first, second = one.model.state_dict(), other.model.state_dict()
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "shelf"
    return make_shelf(folder, 4, 3, SIZES, views=2)


@pytest.fixture(scope="module")
def fitted(shelf):
    return fit(shelf)


def test_what_is_written_is_what_the_opened_hub_says(shelf, fitted):
    result, summary = fitted
    hub = open_hub(shelf.folder)
    assert hub.folder == shelf.folder / "hub"
    assert hub.labels == ("model0", "model1", "model2", "model3")
    assert not hub.model.training
    assert read_result(hub.folder) == json.loads(json.dumps(summary))
    stored = load_file(hub.folder / "predictions.safetensors")
    for split in ("validation", "test"):
        numbers, targets = hub.shelf.splits[split], hub.shelf.targets[hub.shelf.splits[split]]
        with torch.no_grad():
            said = hub.model(numbers.double()).softmax(dim=1)
        torch.testing.assert_close(stored[split], said)
        right = (said.argmax(dim=1) == targets).double().mean().item()
        assert summary[f"{split}_accuracy"] == pytest.approx(right)
    assert summary["best_step"] == result.best_step
    assert summary["forwards"] == 2


def test_milliseconds_are_the_routers_and_those_of_the_experts_as_often_as_each_is_asked(fitted):
    _, summary = fitted
    shares = summary["routes"]["share"]
    assert sum(shares) == pytest.approx(2)
    own = [0.5 * (i + 1) for i in range(4)]
    bodies = sum(s * ms for s, ms in zip(shares, own, strict=True))
    assert summary["router_ms"] > 0
    assert summary["ms"] - summary["router_ms"] == pytest.approx(bodies)


def test_the_router_learns_which_model_knows_an_image(tmp_path):
    """Each model is blind to three images in four: one alone is right about half of them."""
    made = make_shelf(tmp_path / "s", 4, 3, (240, 60, 60))
    _, summary = fit(made, k=1, heads="fitted", trainer={"steps": 150})
    assert summary["test_accuracy"] > 0.85


def test_a_stopped_fit_goes_on_to_the_same_bits(shelf, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(shelf, whole)
    saved = Trainer._save

    def stop_after(self, name):
        saved(self, name)
        if name == "last" and self.state.step == 20:
            self.stop()

    monkeypatch.setattr(Trainer, "_save", stop_after)
    result, summary = fit(shelf, parts)
    assert result.interrupted
    assert summary == {}
    monkeypatch.undo()
    held = asked_settings(shelf.folder, {}, out=parts, resume=True)
    assert held == settings()
    shelf_fit(shelf.folder, held, parts, True, QUIET)
    assert same_weights(open_hub(whole), open_hub(parts))


def test_resuming_before_the_first_checkpoint_begins_again(shelf, tmp_path):
    whole, early = tmp_path / "whole", tmp_path / "early"
    fit(shelf, whole)
    early.mkdir()
    shutil.copy(whole / "hub.json", early)
    fit(shelf, early, resume=True)
    assert same_weights(open_hub(whole), open_hub(early))


def test_a_hub_is_not_written_over_and_not_resumed_with_other_settings(shelf, fitted):
    with pytest.raises(ValueError, match=r"--resume"):
        fit(shelf)
    with pytest.raises(ValueError, match=r"explore"):
        fit(shelf, resume=True, explore=0.7)


def test_experts_are_chosen_to_know_different_images(tmp_path):
    """Of six models each second is the twin of the one before: a set of three has no twins."""
    plain = make_shelf(tmp_path / "plain", 3, 3, SIZES)
    draw = torch.Generator().manual_seed(0)
    features = {}
    for i in range(3):
        own = plain.features(i)[0]
        features[f"model{i}"] = own
        features[f"twin{i}"] = own + 0.01 * torch.randn(own.shape, generator=draw)
    sizes = dict(zip(("train", "validation", "test"), SIZES, strict=True))
    pixels = plain.pixels()[0]
    made = write_shelf(tmp_path / "s", features, plain.targets, plain.classes, sizes, pixels)
    routed = choose_models(made, settings(experts="3", heads="fitted"))
    assert sorted(made.models[i].label[-1] for i in routed.models) == ["0", "1", "2"]
    assert list(routed.models) == sorted(routed.models)
    assert "3 of 6 models" in routed.reason
    for i, head in zip(routed.models, routed.heads, strict=True):
        assert head.weight.shape == (3, made.models[i].num_features)


def test_heads_start_fitted_where_that_is_asked_for_and_new_ones_need_no_fit(tmp_path):
    made = make_shelf(tmp_path / "s", 4, 3, SIZES)
    assert choose_models(made, settings()).heads is None
    assert not (made.folder / "heads").exists()
    still = {"steps": 1, "lr_head": 0.0, "lr_router": 0.0, "eval_every": 0, "weight_decay": 0.0}
    fit(made, heads="fitted", trainer=still)
    heads = fit_heads(made)
    for expert, head in zip(open_hub(made.folder).model.experts, heads, strict=True):
        assert torch.equal(expert.layer.weight, head.weight)
        assert torch.equal(expert.layer.bias, head.bias)


def test_the_watched_model_is_no_expert_and_its_forward_is_counted(shelf, tmp_path):
    out = tmp_path / "hub"
    _, summary = fit(shelf, out, router="features:model2")
    hub = open_hub(out)
    assert hub.labels == ("model0", "model1", "model3")
    assert hub.shelf.models[hub.watched].label == "model2"
    assert summary["forwards"] == 3
    own = [0.5, 1.0, 2.0]
    asked = sum(s * ms for s, ms in zip(summary["routes"]["share"], own, strict=True))
    assert summary["ms"] - summary["router_ms"] == pytest.approx(asked + 1.5)


def test_views_are_drawn_by_seed_and_step_and_evaluation_sees_the_first(shelf):
    stream = ShelfStream(shelf, 16, 3)
    batches = stream.batches()
    first, second = next(batches), next(batches)
    again = next(ShelfStream(shelf, 16, 3).batches(1))
    assert torch.equal(second[0], again[0])
    assert torch.equal(second[1], again[1])
    count = sum(SIZES)
    views = [batch[0].long() // count for batch in (first, second)]
    assert set(torch.cat(views).tolist()) == {0, 1}
    assert not torch.equal(*views)
    images = first[0].long() % count
    assert images.max() < SIZES[0]
    assert torch.equal(first[1], shelf.targets[images])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": "5"}, r"experts: expected a number in 1..4, the models of"),
        ({"experts": "1"}, r"k: expected an integer in 1..1, the experts that are routed, got 2"),
        ({"experts": "0"}, r"experts: expected a number of at least 1, or all"),
        ({"experts": "4", "router": "features:model1"}, r"beside the one that the router looks at"),
        ({"router": "features:modle1"}, r"did you mean model"),
        ({"router": "image:2"}, r"router: expected image or features:LABEL"),
        ({"k": 1, "renormalize": True}, r"renormalize: expected False with k=1"),
        ({"k": 1, "router_supervision": 1.0}, r"router_supervision: expected 0 with k=1"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_anything_is_written(
    shelf, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        fit(shelf, tmp_path / "hub", **changes)
    assert not (tmp_path / "hub").exists()


def test_too_few_images_and_a_single_model_are_refused(tmp_path):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    one = {"a": torch.randn(4, 2, generator=draw)}
    few = write_shelf(
        tmp_path / "few", one, torch.tensor([0, 1, 2, 3]), list("abcd"), {"train": 3, "test": 1},
        pixels,
    )  # fmt: skip
    with pytest.raises(ValueError, match="3 training images of 4 classes"):
        fit(few, k=1)
    single = write_shelf(
        tmp_path / "one", one, torch.tensor([0, 1, 0, 1]), list("ab"), {"train": 4}, pixels
    )
    with pytest.raises(ValueError, match=r"k: expected an integer in 1..1"):
        fit(single)


def test_a_loss_that_is_not_finite_stops_the_training(shelf, tmp_path):
    with pytest.raises(NonFiniteLoss):
        fit(shelf, tmp_path / "hub", trainer={"lr_head": 1e30, "optimizer": "sgd"})


def test_a_shelf_without_validation_images_is_fitted_to_the_last_step(tmp_path):
    made = make_shelf(tmp_path / "s", 4, 3, (60, 0, 30))
    _, summary = fit(made, experts="3", trainer={"lr_head": None})
    assert summary["best_step"] is None
    assert summary["weights"] == "last"
    assert "validation_accuracy" not in summary
    assert open_hub(made.folder).model.k == 2


def test_other_features_classes_and_broken_folders_are_refused(shelf, fitted, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(shelf.folder, moved)  # the hub lies in the shelf, and moves with it
    hub = open_hub(moved)
    assert hub.shelf.folder.resolve() == moved.resolve()
    with pytest.raises(ValueError, match="holds no hub of a shelf"):
        open_hub(tmp_path)
    record = json.loads((moved / "hub" / "hub.json").read_text())

    def write(**changes):
        (moved / "hub" / "hub.json").write_text(json.dumps(record | changes))

    models = [dict(each) for each in record["models"]]
    models[1]["key"] = "0" * 24
    write(models=models)
    with pytest.raises(ValueError, match=r"the features of model1 have changed"):
        open_hub(moved)
    models[1]["label"] = "gone"
    write(models=models)
    with pytest.raises(ValueError, match=r"has no features of gone"):
        open_hub(moved)
    write(classes=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"has other classes"):
        open_hub(moved)
    write(format=0)
    with pytest.raises(ValueError, match=r"hub.json is damaged .*format 0"):
        open_hub(moved)
    write()
    shutil.rmtree(moved / "hub" / "best")
    shutil.rmtree(moved / "hub" / "last")
    with pytest.raises(ValueError, match=r"has no checkpoint yet"):
        open_hub(moved)
    with pytest.raises(ValueError, match=r"is no shelf"):
        Shelf.open(tmp_path / "nowhere")


def test_accuracy_does_not_hang_on_float16(tmp_path):
    """Features of 11 bits: outputs move by about 2^-11 of themselves, so of 600 images only such
    change class whose first two logits are that close."""
    exact = make_shelf(tmp_path / "fp32", 4, 3, (240, 60, 600))
    half = make_shelf(tmp_path / "fp16", 4, 3, (240, 60, 600), dtype=torch.float16)
    slow = {"steps": 60, "lr_head": 1e-4, "lr_router": 1e-3}  # two trainings that stay together
    found = [fit(made, heads="fitted", trainer=slow)[1] for made in (exact, half)]
    found = [summary["test_accuracy"] for summary in found]
    assert abs(found[0] - found[1]) <= 0.003


def test_a_hub_can_be_built_of_models_of_ones_own_choice(shelf):
    model = build_hub(shelf, [3, 1], 1).eval()
    with torch.no_grad():
        assert model(torch.arange(5).double()).shape == (5, 3)
