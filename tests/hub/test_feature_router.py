"""A router that looks at the features of an expert, or of a frozen network of its own."""

from __future__ import annotations

import copy
import io
import json
import re

import pytest
import torch
import torch.nn.functional as F
from support.command import hubpath, refused
from torch import nn

import hubpath_fast as hp
from hubpath_fast.baselines.costs import inference_costs
from hubpath_fast.hub import HubError, build_experts
from hubpath_fast.model import FeatureGenerator
from hubpath_fast.runs.folder import RunFolder, open_run
from hubpath_fast.training import TrainerConfig
from hubpath_fast.training.optimizer import build_optimizer, pathway_groups

HUB = ["test_resnet?size=64", "test_efficientnet", "test_vit"]
SIZE, N = 32, 6


class Plain(nn.Module):
    """A module of a user's own, which ends with its head."""

    def __init__(self, channels: int = 5):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU())
        self.fc = nn.Linear(channels, 10)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


class Headless(Plain):
    """Goes on after its head, so that it cannot be split."""

    def forward(self, x):
        return super().forward(x) * 2


def build(router: str, hub=HUB, **options) -> hp.HubPathway:
    torch.manual_seed(0)
    model = hp.create_model(
        hub, 10, k=options.pop("k", 2), pretrained=False, input_size=SIZE, router=router, **options
    )
    generator = model.generator
    for head in (generator.clean, generator.noise):  # both start with zeros
        nn.init.normal_(head.weight, std=0.3)
    return model


def images(dtype=torch.uint8) -> torch.Tensor:
    torch.manual_seed(1)
    drawn = torch.randint(0, 256, (N, 3, SIZE, SIZE), dtype=torch.uint8)
    return drawn if dtype == torch.uint8 else drawn.to(dtype) / 255


def plain_features(module: nn.Module, x: torch.Tensor, mean, std) -> torch.Tensor:
    """What the input of the classifier is, in the plainest way: as a hook sees it."""
    seen = []
    head = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
    handle = head.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    # A model keeps both in float32.
    mean, std = (torch.tensor(v).to(x.dtype).view(1, 3, 1, 1) for v in (mean, std))
    with torch.no_grad():
        modes = [(m, m.training) for m in module.modules()]
        module.eval()
        module((x - mean) / std)
        for m, mode in modes:
            m.training = mode
    handle.remove()
    return seen[0]


# Of an expert that resizes inside, one that pools maps, one of tokens; by number and by names.
@pytest.mark.parametrize(
    ("router", "index"),
    [("expert:0", 0), ("expert:test_efficientnet", 1), ("expert:timm/test_vit.r160_in1k", 2)],
)
def test_scores_are_two_linear_heads_on_normalised_features(router, index):
    model = build(router).double().train()
    experts = build_experts(HUB, 10, False, SIZE)
    x = images(torch.float64)
    features = plain_features(model.experts[index], x, experts[index].mean, experts[index].std)
    wanted = F.layer_norm(features, features.shape[1:])
    generator = model.generator
    for head, scores in zip((generator.clean, generator.noise), generator(x), strict=True):
        torch.testing.assert_close(scores, F.linear(wanted, head.weight, head.bias))
    assert generator.num_features == features.shape[1]
    # Each layer is in its own mode again.
    assert all(part.training for part in model.experts[index].modules())


def test_a_frozen_network_of_its_own_scores_alike():
    model = build("network:test_resnet?size=64").double().train()
    [network] = build_experts(["test_resnet?size=64"], 1, False, SIZE)
    x = images(torch.float64)
    features = plain_features(model.generator.network, x, network.mean, network.std)
    wanted = F.linear(
        F.layer_norm(features, features.shape[1:]),
        model.generator.clean.weight,
        model.generator.clean.bias,
    )
    torch.testing.assert_close(model.generator(x)[0], wanted)
    assert not any(part.training for part in model.generator.network.modules())
    assert not any(p.requires_grad for p in model.generator.network.parameters())
    assert model.generator.network is not model.experts[0]


def losses_of(model: hp.HubPathway):
    torch.manual_seed(2)
    output = model.train()(images(torch.float32))
    return hp.HubPathwayLoss(explore=1.0)(output, torch.arange(N))


def test_the_routers_losses_reach_no_expert_through_its_features():
    model = build("expert:1")
    losses_of(model).explore.backward()
    assert all(p.grad is None for p in model.experts.parameters())
    assert all(p.grad is not None for p in model.generator.parameters())


