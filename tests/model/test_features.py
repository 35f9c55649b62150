"""A model without its bodies equals the model whose bodies stand still."""

from __future__ import annotations

import pytest
import timm
import torch
from support.images import RandomImages
from support.models import C, M, conv_expert
from torch import nn

import hubpath_fast as hp
from hubpath_fast.baselines import Noiseless, RandomGenerator, SingleModel, TaskGenerator
from hubpath_fast.hub import build_experts
from hubpath_fast.model.features import OnFeatures

CPU, N = torch.device("cpu"), 14


def images(n=N, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8, generator=random)
    return x, torch.randint(C, (n,), generator=random)


def routed(stride=2):
    """A Hub-Pathway in float64 whose experts' statistics are not those that they start with."""
    torch.manual_seed(0)
    norm = torch.rand(M, 3), torch.rand(M, 3) + 0.5
    generator = hp.PathwayGenerator(M, width=4, stride=stride)
    nn.init.normal_(generator.clean.weight)
    model = hp.HubPathway([conv_expert() for _ in range(M)], generator, k=2, normalization=norm)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    for expert in model.experts:
        expert.head_layers = ("6",)
    return model.double()


def batches(x, y, sizes):
    return zip(x.split(sizes), y.split(sizes), strict=True)


def losses(model, x, y, eps):
    return hp.HubPathwayLoss(explore=0.7)(model(x, eps, target=y), y)


@pytest.mark.parametrize("stride", [1, 2])  # 1: the router sees the images, which stay bytes
def test_outputs_losses_and_gradients_are_those_of_the_model_with_frozen_bodies(stride):
    x, y = images()
    model = routed(stride)
    phase = OnFeatures(model)
    told = []
    # Batches of 5, 5 and 4: the last is smaller.
    targets = phase.keep(batches(x, y, 5), N, CPU, room=told.append)
    assert torch.equal(targets, y)
    router = 3 * 8 * 8 if stride == 1 else 3 * 4 * 4 * 8
    assert told == [N * (M * 32 * 8 + router)]
    assert model.training
    numbers = torch.tensor([3, 0, 13, 7, 7, 9, 1, 12])  # in any order, one twice
    eps = torch.randn(len(numbers), M, dtype=torch.float64)
    model.experts.eval()
    whole = losses(model, x[numbers], y[numbers], eps)
    whole.total.backward()
    parts = [*model.generator.parameters(), *model.aggregator.parameters()]
    parts += [p for expert in model.experts for p in expert[6].parameters()]
    expected = [p.grad for p in parts]
    assert sum(gradient is None for gradient in expected) < 4  # an expert may have no rows
    model.zero_grad(set_to_none=True)
    for layer in model.generator.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    model.train()
    ours = losses(phase.trained, numbers.double(), y[numbers], eps)
    ours.total.backward()
    # Normalising by products or quotients, and sums of other batches: a few roundings of float64.
    for name in ("total", "task", "explore", "exploit"):
        torch.testing.assert_close(getattr(ours, name), getattr(whole, name), rtol=0, atol=1e-11)
    for p, gradient in zip(parts, expected, strict=True):
        if gradient is None:
            assert p.grad is None
            continue
        torch.testing.assert_close(p.grad, gradient, rtol=0, atol=1e-11)
    bodies = [p for expert in model.experts for p in expert[:6].parameters()]
    assert all(p.grad is None for p in bodies)
    trained = {id(p) for p in phase.trained.parameters()}
    assert trained == {id(p) for p in parts}


