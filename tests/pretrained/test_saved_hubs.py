"""What was saved is what is opened, to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from support.saved_hubs import (
    OTHER,
    OUTPUTS,
    SIZE,
    TINY,
    assert_same,
    hub,
    images,
    predictions,
    saved,
)
from torch import nn

import hubpath_fast as hp
from hubpath_fast.checkpoints import SavedModel
from hubpath_fast.model import RoutingPolicy, add_newcomer, describe
from hubpath_fast.tasks.landmarks.settings import LandmarkSettings

SWIN = "timm/swin_tiny_patch4_window7_224"  # computes buffers where its parameters are


def own_module() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, OUTPUTS))


class OwnGenerator(hp.PathwayGenerator):
    """No name says what a class of a user's own computes, whatever it is derived from."""

    def __init__(self):
        super().__init__(2, width=2)

    def forward(self, x):
        clean, noise = super().forward(x)
        return 2 * clean, noise


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ((TINY,) * 3, {}),
        ((TINY, OTHER, "timm/test_vit"), {"resize_to_native": True}),
        ((f"{TINY}?freeze=body", f"{OTHER}?freeze=all&lr=0.1"), {}),
        ((f"{TINY}?bn=running&size=48", f"{OTHER}?mean=0.1:0.2:0.3&std=0.5:0.6:0.7"), {}),
        (("torchvision/resnet18", "timm/test_nfnet"), {"k": 1}),
        ((TINY, OTHER), {"router": "expert:1"}),
        ((TINY, OTHER), {"router": "network:test_resnet"}),
        ((TINY, OTHER), {"router": "network:test_vit"}),  # works at its own 160 pixels
        ((TINY, OTHER), {"aggregator": hp.MLPAggregator(2, OUTPUTS, hidden=5)}),
        ((TINY, OTHER), {"aggregator": hp.SumAggregator(2, OUTPUTS)}),
        ((TINY, OTHER), {"renormalize": True, "min_group": 3}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (tuple, dict)) else None,
)
def test_a_hub_of_names_comes_back(names, options, tmp_path):
    model = hub(names, **options)
    opened = hp.from_pretrained(saved(model, tmp_path / "hub"))
    assert_same(opened, model)
    assert describe(opened) == describe(model)


def test_parts_that_were_frozen_or_freed_by_hand_come_back_so(tmp_path):
    model = hub((TINY, f"{OTHER}?freeze=body"))
    model.experts[0].conv1.requires_grad_(False)
    model.experts[1].requires_grad_(True)
    model.generator.requires_grad_(False)
    opened = hp.from_pretrained(saved(model, tmp_path / "hub"))
    flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (model, opened)]
    assert flags[0] == flags[1]
    assert len({*flags[0].values()}) == 2


def test_parts_of_mixed_precision_come_back_tensor_by_tensor(tmp_path):
    model = hub()
    model.experts[0].to(torch.bfloat16)
    for layer in model.experts[0].modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.float()
    opened = hp.from_pretrained(saved(model, tmp_path / "hub"))
    state, found = model.state_dict(), opened.state_dict()
    assert [t.dtype for t in found.values()] == [t.dtype for t in state.values()]
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_what_is_opened_in_inference_mode_can_be_trained(tmp_path):
    folder = saved(hub(), tmp_path / "hub")
    with torch.inference_mode():
        opened = hp.from_pretrained(folder)
    opened(images()).sum().backward()
    assert opened.aggregator.weight.grad is not None


