"""The model against the reference: predictions, losses, gradients, buffers; and its manners."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.pathway import (
    CLOSE,
    TableGenerator,
    assert_equal_step,
    assert_same_state,
    build,
    conv_expert,
    linear_expert,
)
from torch import nn

import hubpath_fast as hp
from hubpath_fast import reference

SHAPES = {
    "the paper's sizes": (48, 5, 2),
    "one sample, one expert": (1, 1, 1),
    "every expert active": (17, 6, 6),
    "a large hub": (33, 64, 3),
    "all of a large hub": (5, 64, 64),
    "one past a power of two": (257, 3, 2),
    "one active expert": (40, 7, 1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_equals_the_reference(name):
    n, m, k = SHAPES[name]
    assert_equal_step(*build(n, m, k))


@pytest.mark.parametrize("noise_scale", [100.0, -100.0])
def test_a_step_with_extreme_noise_equals_the_reference(noise_scale):
    assert_equal_step(*build(24, 5, 2, noise=torch.full((24, 5), noise_scale)))


def test_a_step_with_batch_norm_small_groups_and_an_idle_expert():
    """Expert 0 gets one row (running statistics), expert 3 none (left alone), ties between 1, 2."""
    clean = torch.tensor([[-9.0, 3.0, 3.0, -50.0, 1.0]]).repeat(9, 1)
    clean[4] = torch.tensor([9.0, 1.0, -9.0, -50.0, -9.0])
    ours, truth, x, y, _ = build(9, 5, 2, clean=clean, noise=clean * 0 - 100, expert=conv_expert)
    eps = torch.zeros(9, 5, dtype=torch.float64)
    before = copy.deepcopy(ours.experts[0].state_dict())
    assert_equal_step(ours, truth, x, y, eps)
    assert ours(x, eps).routing.counts() == [1, 9, 8, 0, 0]
    for name in ("1.running_mean", "1.num_batches_tracked"):
        assert torch.equal(ours.experts[0].state_dict()[name], before[name])
    assert all(p.grad is None for p in ours.experts[3].parameters())
    assert ours.experts[3][1].num_batches_tracked == 0
    assert all(m.training for m in ours.modules())


def test_evaluation_is_plain_noiseless_and_equal_to_the_reference():
    ours, truth, x, *_ = build(12, 5, 2, expert=conv_expert)
    ours.eval()
    truth.eval()
    prediction = ours(x)
    assert type(prediction) is torch.Tensor
    assert torch.equal(prediction, ours(x))
    torch.testing.assert_close(prediction, truth(x), **CLOSE)


def test_the_same_seed_draws_the_same_noise_as_the_reference():
    ours, truth, x, *_ = build(12, 5, 2)
    torch.manual_seed(5)
    out = ours(x)
    torch.manual_seed(5)
    torch.testing.assert_close(out.prediction, truth(x).prediction, **CLOSE)
    assert not torch.equal(ours(x).routing.weights, out.routing.weights)


@pytest.mark.parametrize("part", ["explore", "exploit", "task"])
def test_each_loss_reaches_only_its_part(part):
    """Equation 6: explore trains the generator only, exploit the experts only, task everything."""
    ours, _, x, y, eps = build(30, 4, 2)
    losses = hp.HubPathwayLoss()(ours(x, eps), y)
    getattr(losses, part).backward()
    reached = {
        name: any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
        for name, module in ours.named_children()
    }
    assert (
        reached
        == {
            "explore": {"experts": False, "generator": True, "aggregator": False},
            "exploit": {"experts": True, "generator": False, "aggregator": False},
            "task": {"experts": True, "generator": True, "aggregator": True},
        }[part]
    )


@pytest.mark.parametrize("tail", [(5, 6), (3,)], ids=["heatmaps C,H,W", "actions x atoms"])
def test_outputs_may_be_maps(tail):
    class Map(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(48, 7 * torch.Size(tail).numel())

        def forward(self, x):
            return self.linear(x.flatten(1)).view(len(x), 7, *tail)

    ours, truth, x, _, eps = build(10, 3, 2, expert=Map, num_outputs=7)
    out, expected = ours(x, eps), truth(x, eps)
    assert out.prediction.shape == (10, 7, *tail)
    torch.testing.assert_close(out.prediction, expected.prediction, **CLOSE)
    y = torch.randn(10, 7, *tail, dtype=torch.float64)

    def mse(prediction, y):
        return (prediction - y).square().flatten(1).mean(dim=1)

    weight = torch.rand(10, dtype=torch.float64)
    losses = hp.HubPathwayLoss(task_loss=mse)(out, y, sample_weight=weight)
    total, *_ = reference.losses(expected, y, 0.5, task_loss=mse, sample_weight=weight)
    torch.testing.assert_close(losses.total, total, **CLOSE)
    losses.total.backward()
    total.backward()
    assert_same_state(ours, truth)


def test_sample_weight_scales_the_default_loss_of_each_sample():
    ours, truth, x, y, eps = build(14, 4, 2)
    weight = torch.rand(14, dtype=torch.float64)
    losses = hp.HubPathwayLoss()(ours(x, eps), y, sample_weight=weight)
    total, *_ = reference.losses(truth(x, eps), y, 0.5, sample_weight=weight)
    torch.testing.assert_close(losses.total, total, **CLOSE)


def test_the_default_aggregator_starts_as_the_weighted_sum():
    experts = [linear_expert() for _ in range(3)]
    model = hp.HubPathway(experts, TableGenerator(torch.randn(6, 3), torch.randn(6, 3)), k=2).eval()
    x = torch.randn(6, 3, 4, 4)
    routing = model.route(x)
    expected = sum(
        routing.weights[:, j, None]
        * torch.stack([experts[i](x[n : n + 1])[0] for n, i in enumerate(routing.experts[:, j])])
        for j in range(2)
    )
    # float32 sums of 48 products of size about 0.1
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert model.aggregator.weight.shape == (7, 21)
    mlp = hp.MLPAggregator(3, 7)
    concat = torch.randn(6, 21)
    torch.testing.assert_close(mlp(concat), model.aggregator(concat))


def test_uint8_images_are_normalised_for_each_expert():
    mean, std = torch.rand(3, 3), torch.rand(3, 3) + 0.5
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(48, 4)

        def forward(self, x):
            seen.append(x)
            return self.head(x.flatten(1))

    generator = hp.PathwayGenerator(3, width=4)
    model = hp.HubPathway(
        [Spy() for _ in range(3)], generator, k=3, normalization=(mean, std)
    ).eval()
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    from_bytes = model(images)
    for i, rows in enumerate(seen):
        expected = (images / 255 - mean[i, :, None, None]) / std[i, :, None, None]
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)  # three float32 roundings
    torch.testing.assert_close(model(images / 255), from_bytes, rtol=1e-4, atol=1e-5)
    assert {"input_mean", "input_std"} <= set(model.state_dict())


def test_behaves_as_any_module(tmp_path):
    ours, _, x, y, eps = build(16, 4, 2, expert=conv_expert)
    twin = copy.deepcopy(ours)
    torch.save(ours.state_dict(), tmp_path / "model.pt")
    fresh, *_ = build(16, 4, 2, expert=conv_expert, seed=9)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    expected = ours(x, eps).prediction
    assert torch.equal(twin(x, eps).prediction, expected)
    assert torch.equal(fresh(x, eps).prediction, expected)
    assert ours.to(torch.float32)(x.float(), eps.float()).prediction.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x.float(), eps.float())
        losses = hp.HubPathwayLoss()(out, y)
    assert out.routing.weights.dtype == torch.float32
    losses.total.backward()
    # bf16 keeps 8 bits: relative 4e-3 a product, sums of a few dozen
    torch.testing.assert_close(out.prediction.double(), expected, rtol=0.1, atol=0.1)
    ours.experts[0] = torch.compile(ours.experts[0], backend="eager")
    assert ours(x.float(), eps.float()).prediction.isfinite().all()


def test_a_generator_of_nine_layers_starts_without_preference():
    generator = hp.PathwayGenerator(5, width=8, stride=2, noise_init=-1.0)
    convolutions = [
        m for m in generator.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert len(convolutions) == 9
    clean, noise = generator(torch.rand(4, 3, 32, 32))
    assert torch.equal(clean, torch.zeros(4, 5))
    assert torch.equal(noise, torch.full((4, 5), -1.0))


def experts_of(*widths):
    return [linear_expert(width) for width in widths]


def table(n=4, m=2):
    return TableGenerator(torch.zeros(n, m), torch.zeros(n, m))


BAD_MODELS = {
    "no experts": (lambda: hp.HubPathway([], table()), "experts: the hub is empty"),
    "k above M": (lambda: hp.HubPathway(experts_of(7, 7), table(), k=3), r"k: .*1\.\.2.*got 3"),
    "k of zero": (lambda: hp.HubPathway(experts_of(7, 7), table(), k=0), "k: .*got 0"),
    "unknown executor": (
        lambda: hp.HubPathway(experts_of(7, 7), table(), executor="fast"),
        "executor: .*'fast'",
    ),
    "no common C": (
        lambda: hp.HubPathway(experts_of(7, 8), table()),
        r"\[0\] \(Sequential\): 7, .*\[1\].*: 8",
    ),
    "normalisation of another hub": (
        lambda: hp.HubPathway(
            experts_of(7, 7), table(), normalization=(torch.zeros(3, 3), torch.ones(3, 3))
        ),
        r"normalization: .*\[2, channels\]",
    ),
    "a mean that is not finite": (
        lambda: hp.HubPathway(
            experts_of(7), table(m=1), k=1, normalization=([[0.0, float("nan"), 0.0]], [[1.0] * 3])
        ),
        "normalization: mean: expected finite values, got .*nan",
    ),
    "a std of zero": (
        lambda: hp.HubPathway(
            experts_of(7, 7), table(), normalization=(torch.zeros(2, 1), torch.tensor([[1], [0]]))
        ),
        r"normalization: std: expected values above 0 that are finite, got \[0.0\] of expert 1",
    ),
    "a std of NaN": (
        lambda: hp.HubPathway(
            experts_of(7), table(m=1), k=1, normalization=([[0.0]], [[float("nan")]])
        ),
        "normalization: std: expected values above 0 that are finite, got .nan",
    ),
    "names instead of experts": (
        lambda: hp.HubPathway(["resnet50"], table(m=1), k=1),
        r"experts\[0\]: expected an nn.Module, got 'resnet50'; hp.create_model",
    ),
    "a class instead of a generator": (
        lambda: hp.HubPathway(experts_of(7), hp.PathwayGenerator, k=1),
        r"generator: expected an nn.Module, got <class .*; hp.PathwayGenerator\(",
    ),
    "an aggregator's name": (
        lambda: hp.HubPathway(experts_of(7), table(m=1), "linear", k=1),
        "aggregator: expected an nn.Module, got 'linear'; hp.LinearAggregator",
    ),
    "min_group of zero": (lambda: hp.HubPathway(experts_of(7), table(), k=1, min_group=0), "min_g"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_refused(name):
    call, message = BAD_MODELS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_batches_are_refused_by_name():
    x = torch.randn(4, 3, 4, 4)
    model = hp.HubPathway(experts_of(7, 7), table())
    with pytest.raises(ValueError, match="x: empty batch"):
        model(x[:0])
    with pytest.raises(ValueError, match=r"generator: .*\[4, 2\], got \[4, 3\]"):
        hp.HubPathway(experts_of(7, 7), table(m=3))(x)
    with pytest.raises(ValueError, match="uint8 images need"):
        model((x * 255).to(torch.uint8))
    unequal = hp.HubPathway(experts_of(7, 8), table(), num_outputs=7)
    with pytest.raises(
        ValueError, match=r"experts\[1\] \(Sequential\).*\[8\].*experts\[0\].*\[7\]"
    ):
        unequal(x)
    with pytest.raises(ValueError, match=r"experts\[0\] \(Flatten\).*n=4"):
        hp.HubPathway([nn.Flatten(0)], table(m=1), k=1, num_outputs=7)(x)
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\], got \[4, 1, 4, 4\]"):
        hp.PathwayGenerator(2)(x[:, :1])


def test_bad_losses_are_refused_by_name():
    ours, _, x, y, eps = build(8, 3, 2)
    out = ours(x, eps)
    with pytest.raises(ValueError, match="y: expected 8 targets"):
        hp.HubPathwayLoss()(out, y[:3])
    with pytest.raises(ValueError, match=r"sample_weight: expected \[8\]"):
        hp.HubPathwayLoss()(out, y, sample_weight=torch.ones(3))
    with pytest.raises(ValueError, match="task_loss: expected one loss a sample"):
        hp.HubPathwayLoss(task_loss=lambda p, y: p.sum())(out, y)
    with pytest.raises(ValueError, match=r"sample_weight: expected \[8\], got a list"):
        hp.HubPathwayLoss()(out, y, sample_weight=8 * [1.0])
    for wrong in (math.nan, math.inf):
        weight = torch.ones(8).index_fill(0, torch.tensor([5, 7]), wrong)
        with pytest.raises(ValueError, match=f"sample_weight: .* got {wrong} for sample 5"):
            hp.HubPathwayLoss()(out, y, sample_weight=weight)
    empty = out._replace(prediction=out.prediction[:0])
    for loss in (None, lambda p, y: F.cross_entropy(p, y, reduction="none")):
        with pytest.raises(ValueError, match=r"out.prediction: empty batch, shape \[0, "):
            hp.HubPathwayLoss(loss)(empty, y[:0])


@pytest.mark.parametrize("wrong", [-1, math.nan, math.inf, "0.5", None, True])
@pytest.mark.parametrize("name", ["explore", "label_smoothing", "router_supervision"])
def test_weights_of_losses_are_finite_numbers(name, wrong):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got {wrong!r}$"):
        hp.HubPathwayLoss(**{name: wrong})
    with pytest.raises(ValueError, match=r"^router_temperature: expected .* above 0, got"):
        hp.HubPathwayLoss(router_temperature=wrong)
    with pytest.raises(ValueError, match=r"^label_smoothing: .* \[0, 1\], got 1.5"):
        hp.HubPathwayLoss(label_smoothing=1.5)


@pytest.mark.parametrize("aggregator", [None, hp.MLPAggregator(5, 7)], ids=["linear", "mlp"])
def test_the_exploit_loss_may_be_computed_along_with_the_aggregation(aggregator):
    results = []
    for fused in (True, False):
        ours, _, x, y, eps = build(20, 5, 2)
        if aggregator is not None:
            ours.aggregator = copy.deepcopy(aggregator).double()
        out = ours(x, eps, target=y, label_smoothing=0.1) if fused else ours(x, eps)
        _, outputs, _ = out
        assert outputs is out.expert_outputs
        losses = hp.HubPathwayLoss(label_smoothing=0.1)(out, y)
        assert (out.fused_exploit is not None) == fused
        assert not fused or out.fused_exploit.loss(y, 0.1) is losses.exploit
        losses.total.backward()
        results.append((losses.exploit, *(p.grad for p in ours.parameters() if p.grad is not None)))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, **CLOSE)


def ignored(y):
    y[0] = -100
    return y


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda y: y, {"label_smoothing": 0.1}),
        (lambda y: (y + 1) % 7, {}),
        (ignored, {}),  # in place
        (lambda y: y, {"task_loss": lambda p, y: p.square().sum(1)}),
        (lambda y: y, {"exploit": False}),
    ],
    ids=["label smoothing", "other targets", "targets changed", "another loss", "left out"],
)
def test_an_exploit_loss_that_was_fused_for_something_else_is_not_taken(change, options):
    ours, _, x, y, eps = build(20, 5, 2)
    out = ours(x, eps, target=y)
    y, criterion = change(y), hp.HubPathwayLoss(**options)
    found, expected = criterion(out, y), criterion(hp.PathwayOutput(*out), y)
    assert torch.equal(found.exploit, expected.exploit)
    assert torch.equal(found.total, expected.total)


def test_a_given_routing_replaces_the_generator():
    ours, _, x, *_ = build(10, 4, 2)
    ours.eval()
    routing = ours.route(x)
    expected = ours(x)
    ours.generator = None
    assert torch.equal(ours(x, routing=routing), expected)


@pytest.mark.parametrize(
    ("rows", "min_group", "moves"), [(1, 2, False), (2, 2, True), (2, 3, False)]
)
def test_min_group_is_the_least_group_with_batch_statistics(rows, min_group, moves):
    clean = torch.full((6, 2), 9.0)
    clean[:rows, 1] = 20.0
    ours, *_, x, _, eps = build(6, 2, 1, clean, clean * 0, conv_expert, min_group=min_group)
    assert ours(x, eps * 0).routing.counts() == [6 - rows, rows]
    assert ours.experts[1][1].num_batches_tracked == int(moves)
