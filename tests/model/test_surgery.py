"""Adding and removing experts: what was learned is kept, and the rest is what is promised."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hubpath_fast as hp

M, C, N = 4, 3, 11
AGGREGATORS = [hp.LinearAggregator, hp.MLPAggregator, hp.SumAggregator]


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, C, 3)
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x):
        return self.norm(self.conv(x)).mean(dim=(2, 3))


def randomise(model):
    """Every parameter as if it were trained: drawn from a normal distribution."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def hub(aggregator=hp.LinearAggregator, k=2, normalization=True):
    torch.manual_seed(0)
    mean, std = torch.rand(M, 3, dtype=torch.float64), 0.1 + torch.rand(M, 3, dtype=torch.float64)
    model = hp.HubPathway(
        [Tiny() for _ in range(M)],
        hp.PathwayGenerator(M, width=2),
        aggregator(M, C),
        k=k,
        num_outputs=C,
        normalization=(mean, std) if normalization else None,
    )
    return randomise(model).double().eval()


@pytest.fixture
def images():
    return torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def silence(model, index):
    """The expert gets no weight: exp(-1e4) is 0 in float64."""
    with torch.no_grad():
        model.generator.clean.weight[index] = 0
        model.generator.clean.bias[index] = -1e4


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("index", [0, 2, 3, -1])
def test_removing_an_expert_without_weight_changes_no_prediction(aggregator, index, images):
    model = hub(aggregator)
    silence(model, index)
    before, expert = model(images), model.experts[index]
    assert model.remove_expert(index) is expert
    # The sums run over fewer terms: a few roundings of float64 on values below 1e3.
    torch.testing.assert_close(model(images), before, rtol=1e-12, atol=1e-12)
    assert len(model.experts) == model.generator.num_experts == M - 1


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_an_expert_that_is_added_silently_changes_no_prediction(aggregator, images):
    model = hub(aggregator)
    before = model(images)
    # Scores of random generators reach the hundreds; 1e4 below their mean is far below all.
    model.add_expert(Tiny(), mean=[0.5] * 3, std=[0.2] * 3, score=-1e4)
    assert model(images).shape == (N, C)
    torch.testing.assert_close(model(images), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_adding_and_removing_again_is_the_model_as_it_was(aggregator, images):
    model = hub(aggregator)
    before = copy.deepcopy(model.state_dict())
    text = repr(model)
    model.add_expert(Tiny(), mean=[0.5] * 3, std=[0.2] * 3)
    model.remove_expert(-1)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert repr(model) == text


def test_removing_is_leaving_out_that_expert_everywhere(images):
    model, kept = hub(), [0, 2, 3]
    expected = hp.HubPathway(
        [copy.deepcopy(model.experts[i]) for i in kept],
        hp.PathwayGenerator(M - 1, width=2),
        k=2,
        num_outputs=C,
        normalization=(model.input_mean[kept], model.input_std[kept]),
    ).double()
    for part in ("stem", "norm", "blocks"):
        getattr(expected.generator, part).load_state_dict(
            getattr(model.generator, part).state_dict()
        )
    with torch.no_grad():
        for head in ("clean", "noise"):
            for kind in ("weight", "bias"):
                old = getattr(getattr(model.generator, head), kind)
                getattr(getattr(expected.generator, head), kind).copy_(old[kept])
        blocks = model.aggregator.weight.view(C, M, C)[:, kept]
        expected.aggregator.weight.copy_(blocks.reshape(C, -1))
        expected.aggregator.bias.copy_(model.aggregator.bias)
    model.remove_expert(1)
    torch.testing.assert_close(model(images), expected.eval()(images), rtol=1e-12, atol=1e-12)


def test_a_new_expert_scores_as_the_mean_and_adds_its_output(images):
    model, new = hub(k=M), Tiny().double().eval()
    clean, noise = model.generator(images)
    model.add_expert(new, mean=[0.5, 0.4, 0.3], std=[0.2, 0.1, 0.3], score=1.5)
    scores, scales = model.generator(images)
    torch.testing.assert_close(scores[:, :M], clean)
    torch.testing.assert_close(scores[:, M], clean.mean(dim=1) + 1.5)
    torch.testing.assert_close(scales[:, M], noise.mean(dim=1))
    model.k = 1
    with torch.no_grad():
        model.generator.clean.bias[M] = 1e4  # the new one alone: its weight is 1
        model.aggregator.bias.zero_()
    mean, std = (
        torch.tensor(v).double()[:, None, None] for v in ([0.5, 0.4, 0.3], [0.2, 0.1, 0.3])
    )
    # Normalisation is computed as x * scale + shift from float64 buffers.
    torch.testing.assert_close(model(images), new((images - mean) / std), rtol=1e-9, atol=1e-9)


def test_the_changed_model_trains_every_part():
    model = hub()
    model.add_expert(Tiny().double(), mean=[0.5] * 3, std=[0.2] * 3)
    model.train()
    torch.manual_seed(3)
    x, y = torch.rand(40, 3, 8, 8).double(), torch.randint(C, (40,))
    with torch.no_grad():
        model.generator.clean.weight.zero_()
        model.generator.clean.bias.zero_()
    hp.HubPathwayLoss()(model(x), y).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
    assert model.experts[M].training


def test_without_normalisation_and_with_frozen_parts(images):
    model = hub(normalization=False)
    model.generator.requires_grad_(False)
    model.add_expert(Tiny().double())
    assert model.input_mean is None
    assert not model.generator.clean.weight.requires_grad
    assert model.aggregator.weight.requires_grad
    model.remove_expert(0)
    assert model(images).shape == (N, C)


def test_a_saved_state_loads_into_a_fresh_model_of_that_size():
    model = hub()
    model.add_expert(Tiny(), mean=[0.5] * 3, std=[0.2] * 3)
    fresh = hp.HubPathway(
        [Tiny() for _ in range(M + 1)],
        hp.PathwayGenerator(M + 1, width=2),
        num_outputs=C,
        normalization=(torch.zeros(M + 1, 3), torch.ones(M + 1, 3)),
    )
    fresh.load_state_dict(model.state_dict())


class OtherGenerator(nn.Module):
    def forward(self, x):
        return x.new_zeros(len(x), M), x.new_zeros(len(x), M)


@pytest.mark.parametrize(
    ("prepare", "act", "message"),
    [
        (None, lambda m: m.remove_expert(4), "index: expected an expert, 0..3, got 4"),
        (None, lambda m: m.remove_expert(-5), "index: expected an expert"),
        (None, lambda m: m.remove_expert("0"), "index: expected an expert"),
        (lambda m: setattr(m, "k", 4), lambda m: m.remove_expert(0),
         "there are 3 experts for k=4 active ones; lower model.k first"),
        (None, lambda m: m.add_expert("resnet50", [0.5] * 3, [0.5] * 3), "module: expected an nn"),
        (None, lambda m: m.add_expert(Tiny()), "has a normalisation .* give both"),
        (None, lambda m: m.add_expert(Tiny(), mean=[0.5] * 3), "give both"),
        (None, lambda m: m.add_expert(Tiny(), [0.5], [0.5] * 3), r"mean: expected \[3\] values"),
        (None, lambda m: m.add_expert(Tiny(), [0.5] * 3, [0.5, 0, 1]), "std: expected values"),
        (lambda m: setattr(m, "generator", OtherGenerator()), lambda m: m.remove_expert(0),
         "with a PathwayGenerator or FeatureGenerator, not with a OtherGenerator"),
        (lambda m: setattr(m, "aggregator", nn.Linear(M * C, C)), lambda m: m.remove_expert(0),
         "aggregator: .* not with a Linear"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_and_changes_nothing(prepare, act, message):
    model = hub()
    if prepare:
        prepare(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        act(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_only_expert_stays():
    model = hp.HubPathway([Tiny()], hp.PathwayGenerator(1, width=2), k=1, num_outputs=C)
    with pytest.raises(ValueError, match="the only expert cannot be removed"):
        model.remove_expert(0)
    model = hub(normalization=False)
    with pytest.raises(ValueError, match=r"no normalisation .* leave both out"):
        model.add_expert(Tiny(), [0.5] * 3, [0.5] * 3)
