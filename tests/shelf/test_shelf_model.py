"""A Hub-Pathway on features is the Hub-Pathway of the networks that they came from."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from support.shelves import make_shelf
from torch import nn

import hubpath_fast as hp
from hubpath_fast.devices import eval_mode
from hubpath_fast.executors.sequential import SequentialExecutor
from hubpath_fast.features import write_shelf
from hubpath_fast.hub import build_experts
from hubpath_fast.hub.build import normalization
from hubpath_fast.model.heads import head_parameters
from hubpath_fast.shelf.executor import GroupedHeads
from hubpath_fast.shelf.model import build_hub, check_choice, start_from

M, C, VIEWS, N_ALL = 6, 3, 2, 60


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "shelf"
    return make_shelf(folder, M, C, (30, 15, 15), views=VIEWS, dtype=torch.float16)


def hub(shelf, models=range(M), k=2, **options):
    torch.manual_seed(0)
    model = build_hub(shelf, list(models), k, width=4, **options)
    nn.init.normal_(model.generator.clean.weight)
    return model


def fitted(weight, bias):
    """As much of a ``FittedHead`` as an expert takes."""
    return SimpleNamespace(weight=weight, bias=bias)


def batch(shelf, count=20, view=1):
    numbers = torch.randperm(N_ALL, generator=torch.Generator().manual_seed(1))[:count]
    return (view * N_ALL + numbers).double(), shelf.targets[numbers]


def results(model, x, y, eps=None):
    """Prediction, losses and gradients of a step."""
    model.zero_grad(set_to_none=True)
    out = model(x, eps, target=y)
    losses = hp.HubPathwayLoss(explore=0.7)(out, y)
    losses.total.backward()
    values = [out.prediction, losses.total, losses.task, losses.exploit]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return [v.detach() for v in values], gradients, out.routing


@pytest.mark.parametrize("aggregator", ["linear", "sum"])
def test_grouped_heads_are_the_sequential_experts_and_give_no_gradient_without_rows(
    shelf, aggregator
):
    model = hub(shelf, aggregator=aggregator).double()
    model.generator.clean.bias.data[3] = -50.0  # nobody asks expert 3
    x, y = batch(shelf)
    eps = torch.randn(len(x), M, dtype=torch.float64)
    found = {}
    for executor in (GroupedHeads(), SequentialExecutor()):
        model.executor = executor
        found[executor.name] = results(model, x, y, eps)
    (values, gradients, routing), (expected, theirs, _) = found.values()
    assert routing.counts()[3] == 0
    assert min(sorted(routing.counts())[1:]) > 0
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients.items():
        if name.startswith("experts.3."):
            assert gradient is None
            assert theirs[name] is None
        else:
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-12, atol=1e-12)


def test_the_model_is_the_reference_on_the_same_features(shelf):
    model = hub(shelf, aggregator="linear").double()
    x, y = batch(shelf)
    eps = torch.randn(len(x), M, dtype=torch.float64)
    values, gradients, _ = results(model, x, y, eps)
    model.zero_grad(set_to_none=True)
    reference = hp.reference.ReferenceHubPathway(
        model.experts, model.generator, model.aggregator, 2
    )
    out = reference(x, eps)
    total, task, _, exploit = hp.reference.losses(out, y, explore=0.7)
    total.backward()
    for value, expected in zip(values, (out.prediction, total, task, exploit), strict=True):
        torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-12, atol=1e-12)


def whole_hub(x, names, width=4):
    """A Hub-Pathway of whole networks with frozen bodies, as `hubpath fit` makes it of
    "NAME?freeze=body" (so its BatchNorm keeps its running statistics), and the experts."""
    torch.manual_seed(0)
    experts = build_experts([f"{name}?freeze=body" for name in names], C, False, x.shape[-1])
    for expert in experts:
        for layer in expert.module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(std=0.1)
                layer.running_var.uniform_(0.5, 2)
    generator = hp.PathwayGenerator(len(names), width=width)
    nn.init.normal_(generator.clean.weight)
    model = hp.HubPathway(
        [expert.module for expert in experts], generator, k=2, num_outputs=C,
        normalization=normalization(experts), executor="sequential",
    )  # fmt: skip
    return model, experts


def test_a_step_on_features_is_that_of_the_whole_networks_with_frozen_bodies(tmp_path):
    draw = torch.Generator().manual_seed(2)
    images = torch.randint(256, (24, 3, 32, 32), dtype=torch.uint8, generator=draw)
    y = torch.randint(C, (24,), generator=draw)
    names = ["timm/test_resnet", "timm/test_efficientnet", "timm/test_vit"]
    whole, experts = whole_hub(images, names)
    features = {}
    for expert in experts:
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (expert.mean, expert.std))
        with torch.no_grad(), eval_mode(expert.module):
            features[expert.name] = expert.pooled((images / 255 - mean) / std)
    made = write_shelf(tmp_path / "s", features, y, list("abc"), {"train": 24}, images)
    model = build_hub(made, range(3), 2, width=4)
    model.generator.load_state_dict(whole.generator.state_dict())
    for head, expert in zip(model.experts, experts, strict=True):
        weight, bias = head_parameters(expert.module)
        start_from(head, fitted(weight, bias))
    numbers, eps = torch.arange(24).double(), torch.randn(24, 3, generator=draw)
    values, gradients, routing = results(model, numbers, y, eps)
    expected, _, theirs = results(whole, images, y, eps)
    assert torch.equal(routing.experts, theirs.experts)
    assert min(routing.counts()) > 0
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-5)
    for name, p in whole.generator.named_parameters():
        close(gradients[f"generator.{name}"], p.grad)
    for i, expert in enumerate(experts):
        for name, p in zip(("weight", "bias"), head_parameters(expert.module), strict=True):
            close(gradients[f"experts.{i}.layer.{name}"], p.grad)
    whole.eval(), model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(numbers), whole(images), rtol=0, atol=1e-5)


def close(gradient, expected):
    """To 1e-6 of the largest entry: float32 rounds sums of 24 samples to about 2^-24 of it."""
    torch.testing.assert_close(
        gradient, expected, rtol=0, atol=1e-6 * max(1.0, expected.abs().max().item())
    )


def test_frozen_parts_of_heads_get_no_gradient_and_the_others_the_same(shelf):
    model = hub(shelf).double()
    x, y = batch(shelf)
    eps = torch.zeros(len(x), M, dtype=torch.float64)
    _, before, _ = results(model, x, y, eps)
    model.experts[0].layer.weight.requires_grad_(False)
    model.experts[1].layer.bias.requires_grad_(False)
    _, after, _ = results(model, x, y, eps)
    assert after["experts.0.layer.weight"] is None
    assert after["experts.1.layer.bias"] is None
    for name in ("experts.0.layer.bias", "experts.1.layer.weight", "experts.2.layer.weight"):
        assert torch.equal(after[name], before[name])


def test_gradients_of_two_backward_passes_add_up(shelf):
    model = hub(shelf).double()
    model.generator.requires_grad_(False)
    x, y = batch(shelf)
    eps = torch.zeros(len(x), M, dtype=torch.float64)
    _, once, _ = results(model, x, y, eps)
    once = {name: None if grad is None else grad.clone() for name, grad in once.items()}
    hp.HubPathwayLoss(explore=0.7)(model(x, eps, target=y), y).total.backward()
    for name, p in model.named_parameters():
        if once[name] is not None:
            assert torch.equal(p.grad, 2 * once[name])


def test_all_experts_can_be_asked_about_every_image(shelf):
    model = hub(shelf).eval()
    x, _ = batch(shelf)
    asked = model.ask_all(x)
    assert asked.shape == (len(x), M, C)
    for i, expert in enumerate(model.experts):
        own = shelf.features(i)[1, x.long() - N_ALL].float()
        torch.testing.assert_close(asked[:, i], expert.layer(own))


def test_router_and_heads_see_the_view_of_the_number(shelf):
    model = hub(shelf, models=range(1, M), router="features:model0").eval()
    x, _ = batch(shelf, view=1)
    seen = model.generator.seen(x)
    assert torch.equal(seen, shelf.features(0)[1, x.long() - N_ALL].float())
    assert torch.equal(model.experts[0].read(x), shelf.features(1)[1, x.long() - N_ALL].float())
    image = hub(shelf).generator
    expected = shelf.pixels()[1, x.long() - N_ALL].float() / 255
    torch.testing.assert_close(image.seen(x), expected)


def test_copies_of_a_model_and_its_weights_leave_the_features_where_they_are(shelf):
    model = hub(shelf, models=range(1, M), router="features:model0")
    copied = copy.deepcopy(model)
    heads, others = model.experts[0], copied.experts[0]
    assert others.features.data_ptr() == heads.features.data_ptr()
    assert copied.generator.mapped.data_ptr() == model.generator.mapped.data_ptr()
    assert others.layer.weight.data_ptr() != heads.layer.weight.data_ptr()
    assert copied.executor is not model.executor
    names = {name for name in model.state_dict() if name.startswith("experts.0.")}
    assert names == {"experts.0.layer.weight", "experts.0.layer.bias"}


def test_experts_start_from_fitted_heads(shelf):
    heads = [fitted(torch.randn(C, shelf.models[i].num_features), torch.randn(C)) for i in (4, 2)]
    model = hub(shelf, models=(4, 2), k=1, heads=heads)
    assert model.origin.labels == ("model4", "model2")
    for expert, head in zip(model.experts, heads, strict=True):
        assert torch.equal(expert.layer.weight, head.weight)
        assert torch.equal(expert.layer.bias, head.bias)


@pytest.mark.parametrize(("count", "kind"), [(63, hp.LinearAggregator), (64, hp.SumAggregator)])
def test_outputs_are_summed_from_64_experts_on(tmp_path, count, kind):
    features = {f"m{i}": torch.randn(4, 2) for i in range(count)}
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    made = write_shelf(
        tmp_path / "s", features, torch.tensor([0, 1, 0, 1]), ["a", "b"], {"train": 4}, pixels
    )
    assert type(hub(made, range(count)).aggregator) is kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 7}, r"k: expected an integer in 1..6"),
        ({"models": [2], "k": 2}, r"k: expected an integer in 1..1"),
        ({"models": [1, 1]}, r"models: expected each model once"),
        ({"router": "features:model2"}, r"router: model2 is an expert that is routed"),
        ({"router": "features:modelx"}, r"no features of a model 'modelx'; did you mean"),
        ({"router": "picture"}, r"router: expected image or features:LABEL"),
    ],
)
def test_what_cannot_be_routed_is_refused(shelf, arguments, message):
    with pytest.raises(ValueError, match=message):
        hub(shelf, **arguments)


def test_fewer_images_than_classes_and_a_shelf_without_pixels_are_refused(tmp_path):
    features = {"a": torch.randn(4, 2), "b": torch.randn(4, 3)}
    targets, sizes = torch.tensor([0, 1, 2, 3]), {"train": 3, "validation": 1}
    made = write_shelf(tmp_path / "s", features, targets, list("abcd"), sizes)
    with pytest.raises(ValueError, match="3 training images of 4 classes"):
        check_choice(made, 2, 1)
    made = write_shelf(tmp_path / "t", features, targets // 2, list("ab"), sizes)
    with pytest.raises(ValueError, match="has no pixels"):
        hub(made, range(2))


def test_grouped_heads_run_nothing_but_heads(shelf):
    model = hub(shelf)
    model.experts[2] = nn.Linear(1, C)
    with pytest.raises(ValueError, match=r"experts\[2\] \(Linear\): expected a FeatureHead"):
        model.ask_all(batch(shelf)[0])