@pytest.mark.parametrize("amp", [False, True])
def test_an_expert_learns_as_much_as_without_being_looked_at(amp):
    """Under autocast, too, which keeps casts of weights: those made without gradients as well."""

    def gradients(model: hp.HubPathway) -> list[torch.Tensor]:
        x, y = images(torch.float32), torch.arange(N)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            routing = hp.functional.noisy_topk(torch.eye(N, 3), torch.zeros(N, 3), 2)
            if model is looked:
                model.generator(x)
            output = model.train()(x, routing=routing)
            hp.HubPathwayLoss()(output, y).exploit.backward()
        return [p.grad for p in model.experts.parameters()]

    looked = build("expert:1", executor="sequential")
    alone = copy.deepcopy(looked)
    pairs = list(zip(gradients(looked), gradients(alone), strict=True))
    assert sum(a is not None for a, _ in pairs) > 20
    assert all(a is b if b is None else torch.equal(a, b) for a, b in pairs)


def test_looking_moves_no_statistics_and_draws_nothing():
    model = build("expert:0").train()
    before = copy.deepcopy(model.experts.state_dict())
    x = images(torch.float32)
    state = torch.get_rng_state()
    model.generator(x)
    assert torch.equal(torch.get_rng_state(), state)
    after = model.experts.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_expert_is_a_part_once():
    model, plain = build("expert:1"), build("image")
    own = {name for name in model.state_dict() if name.startswith("generator.")}
    heads = {f"generator.{p}.{w}" for p in ("norm", "clean", "noise") for w in ("weight", "bias")}
    assert own == heads
    assert {n for n in model.state_dict() if n not in own} == {
        n for n in plain.state_dict() if not n.startswith("generator.")
    }
    groups = pathway_groups(model, TrainerConfig(steps=10))
    [router] = [group for group in groups if group.name == "router"]
    assert len(router.params) == len(heads) + 2  # and the aggregator's
    build_optimizer(model, groups, TrainerConfig(steps=10))  # each in one group
    network = build("network:test_vit")
    optimizer = build_optimizer(
        network, pathway_groups(network, TrainerConfig(steps=10)), TrainerConfig(steps=10)
    )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not any(id(p) in trained for p in network.generator.network.parameters())
    assert all(id(p) in trained for p in network.generator.clean.parameters())


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("twin_of", [copied, pickled])
@pytest.mark.parametrize("router", ["expert:1", "network:test_vit"])
def test_a_copy_looks_at_its_own_expert(router, twin_of):
    model = build(router).eval()
    twin = twin_of(model)
    x = images()
    assert torch.equal(twin(x), model(x))
    if router == "expert:1":
        assert twin.generator.always_on is twin.experts[1]
        assert twin.generator.always_on is not model.experts[1]
    else:
        assert twin.generator.source.module is twin.generator.network


def test_it_follows_the_expert():
    model = build("expert:1").eval()
    x = images(torch.float32)
    before = model.generator(x)[0]
    with torch.no_grad():
        for p in model.experts[1].parameters():
            p.mul_(1.1)
    assert not torch.allclose(model.generator(x)[0], before)
    other = build("expert:1")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model(x))


def test_the_cheapest_expert_is_the_one_of_fewest_flops():
    dear, cheap = Plain(64), Plain(4)
    model = hp.create_model([dear, cheap, Plain(16)], 10, k=1, input_size=SIZE, router="expert")
    assert model.generator.always_on is cheap


def test_any_module_is_taken_as_it_is():
    own = hp.PathwayGenerator(3, width=2)
    model = hp.create_model(HUB, 10, pretrained=False, input_size=SIZE, generator=own)
    assert model.generator is own


@pytest.mark.parametrize("executor", ["sequential", "threads"])
def test_executors_agree(executor):
    model = build("expert:0", executor=executor)
    wanted = build("expert:0", executor="sequential")
    assert torch.equal(model.eval()(images()), wanted.eval()(images()))
    losses = losses_of(model)
    losses.total.backward()
    expected = losses_of(wanted)
    expected.total.backward()
    assert torch.equal(losses.total, expected.total)


def test_its_forward_is_counted():
    model = build("expert:0", hub=["test_resnet"] * 3)
    costs = inference_costs(model, images())
    assert costs["forwards_per_sample"] == 3  # K and one
    assert costs["router_share"] == pytest.approx(0.5, abs=1e-3)
    own = inference_costs(build("network:test_resnet", hub=["test_resnet"] * 3), images())
    assert own["forwards_per_sample"] == 2
    assert own["router_share"] == pytest.approx(0.5, abs=1e-3)
    assert own["gflops_per_sample"] == pytest.approx(costs["gflops_per_sample"], rel=1e-9)


