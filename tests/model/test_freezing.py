"""Freezing: predictions stay, only true pairs are folded, and training is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from support.graphs import FakeBackend
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors.graphs import GraphsExecutor
from hubpath_fast.model.folding import find_foldable, is_norm
from hubpath_fast.model.newcomers import add_newcomer

S = 16
# Of the largest output, in float64: a convolution's weights are rounded once more for each fold.
SHARP = 1e-12


def block(channels=6):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(True),
        nn.Conv2d(channels, 8, 3, groups=2, stride=2), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


@torch.no_grad()
def used(network: nn.Module) -> nn.Module:
    """With statistics and weights as of a network that was trained: folding nothing would show."""
    random = torch.Generator().manual_seed(1)
    for layer in filter(is_norm, network.modules()):
        for name, low, high in (("running_mean", -0.5, 0.5), ("running_var", 0.5, 2.0),
                                ("weight", 0.5, 1.5), ("bias", -0.5, 0.5)):  # fmt: skip
            value = getattr(layer, name)
            if value is not None:
                value.copy_(torch.rand(value.shape, generator=random) * (high - low) + low)
    return network.eval()


def fold(network, x, shared=lambda part: False):
    """(what was found, the largest change of the output over the largest output)"""
    network, x = used(network).double(), x.double()
    with torch.no_grad():
        before = network(x)
        found = find_foldable(network, lambda: network(x), shared).fold()
        after = network(x)
    return found, float((after - before).abs().max() / before.abs().max())


def norms(network):
    return sum(map(is_norm, network.modules()))


def hub(executor="auto", m=3):
    torch.manual_seed(0)
    normalization = torch.rand(m, 3), torch.rand(m, 3) + 0.1
    model = hp.HubPathway([block() for _ in range(m)], hp.PathwayGenerator(m, width=4), k=2,
                          normalization=normalization, executor=executor)  # fmt: skip
    nn.init.normal_(model.generator.clean.weight, std=2.0)
    return used(model)


def images(n=6):
    random = torch.Generator().manual_seed(3)
    return torch.randint(256, (n, 3, S, S), dtype=torch.uint8, generator=random)


def test_every_pair_is_folded_and_the_output_is_the_same():
    network = block()
    found, change = fold(network, torch.randn(2, 3, S, S))
    assert (found.folded, found.left, norms(network)) == (2, {}, 0)
    assert change < SHARP


@pytest.mark.parametrize(
    "name", ["test_efficientnet", "test_byobnet", "test_resnet", "resnetv2_50"]
)
def test_networks_of_timm_with_their_activations_inside(name):
    import timm

    size = 96 if name.startswith("test") else 64
    network = timm.create_model(name, num_classes=4)
    count = norms(network)
    found, change = fold(network, torch.randn(1, 3, size, size))
    assert found.folded + len(found.left) == count
    assert found.folded >= 13
    assert change < SHARP


def test_frozen_batch_norm_of_torchvision():
    from torchvision.ops import FrozenBatchNorm2d

    network = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.Flatten())
    found, change = fold(network, torch.randn(2, 3, S, S))
    assert found.folded == 1
    assert change < SHARP


class Wired(nn.Module):
    """A convolution and a BatchNorm, joined as a test says."""

    def __init__(self, join, conv=None, norm=None):
        super().__init__()
        self.conv, self.norm = conv or nn.Conv2d(3, 3, 3, padding=1), norm or nn.BatchNorm2d(3)
        self.join = join

    def forward(self, x):
        return self.join(self, x)


def twice_read(part, x):
    y = part.conv(x)
    return part.norm(y) + 1e-9 * y  # too little to be seen in any comparison of outputs


def before_it(part, x):
    y = part.conv(x)
    return y.mean() * 0 + part.norm(y)


def between(part, x):
    return part.norm(part.conv(x) * 1.0)


def twice_called(part, x):
    return part.norm(part.conv(part.norm(part.conv(x))))


def one_conv_two_norms(part, x):
    y = part.conv(x)
    return part.norm(y) + part.norm(y)


def first(part, x):
    return part.conv(part.norm(x))


class Standardised(nn.Conv2d):
    """Its weights are not those that it uses."""

    def forward(self, x):
        weight = self.weight - self.weight.mean()
        return nn.functional.conv2d(x, weight, self.bias, padding=1)


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (Wired(twice_read), "other readers"),
        (Wired(before_it), "other readers"),
        (Wired(between), "does not follow"),
        (Wired(first), "does not follow"),
        (Wired(twice_called), "several times"),
        (Wired(one_conv_two_norms), "several times"),
        (Wired(lambda part, x: part.norm(part.conv(x)), Standardised(3, 3, 3)), "something else"),
        (Wired(lambda part, x: part.conv(x)), "not called"),
        (
            Wired(lambda part, x: part.norm(part.conv(x)) * part.norm.running_mean.mean()),
            "fails: AttributeError",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_told_stays(network, why):
    found, change = fold(network, torch.randn(2, 3, S, S))
    assert found.folded == 0
    assert why in found.left["norm"]
    assert change == 0
    assert isinstance(network.norm, nn.BatchNorm2d)


def test_what_has_hooks_or_another_place_stays():
    network = block()
    network[1].register_forward_hook(lambda *_: None)
    found, _ = fold(network, torch.randn(2, 3, S, S), lambda part: part is network[3])
    assert found.left == {
        "1": "it or its convolution has hooks",
        "4": "it or its convolution is shared",
    }


def test_layers_that_two_experts_share_stay():
    model = hub()
    model.experts[1][4] = model.experts[0][4]  # the BatchNorm alone
    model.experts[2][0].weight = model.experts[0][0].weight
    x = images()
    with torch.no_grad():
        before = model(x)
        after = model.freeze_for_inference(example=x)(x)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    left = [part.left for part in model.frozen.parts.values()]
    assert [sorted(names) for names in left] == [["1", "4"], ["4"], ["1"], []]


def test_parametrized_convolutions_stay():
    model = hub()
    torch.nn.utils.parametrizations.weight_norm(model.experts[1][0])
    x = images()
    with torch.no_grad():
        before = model(x)
        after = model.freeze_for_inference(example=x)(x)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    left = [part.left for part in model.frozen.parts.values()]
    assert left == [{}, {"1": "it or its convolution is parametrized"}, {}, {}]


def test_a_failure_while_looking_changes_nothing(monkeypatch):
    from hubpath_fast.model import folding

    model = hub()
    whole, last = folding.folded, model.experts[2][0]

    def fails(conv, norm):
        if conv is last:
            raise RuntimeError("none")
        return whole(conv, norm)

    monkeypatch.setattr(folding, "folded", fails)
    with pytest.raises(RuntimeError, match="none"):
        model.freeze_for_inference(example=images())
    assert [norms(expert) for expert in model.experts] == [2, 2, 2]


class Counting(nn.Module):
    """Its BatchNorm is passed by for some numbers of images."""

    def __init__(self, passed_by):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.passed_by = passed_by

    def forward(self, x):
        y = self.conv(x)
        return (y if len(x) == self.passed_by else self.norm(y)).mean((2, 3))


@pytest.mark.parametrize("count", [1, 3])
def test_a_network_that_counts_its_images_is_not_folded(count):
    experts = [used(Counting(count)), used(Counting(0))]
    model = hp.HubPathway(experts, hp.PathwayGenerator(2, width=4), k=1).eval()
    model.freeze_for_inference(example=images() / 255)
    left = [part.left for name, part in model.frozen.parts.items() if "experts" in name]
    assert left == [{"norm": "the network with it folded gives something else"}, {}]
    assert isinstance(experts[0].norm, nn.BatchNorm2d)


def test_a_model_in_half_precision_is_not_folded():
    network = used(block()).bfloat16()
    x = torch.randn(2, 3, S, S).bfloat16()
    found = find_foldable(network, lambda: network(x), lambda part: False).fold()
    assert found.folded == 0
    assert set(found.left.values()) == {"the weights are torch.bfloat16"}


def test_predictions_stay_and_the_report_says_what_was_folded():
    model, x = hub(), images()
    with torch.no_grad():
        before, routed = model(x), model.route(x).experts
        assert model.freeze_for_inference(example=x) is model
        # Rounding: weights once per fold, and sums of other products, of predictions near 1.
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
        assert torch.equal(model.route(x).experts, routed)
    assert [part.folded for part in model.frozen.parts.values()] == [2, 2, 2, 12]
    assert norms(model) == 0
    assert str(model.frozen).startswith("experts[0] (Sequential #1): 2 BatchNorm folded\n")
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_in_half_precision_route_as_before(dtype):
    model, x = hub(), images(16)
    with torch.no_grad():
        before, routed = model(x), model.route(x)
        model.freeze_for_inference(dtype, torch.channels_last, example=x)
        after = model(x)
    assert after.dtype == torch.float32
    assert torch.equal(model.route(x).experts, routed.experts)
    assert model.experts[0][0].weight.dtype == dtype
    # Three layers, each rounded to 8 (11) bits: under 3 * 2 roundings of the largest output.
    assert float((after - before).abs().max()) < 6 * torch.finfo(dtype).eps * before.abs().max()
    floats = x.float() / 255
    with torch.no_grad():
        torch.testing.assert_close(
            model(floats), after, rtol=0, atol=float(6 * torch.finfo(dtype).eps)
        )


def test_training_afterwards_is_refused():
    model = hub().freeze_for_inference(example=images())
    with pytest.raises(ValueError, match="frozen for inference, got True"):
        model.train()
    assert not model.training
    model.eval()


def test_saving_afterwards_is_refused(tmp_path):
    model = hub().freeze_for_inference(example=images())
    with pytest.raises(ValueError, match="save it before freeze_for_inference"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_experts_that_come_or_go_afterwards_are_refused():
    model = hub().freeze_for_inference(example=images())
    state = [*model.state_dict()]
    for change in (
        lambda: model.add_expert(block(), [0.5] * 3, [0.5] * 3),
        lambda: model.remove_expert(0),
        lambda: add_newcomer(model, block(), [0.5] * 3, [0.5] * 3),
    ):
        with pytest.raises(
            ValueError, match=r"frozen for inference.* before\s+freeze_for_inference"
        ):
            change()
    assert [*model.state_dict()] == state


def test_wrong_arguments_change_nothing():
    model, x = hub(), images()
    state = copy.deepcopy(model.state_dict())
    for options, why in [
        ({"dtype": torch.float64}, "dtype: expected torch.float32"),
        ({"memory_format": torch.preserve_format}, "memory_format: expected"),
        ({"example": x[:, :2]}, "example: experts.0. .*fails on images"),
    ]:
        with pytest.raises(ValueError, match=why):
            model.freeze_for_inference(**options)
    assert model.frozen is None
    assert model.state_dict().keys() == state.keys()
    model.freeze_for_inference(example=x)
    with pytest.raises(ValueError, match="frozen already"):
        model.freeze_for_inference()


def test_without_a_size_batch_norm_stays_and_it_is_said():
    model = hub().freeze_for_inference()
    assert norms(model) == 18
    assert "2 left: no image size is known; give example=" in str(model.frozen)


def test_a_hub_of_names_knows_its_size_and_its_router_may_look_at_an_expert():
    names = ["timm/test_resnet", "timm/test_efficientnet"]
    model = used(hp.create_model(names, 4, k=1, pretrained=False, input_size=64, router="expert:0"))
    x = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        before = model(x)
        with pytest.raises(ValueError, match="router looks at an expert's features"):
            model.freeze_for_inference(torch.bfloat16)
        after = model.freeze_for_inference()(x)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert [part.folded for part in model.frozen.parts.values()] == [15, 13]


def test_graphs_of_one_image_are_captured_for_every_expert():
    model, x = hub(GraphsExecutor(FakeBackend), m=4), images()
    plain = copy.deepcopy(model)
    model.freeze_for_inference(example=x)
    assert model.frozen.captured
    before = model.executor._backend.captures
    with torch.no_grad():
        for image in x.split(1):
            torch.testing.assert_close(model(image), plain(image), rtol=1e-5, atol=1e-5)
    report = model.executor_report()
    assert (report.hits, report.misses) == (2 * len(x), 0)
    assert model.executor._backend.captures == before
