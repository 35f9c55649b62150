"""Zoo-Tuning's whole networks against their own experts, and hand-made averages.

In float64 the two orders of computation differ by roundings of some 1e-15 a term, over fewer than
1e4 terms: relative errors stay far below CLOSE.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.images import RandomImages, check_resuming
from support.training import QUIET
from torch import nn

from hubpath_fast.baselines import SingleModel
from hubpath_fast.baselines.zoo_layers import MixedConv2d
from hubpath_fast.baselines.zoo_tuning import ZooTuning, zoo_tuning_groups
from hubpath_fast.hub import Expert, ExpertSpec, build_experts
from hubpath_fast.model.heads import set_lr_factor
from hubpath_fast.tasks import Classification
from hubpath_fast.training import SingleObjective, Trainer, TrainerConfig
from hubpath_fast.training.optimizer import build_optimizer

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
M = 3
TASK = Classification(tuple("0123456789"))


def hub(name="timm/test_resnet", count=M, classes=10):
    """Experts in float64 whose BatchNorm layers have lived a little."""
    torch.manual_seed(0)
    experts = build_experts([name] * count, classes, pretrained=False, input_size=32)
    for expert in experts:
        expert.module.double()
        for layer in expert.module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.data.uniform_(0.5, 1.5)
                layer.bias.data.normal_(std=0.2)
                layer.running_mean.normal_(std=0.2)
                layer.running_var.uniform_(0.5, 1.5)
                layer.num_batches_tracked.fill_(7)
    return experts


def images(seed=0):
    return RandomImages().batch(seed)[0]


def mixed_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, MixedConv2d)]


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_efficientnet"])
@pytest.mark.parametrize("lite", [False, True], ids=["images", "lite"])
def test_a_gate_that_picks_one_expert_gives_that_expert(name, lite):
    """The second network has depthwise convolutions, and biased ones in its squeeze-excite."""
    experts = hub(name)
    model = ZooTuning(experts, lite).double().eval()
    for layer in mixed_layers(model):
        nn.init.zeros_(layer.gate[2].weight)
        layer.gate[2].bias.data = torch.tensor([-1e4, 1e4, -1e4], dtype=torch.float64)
        if lite:
            layer.average.copy_(torch.tensor([0.0, 1.0, 0.0]))
    convolutions = {name for name, m in experts[1].module.named_modules() if type(m) is nn.Conv2d}
    others = {
        key: value
        for key, value in experts[1].module.state_dict().items()
        if key.rpartition(".")[0] not in convolutions
    }
    assert not model.module.load_state_dict(others, strict=False).unexpected_keys
    assert len(mixed_layers(model)) == len(convolutions) > 10
    with torch.no_grad():
        expected = SingleModel(experts[1]).double().eval()(images())
        torch.testing.assert_close(model(images()), expected, **CLOSE)
        assert not torch.allclose(expected, SingleModel(experts[0]).double().eval()(images()))


def test_batch_norm_is_averaged_and_reset_and_the_head_is_the_first_experts():
    experts = hub()
    model = ZooTuning(experts)
    norms = {n: m for n, m in model.module.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == 15
    for name, layer in norms.items():
        theirs = [expert.module.get_submodule(name) for expert in experts]
        torch.testing.assert_close(layer.weight, sum(t.weight for t in theirs) / M, **CLOSE)
        torch.testing.assert_close(layer.bias, sum(t.bias for t in theirs) / M, **CLOSE)
        assert layer.running_mean.eq(0).all()
        assert layer.running_var.eq(1).all()
        assert layer.num_batches_tracked == 0
        assert theirs[0].num_batches_tracked == 7
    assert torch.equal(model.module.fc.weight, experts[0].module.fc.weight)
    assert model.module.fc.weight is not experts[0].module.fc.weight


class Body(nn.Module):
    """A convolution that is used twice, and what Zoo-Tuning averages: linear, other norms."""

    def __init__(self, value=1.0):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.again = nn.Sequential(self.shared)
        self.norm = nn.GroupNorm(2, 4)
        self.linear = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 5)
        self.register_buffer("scale", torch.full((4,), value))
        self.register_buffer("order", torch.arange(4))
        for p in self.parameters():
            nn.init.normal_(p)

    def forward(self, x):
        x = self.again(self.shared(self.stem(x)).relu()).relu()
        x = self.norm(x).mean(dim=(2, 3)) * self.scale
        return self.fc(self.linear(x[:, self.order]))


def expert(module, **changes):
    values = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "size": 8, **changes}
    return Expert("mine", module, **values)


def test_other_layers_are_averaged_and_shared_ones_stay_shared():
    torch.manual_seed(0)
    bodies = [Body(value) for value in (1.0, 2.0, 6.0)]
    bodies[1].order = bodies[1].order.flip(0)  # no numbers to average: the first expert's are kept
    before = copy.deepcopy(bodies[0].state_dict())
    model = ZooTuning([expert(body) for body in bodies])
    for name in ("norm.weight", "norm.bias", "linear.weight", "linear.bias"):
        expected = sum(body.get_parameter(name) for body in bodies) / M
        torch.testing.assert_close(model.module.get_parameter(name), expected)
    assert model.module.scale.tolist() == [3.0] * 4
    assert model.module.order.tolist() == [0, 1, 2, 3]
    assert model.module.again[0] is model.module.shared
    assert len(mixed_layers(model)) == 2
    assert all(torch.equal(value, before[key]) for key, value in bodies[0].state_dict().items())
    assert type(bodies[0].stem) is nn.Conv2d


class ConvolutionHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.classifier = nn.Sequential(nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        return self.classifier(self.stem(x).relu())


def test_a_head_with_a_convolution_is_not_mixed():
    bodies = [ConvolutionHead() for _ in range(2)]
    model = ZooTuning([expert(body) for body in bodies])
    assert type(model.module.stem) is MixedConv2d
    assert type(model.module.classifier[0]) is nn.Conv2d
    assert torch.equal(model.module.classifier[0].weight, bodies[0].classifier[0].weight)


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/resnet50"])
def test_a_lite_network_merges_into_a_plain_one(name):
    """Its statistics and coefficients moved by two batches; float32 for the large one, where 50
    layers of sums over up to 4,608 terms leave some 1e-5 of values of order 1."""
    large = "resnet50" in name
    experts = build_experts([name] * 2, 7, False, 32) if large else hub(name, 2, 7)
    model = ZooTuning(experts, lite=True)
    model = model if large else model.double()
    for layer in mixed_layers(model):
        layer.gate[2].weight.data.normal_()
    with torch.no_grad():
        for seed in range(2):
            model(images(seed=seed))
        model.eval()
        plain = model.merged()
        kinds = {type(layer) for layer in plain.modules()}
        assert MixedConv2d not in kinds
        sizes = [sum(p.numel() for p in m.parameters()) for m in (plain, experts[0].module)]
        assert sizes[0] == sizes[1]
        expected = model(images(seed=5))
        tolerance = {"rtol": 1e-3, "atol": 1e-4} if large else CLOSE
        torch.testing.assert_close(plain(images(seed=5)), expected, **tolerance)
        assert expected.std(dim=0).min() > 1e-4  # images are told apart
        plain.module.fc.bias.add_(1)
        assert torch.equal(model(images(seed=5)), expected)


def test_merging_needs_lite():
    model = ZooTuning([expert(Body()) for _ in range(2)])
    with pytest.raises(ValueError, match="lite=True"):
        model.merged()


# What cannot be one network


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


def with_stem(stem):
    body = Body()
    body.stem = stem
    return expert(body)


def no_convolution():
    return expert(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))


def frozen():
    body = Body()
    body.stem.weight.requires_grad_(False)
    return expert(body)


def slower():
    body = Body()
    set_lr_factor(body, 0.1)
    return expert(body)


def weight_normed():
    return with_stem(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (list, "at least two, got 0"),
        (lambda: [expert(Body())], "at least two, got 1"),
        (
            lambda: [expert(Body()), with_stem(nn.Conv2d(3, 4, 3, padding=1, stride=2))],
            r"one architecture: experts\[0\] \(mine\) and experts\[1\] \(mine\).*stem",
        ),
        (lambda: [expert(Body()), expert(Body(), mean=(0.5, 0.5, 0.5))], "one mean.*0.4.*0.5, 0.5"),
        (lambda: [expert(Body()), expert(Body(), std=(1.0, 1.0, 1.0))], "one std"),
        (lambda: [expert(Body()), expert(Body(), size=16)], "one size.*8, 16"),
        (lambda: [expert(Body()), slower()], "one lr_factor.*1.0, 0.1"),
        (lambda: [expert(Body()), frozen()], "stem.weight is frozen in some"),
        (lambda: [no_convolution(), no_convolution()], "no convolution in the body of mine"),
        (lambda: [with_stem(Standardised(3, 4, 3)) for _ in range(2)], "what a Standardised makes"),
        (lambda: [weight_normed(), weight_normed()], "what a ParametrizedConv2d makes"),
        (
            lambda: build_experts([ExpertSpec("test_resnet", freeze="body")] * 2, 10, False, 32),
            "give the experts the option bn=train",
        ),
        (
            lambda: build_experts(["test_resnet", "test_byobnet"], 10, False, 32),
            "one architecture",
        ),
    ],
)
def test_experts_that_cannot_be_one_network_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        ZooTuning(make())


# Training


def small_hub(seed=0):
    torch.manual_seed(seed)
    return build_experts(["test_resnet", "test_resnet"], 10, pretrained=False, input_size=32)


def test_every_parameter_is_in_one_group_at_its_rate():
    model = ZooTuning(small_hub())
    config = TrainerConfig(lr_expert=0.01, lr_head=0.02, lr_router=0.03)
    groups = {group.name: group for group in zoo_tuning_groups(model, config)}
    build_optimizer(model, list(groups.values()), config)
    assert {name: group.lr for name, group in groups.items()} == {
        "experts": 0.01,
        "heads": 0.02,
        "router": 0.03,
    }
    names = {id(p): name for name, p in model.named_parameters()}
    named = {key: {names[id(p)] for p in group.params} for key, group in groups.items()}
    assert named["heads"] == {"module.fc.weight", "module.fc.bias"}
    new = {n for n in names.values() if ".gate." in n or n.endswith(".alignment")}
    # Of 15 convolutions each has a gate of three tensors; the ten above 1 x 1 have an alignment.
    assert len(new) == 15 * 3 + 10
    assert named["router"] == new
    assert named["experts"] == set(names.values()) - new - named["heads"]


def test_a_rate_without_a_head_of_its_own_and_the_experts_factor():
    experts = small_hub()
    for one in experts:
        set_lr_factor(one.module, 0.5)
    config = TrainerConfig(lr_expert=0.01, lr_head=None, lr_router=0.03)
    groups = zoo_tuning_groups(ZooTuning(experts), config)
    assert [(g.name, g.lr) for g in groups] == [
        ("experts", 0.005),
        ("heads", 0.01),
        ("router", 0.03),
    ]


def test_frozen_bodies_stay_frozen():
    spec = ExpertSpec("test_resnet", freeze="body", batchnorm="train")
    experts = build_experts([spec] * 2, 10, False, 32)
    model = ZooTuning(experts)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in trained if "gate" not in name} > {"fc"}
    assert not any(name.endswith(("kernels", "bn1.weight")) for name in trained)
    build_optimizer(model, zoo_tuning_groups(model, TrainerConfig()), TrainerConfig())


@pytest.mark.parametrize("lite", [False, True], ids=["images", "lite"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, lite):
    config = TrainerConfig(steps=5, batch_size=8, lr_expert=0.01)

    def make(folder, resume):
        model = ZooTuning(small_hub(seed=1 if resume else 0), lite)
        return Trainer(
            model, SingleObjective(TASK.loss), RandomImages(8, classes=10), config, folder,
            groups=zoo_tuning_groups(model, config), task=TASK, reporting=QUIET, resume=resume,
        )  # fmt: skip

    trainer, _ = check_resuming(make, tmp_path, stop=3)
    whole = trainer.model.state_dict()
    start = ZooTuning(small_hub(), lite).state_dict()
    still = [name for name, value in whole.items() if torch.equal(value, start[name])]
    assert set(still) == {"mean", "std"}  # everything else learned or moved


def test_copies_and_state_dicts_carry_everything():
    model = ZooTuning(small_hub(), lite=True)
    model(images())
    model.eval()
    twin = copy.deepcopy(model)
    other = ZooTuning(small_hub(seed=3), lite=True).eval()
    with torch.no_grad():
        expected = model(images())
        assert torch.equal(twin(images()), expected)
        assert not torch.equal(other(images()), expected)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(images()), expected)
        for p in twin.parameters():
            p.fill_(math.nan)
        assert torch.equal(model(images()), expected)


def test_channels_last_networks_predict_the_same():
    """float32, other orders of the sums of some 1,000 terms: about 1e-5 of values of order 1."""
    model = ZooTuning(small_hub())
    model(images())
    model.eval()
    with torch.no_grad():
        expected = model(images())
        found = copy.deepcopy(model).to(memory_format=torch.channels_last)(images())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