def test_experts_come_and_go_but_not_the_one_that_is_looked_at():
    model = build("expert:1", k=1).eval()
    x = images()
    with pytest.raises(ValueError, match=r"index: the router looks at the features of expert 1 \("):
        model.remove_expert(1)
    scores = model.generator(images(torch.float32))[0]
    model.remove_expert(0)
    torch.testing.assert_close(model.generator(images(torch.float32))[0], scores[:, 1:])
    with pytest.raises(ValueError, match="the router looks at the features of expert 0"):
        model.remove_expert(0)
    [more] = build_experts(["test_byobnet"], 10, False, SIZE)
    model.add_expert(more.module, more.mean, more.std)
    assert model(x).shape == (N, 10)
    assert model.generator(images(torch.float32))[0].shape == (N, 3)


BAD = [
    ("expret:0", ValueError, r"router: expected image, expert, .*got 'expret:0'; did you mean exp"),
    ("network", ValueError, "router: expected image, expert, expert:NAME or network:NAME, got 'n"),
    ("expert:", ValueError, "got 'expert:'"),
    ("expert:3", HubError, r"router: expected an expert, 0\.\.2, got expert:3"),
    (
        "expert:test_effnet",
        HubError,
        "no expert of the hub is called 'test_effnet'; did you mean t",
    ),
    ("network:test_resnte", HubError, "router: .*test_resnte.*test_resnet"),
]


@pytest.mark.parametrize(("router", "kind", "message"), BAD)
def test_what_is_wrong_is_said(router, kind, message):
    with pytest.raises(kind, match=message):
        build(router)


def test_an_expert_without_features_is_named_before_training():
    experts = [Plain(), Headless()]
    with pytest.raises(HubError) as caught:
        hp.create_model(experts, 10, k=1, input_size=SIZE, router="expert:Headless")
    assert str(caught.value) == (
        "router: expert:Headless asks Headless for features, and it has none (its head is not its "
        "last layer, and it lacks timm's forward_features); take another expert (Plain), "
        "network:NAME or image"
    )
    # One that ends with its head has.
    model = hp.create_model(experts, 10, k=1, input_size=SIZE, router="expert:Plain")
    assert model.generator.num_features == 5


def test_two_of_one_name_need_a_number():
    with pytest.raises(HubError, match=r"'test_resnet' are the experts 0, 1 of the hub; give one"):
        build("expert:test_resnet", hub=["test_resnet"] * 2)
    model = build("expert:test_resnet #2", hub=["test_resnet"] * 2)
    assert model.generator.always_on is model.experts[1]


@pytest.mark.parametrize("router", ["expert", "network:test_vit"])
def test_a_run_is_resumed_reopened_and_evaluated(router, tmp_path):
    arguments = [
        "fit", "--dataset", "digits", "--hub", "test_resnet,test_efficientnet", "--no-pretrained",
        "--image-size", 32, "--workers", 0, "--steps", 4, "--eval-every", 4, "--save-every", 2,
        "--set", f"router={router}",
    ]  # fmt: skip
    said = hubpath(*arguments, "--out", tmp_path / "run").output
    assert re.search(r"router: linear heads on the features of timm/test_(eff|vit)", said)
    config = RunFolder(tmp_path / "run").record().config
    assert config.router == ("expert:1" if router == "expert" else router)
    whole = json.loads((tmp_path / "run" / "result.json").read_text())
    assert hubpath("evaluate", tmp_path / "run").output
    opened = open_run(tmp_path / "run").model
    assert isinstance(opened.generator, FeatureGenerator)
    again = hubpath(*arguments, "--resume", "--out", tmp_path / "run").output
    assert again
    assert (
        json.loads((tmp_path / "run" / "result.json").read_text())["test_loss"]
        == whole["test_loss"]
    )


def test_a_wrong_router_is_refused_before_training(tmp_path):
    said = refused(
        "fit", "--dataset", "digits", "--hub", "test_resnet,test_efficientnet", "--no-pretrained",
        "--image-size", 32, "--set", "router=expert:test_resnat", "--out", tmp_path / "run",
    )  # fmt: skip
    assert "no expert of the hub is called 'test_resnat'; did you mean test_resnet or" in said
    assert not (tmp_path / "run" / "fit.json").exists()


def test_a_text_in_the_generators_place_is_a_router():
    model = hp.create_model(HUB, 10, pretrained=False, input_size=SIZE, generator="expert:0")
    same = hp.create_model(HUB, 10, pretrained=False, input_size=SIZE, router="expert:0")
    assert type(model.generator) is type(same.generator) is hp.model.FeatureGenerator
    with pytest.raises(ValueError, match="router"):
        hp.create_model(HUB, 10, pretrained=False, input_size=SIZE, generator="expret:0")