def test_a_policy_of_another_hub_is_not_saved(tmp_path):
    model = hub((TINY, OTHER, TINY), k=1)
    model.policy = RoutingPolicy(penalty=[0.0, 0.0, 1.0])
    model.remove_expert(2)
    with pytest.raises(ValueError, match="penalty: expected 2 numbers"):
        model.save_pretrained(tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_channels_last_comes_back(tmp_path):
    model = hub().to(memory_format=torch.channels_last)
    assert_same(hp.from_pretrained(saved(model, tmp_path / "hub")), model)


def test_double_precision_comes_back(tmp_path):
    model = hub().double()
    opened = hp.from_pretrained(saved(model, tmp_path / "hub"))
    x = images().double() / 255
    assert opened(x).dtype == torch.float64
    assert torch.equal(opened(x), model(x))


def test_an_architecture_that_computes_with_its_parameters_comes_back(tmp_path):
    model = hub((SWIN, TINY), resize_to_native=True)
    assert_same(hp.from_pretrained(saved(model, tmp_path / "hub")), model)


def test_fixed_routes_come_back(tmp_path):
    model = hub()
    model.generator = hp.FixedRoutes([1, 0], [0.25, 0.5], 2)
    opened = hp.from_pretrained(saved(model, tmp_path / "hub"))
    assert_same(opened, model)
    assert opened.generator.experts == (0, 1)


def test_a_policy_comes_back(tmp_path):
    model = hub()
    with torch.no_grad():
        model.generator.clean.bias.copy_(torch.tensor([2.0, 0.0]))
    model.policy = RoutingPolicy(top_mass=0.6, penalty=(0.5, 0.25), k=2)
    opened = hp.from_pretrained(saved(model, tmp_path / "hub"))
    assert opened.policy == model.policy
    assert_same(opened, model)
    opened.policy = None
    assert not torch.equal(predictions(opened), predictions(model))


@pytest.mark.parametrize("router", ["image", "expert:0", "network:test_resnet"])
def test_newcomers_come_back(router, tmp_path):
    model = hub(router=router)
    add_newcomer(model, own_module(), [0.5] * 3, [0.5] * 3)
    with torch.no_grad():
        model.generator.clean[-1].bias.fill_(3.0)
    opened = hp.from_pretrained(saved(model, tmp_path / "hub"), modules={2: own_module()})
    assert_same(opened, model)


def test_a_hub_after_experts_came_and_went_comes_back(tmp_path):
    model = hub((TINY, OTHER, TINY))
    model.remove_expert(0)
    model.add_expert(own_module(), [0.5] * 3, [0.5] * 3)
    opened = hp.from_pretrained(saved(model, tmp_path / "hub"), modules={2: own_module()})
    assert_same(opened, model)


def test_a_landmark_hub_comes_back(tmp_path):
    from hubpath_fast.runs.build import describe_task
    from hubpath_fast.runs.config import LANDMARKS, FitConfig
    from hubpath_fast.runs.kinds import kind_of

    settings = LandmarkSettings(head_width=16, unit="0-1")
    fields = {"data": "faces.csv", "hub": (TINY, OTHER), "image_size": SIZE}
    config = FitConfig(task=LANDMARKS, landmarks=settings, **fields)
    task = kind_of(config).saved_task(config, {"landmarks": ["left", "right", "nose"]})
    model = hub(task=task)
    model.origin = model.origin.with_task(describe_task(config, task))
    opened = hp.from_pretrained(saved(model, tmp_path / "hub"))
    assert_same(opened, model)
    assert predictions(opened).shape == (6, 3, SIZE // 4, SIZE // 4)
    read = json.loads((tmp_path / "hub" / "config.json").read_text())["preprocessing"]
    assert "face" in read["crop"]


def test_modules_of_ones_own_get_their_weights_and_stay_the_objects_they_were(tmp_path):
    shared = own_module()
    images_of = torch.rand(2, 3), torch.rand(2, 3) + 0.5
    model = hp.HubPathway(
        [shared, shared], OwnGenerator(), nn.Linear(2 * OUTPUTS, OUTPUTS), num_outputs=OUTPUTS,
        normalization=images_of,
    ).eval()  # fmt: skip
    folder = saved(model, tmp_path / "hub")
    assert describe(model)["generator"] == {"kind": "module", "module": "OwnGenerator"}
    mine, aggregator = own_module(), nn.Linear(2 * OUTPUTS, OUTPUTS)
    modules = {0: mine, 1: mine, "generator": OwnGenerator(), "aggregator": aggregator}
    opened = hp.from_pretrained(folder, modules=modules)
    assert_same(opened, model)
    assert opened.experts[0] is opened.experts[1] is mine
    assert opened.aggregator is aggregator
    assert torch.equal(aggregator.weight, model.aggregator.weight)


def test_a_hub_comes_back_after_training_steps_and_its_file_stays_as_it_was(tmp_path):
    model = hub((TINY, f"{OTHER}?freeze=body"))

    def train(trained):
        trained.train()
        learned = [p for p in trained.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learned, lr=0.01, momentum=0.9)
        torch.manual_seed(0)
        for seed in range(2):
            out = trained(images(seed=seed))
            loss = hp.HubPathwayLoss()(out, torch.arange(6) % OUTPUTS).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return trained.eval()

    folder = saved(train(model), tmp_path / "hub")
    opened = hp.from_pretrained(folder)
    assert_same(opened, model)
    assert_same(train(opened), train(model))  # the mapped weights learn as any others
    SavedModel(folder).verify()


def test_opening_draws_no_random_numbers(tmp_path):
    folder = saved(hub(router="network:test_resnet"), tmp_path / "hub")
    before = torch.get_rng_state()
    hp.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_again_replaces_the_folder(tmp_path):
    folder = saved(hub(), tmp_path / "hub")
    model = hub((TINY,) * 3, seed=1)
    assert_same(hp.from_pretrained(saved(model, folder)), model)
    assert len(list((folder / "experts").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_the_folder_says_what_its_images_and_classes_are(tmp_path):
    model = hub()
    folder = saved(model, tmp_path / "hub", classes=["a", "b", "c"])
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["task"] == {"name": "classification", "classes": ["a", "b", "c"]}
    assert model.origin.task["classes"] == ["a", "b", "c"]
    expected = {"input_size": 64, "resize": [73, 73], "center_crop": 64, "channels": "RGB"}
    assert config["preprocessing"].items() >= expected.items()
    assert hp.from_pretrained(folder).origin.task == model.origin.task


@pytest.mark.parametrize("which", [1, -1, "test_efficientnet"])
def test_one_expert_is_opened_by_number_or_label(which, tmp_path):
    model = hub()
    expert = hp.load_expert(saved(model, tmp_path / "hub"), which)
    x = images().float() / 255
    with torch.no_grad():
        assert torch.equal(expert(x), model.experts[1](x))
    assert not expert.training


def test_one_expert_needs_its_own_file_alone(tmp_path):
    model = hub((TINY, OTHER, TINY))
    folder = saved(model, tmp_path / "hub")
    for file in folder.rglob("*.safetensors"):
        if not file.name.startswith("01-"):
            file.unlink()
    x = images().float() / 255
    with torch.no_grad():
        assert torch.equal(hp.load_expert(folder, 1)(x), model.experts[1](x))


def test_one_expert_of_those_that_share_a_module_needs_the_file_of_the_first(tmp_path):
    model = hub((TINY, TINY, OTHER))
    model.experts[1] = model.experts[0]
    folder = saved(model, tmp_path / "hub")
    (folder / "experts" / "02-test_efficientnet.safetensors").unlink()
    x = images().float() / 255
    with torch.no_grad():
        assert torch.equal(hp.load_expert(folder, 1)(x), model.experts[1](x))


def test_a_network_of_a_folder_is_built_without_it(tmp_path):
    import timm

    network = timm.create_model("test_resnet", num_classes=5)
    timm.models.save_for_hf(network, tmp_path / "bird")
    model = hub((f"local-dir:{tmp_path}/bird", TINY))
    assert model.origin.experts[0].config is not None
    folder = saved(model, tmp_path / "hub")
    for path in (tmp_path / "bird").iterdir():
        path.unlink()
    assert_same(hp.from_pretrained(folder), model)