def test_looking_at_images_changes_nothing_and_needs_no_gradient():
    x, y = images()
    model = routed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    phase = OnFeatures(model)
    phase.keep(batches(x, y, 5), N, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert not any(head.kept.requires_grad for head in phase.heads)
    kept = [name for name in phase.trained.state_dict() if "kept" in name]
    assert kept == []  # checkpoints are without features


@pytest.mark.parametrize(
    "make", [lambda m: RandomGenerator(M, 2), lambda m: TaskGenerator(M), lambda m: nn.Identity()]
)
def test_nothing_is_kept_for_a_router_that_looks_at_nothing(make):
    x, y = images()
    model = routed()
    model.generator = make(model)
    phase = OnFeatures(model)
    phase.keep(batches(x, y, 5), N, CPU)
    if phase.generator.split:
        assert phase.generator.kept.shape == (N, 0)
        scores = phase.generator(torch.arange(5.0))
        assert [s.shape for s in scores] == [(5, M), (5, M)]
    else:
        assert torch.equal(phase.generator.kept, x)  # of one that says nothing of itself, all


def test_a_generator_without_noise_is_that_generator_without_noise():
    x, y = images()
    model = routed()
    clean, _ = model.generator.eval()(x.double() / 255)
    model.generator = Noiseless(model.generator)
    phase = OnFeatures(model)
    phase.keep(batches(x, y, 5), N, CPU)
    found, noise = phase.generator.eval()(torch.arange(N).double())
    torch.testing.assert_close(found, clean, rtol=0, atol=1e-12)
    assert (noise == -1e4).all()


@pytest.mark.parametrize("router", ["expert:1", "network:test_vit"])
@pytest.mark.parametrize("wrap", [lambda generator: generator, Noiseless])
def test_of_a_router_on_features_these_are_kept(router, wrap):
    hub = ["test_resnet", "test_efficientnet"]
    torch.manual_seed(0)
    model = hp.create_model(hub, C, k=1, pretrained=False, input_size=32, router=router).double()
    for head in (model.generator.clean, model.generator.noise):
        nn.init.normal_(head.weight)
    x = torch.randint(256, (N, 3, 32, 32), dtype=torch.uint8)
    wanted = wrap(model.generator).eval()(x.double() / 255)
    features = model.generator.num_features
    model.generator = wrap(model.generator)
    phase = OnFeatures(model)
    phase.keep(batches(x, torch.zeros(N).long(), 5), N, CPU)
    assert phase.generator.kept.shape == (N, features)  # no image, so no body runs in a step
    # Of other batches: a few roundings of float64.
    for found, expected in zip(phase.generator(torch.arange(N).double()), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_fixed_routes_are_refused():
    model = routed()
    model.generator = hp.FixedRoutes([0, 1], [0.5, 0.25], M)
    with pytest.raises(ValueError, match="warm_up: expected a router to train, got fixed routes"):
        OnFeatures(model)


NETWORKS = [
    # pooled, then a linear head; a token; a norm between pooling and head; an activation there
    "test_resnet", "test_vit", "test_convnext", "test_efficientnet", "mobilenetv3_small_050",
    "test_nfnet", "test_byobnet", "resnetv2_18",  # a 1 x 1 convolution, flattened after it
    "test_resnet?size=64", "test_resnet?bn=running", "test_resnet?freeze=all",
    "torchvision/mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5",
]  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_networks_of_both_libraries(name, amp):
    [expert] = build_experts([name], 7, pretrained=False, input_size=32)
    model = SingleModel(expert)
    x, y = RandomImages(6, 32).batch(0)
    phase = OnFeatures(model, ["it"])
    phase.keep(batches(x, y, 6), 6, CPU, amp)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
        assert torch.equal(phase.trained(torch.arange(6).double()), model(x))


def test_timms_convolutional_head_is_one():
    [expert] = build_experts(["resnetv2_18"], 7, pretrained=False, input_size=32)
    assert isinstance(OnFeatures(SingleModel(expert)).trained.layer, nn.Conv2d)


class Scaled(nn.Module):
    def __init__(self, calls=1):
        super().__init__()
        self.head, self.calls = nn.Linear(3, C), calls

    def forward(self, x):
        for _ in range(self.calls):
            out = self.head(x.mean(dim=(2, 3)))
        return out if self.calls > 1 else out.relu_()


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32), "it has 2 hea"),
        (lambda: nn.Sequential(nn.Conv2d(3, C, 3), nn.AdaptiveAvgPool2d(1)), "it has no head"),
        (Scaled, "its outputs are not those of its head"),
        (lambda: Scaled(2), "its head is called 2 times for an image"),
    ],
)
def test_a_network_that_cannot_be_split_is_refused_by_its_name(network, reason):
    x, y = RandomImages(6, 32).batch(0)
    with pytest.raises(ValueError, match=f"one head, but of my net {reason}"):
        OnFeatures(network(), ["my net"]).keep(batches(x / 255 - 0.5, y, 6), 6, CPU)
