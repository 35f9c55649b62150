"""A newcomer changes nothing of samples that it does not get: routes, weights and predictions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hubpath_fast as hp
from hubpath_fast.model import NewcomerAggregator, NewcomerGenerator, add_newcomer, describe
from hubpath_fast.model.newcomers import MARGIN

C, N = 3, 33
AGGREGATORS = [hp.LinearAggregator, hp.MLPAggregator, hp.SumAggregator]
IMAGES = {"mean": [0.5] * 3, "std": [0.2] * 3}


class Tiny(nn.Module):
    """Not a product of matrices: what it says of a sample does not depend on the others."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, 3))

    def forward(self, x):
        return (x.mean(dim=(2, 3))[:, None] * self.weight).sum(dim=2)


def hub(count=4, aggregator=hp.LinearAggregator, k=2, dtype=torch.float32, **more):
    torch.manual_seed(0)
    model = hp.HubPathway(
        [Tiny() for _ in range(count)],
        hp.PathwayGenerator(count, width=2),
        aggregator(count, C),
        k=k,
        num_outputs=C,
        normalization=(torch.rand(count, 3), 0.1 + torch.rand(count, 3)),
        **more,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        model.generator.clean.weight.mul_(0.001)
    return model.to(dtype).eval()


def joined(model, share=0.3, x=None):
    """A copy with a newcomer that about ``share`` of the images go to."""
    model = copy.deepcopy(model)
    add_newcomer(model, Tiny().to(next(model.parameters()).dtype), **IMAGES)
    score = model.generator.clean[-1]
    with torch.no_grad():
        nn.init.normal_(score.weight)
        score.bias.zero_()
        inner = model.generator
        features = inner.generator.features(inner.seen(x))
        clean = inner.generator.clean(features)
        for other in list(inner.clean)[:-1]:
            clean = torch.cat([clean, other(features)], dim=1)
        excess = score(features) - clean.topk(inner.k).values[:, -1:]
        score.bias.copy_(-excess.quantile(1 - share))
    return model


@pytest.fixture
def images():
    return torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_a_newcomer_that_is_not_calibrated_changes_no_bit(aggregator, images):
    model = hub(aggregator=aggregator)
    expected, routing = model(images), model.route(images)
    add_newcomer(model, Tiny(), **IMAGES)
    assert torch.equal(model(images), expected)
    assert torch.equal(model.route(images).experts, routing.experts)
    assert torch.equal(model.route(images).weights, routing.weights)


# A sum over M scores is rounded otherwise where one more fills a vector: 8 or 16 of float32.
@pytest.mark.parametrize("count", [2, 3, 4, 7, 8, 15, 16])
@pytest.mark.parametrize("renormalize", [False, True])
def test_other_samples_keep_their_experts_and_weights_to_the_bit(count, renormalize, images):
    model = hub(count, renormalize=renormalize)
    before, after = model.route(images), joined(model, x=images).route(images)
    sent = (after.experts == count).any(dim=1)
    assert 0 < sent.sum() < N
    assert torch.equal(after.experts[~sent], before.experts[~sent])
    assert torch.equal(after.weights[~sent], before.weights[~sent])


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_other_samples_keep_their_predictions_to_the_bit(aggregator, k, images):
    model = hub(aggregator=aggregator, k=k)
    grown = joined(model, x=images)
    sent = (grown.route(images).experts == 4).any(dim=1)
    assert 0 < sent.sum() < N
    before, after = model(images), grown(images)
    assert torch.equal(after[~sent], before[~sent])
    assert not torch.isclose(after[sent], before[sent]).all()


def test_a_batch_without_a_sample_of_the_newcomer_is_aggregated_as_before(images, monkeypatch):
    from hubpath_fast import _torch_ops

    monkeypatch.setattr(_torch_ops, "GROUPED_MIN_SAVED", 0)  # a product for each expert
    model = hub()
    grown = joined(model, x=images)
    sent = (grown.route(images).experts == 4).any(dim=1)
    assert torch.equal(grown(images[~sent]), model(images[~sent]))


def test_the_newcomer_takes_the_place_that_its_score_has_among_the_k_largest(images):
    model = hub(dtype=torch.float64)
    grown, x = joined(model, x=images.double()), images.double()
    inner = grown.generator
    features = inner.generator.features(inner.seen(x))
    clean, z = inner.generator.clean(features), inner.clean[0](features)
    routing = grown.route(x)
    for n in range(N):
        scores = clean[n].tolist()
        if z[n] > sorted(scores)[-2] + MARGIN:
            scores.append(z[n].item())
        p = torch.tensor(scores, dtype=torch.float64).softmax(dim=0)
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:2]
        assert routing.experts[n].tolist() == best
        # Five exponentials and a sum in float64.
        torch.testing.assert_close(routing.weights[n], p[best], rtol=1e-14, atol=0)


def test_its_weighted_output_is_added_to_what_the_others_say(images):
    x = images.double()
    grown = joined(hub(dtype=torch.float64), x=x)
    routing = grown.route(x)
    everyone = grown.ask_all(x)
    weights = torch.zeros(N, 5, dtype=torch.float64).scatter(1, routing.experts, routing.weights)
    old = (weights[:, :4, None] * everyone[:, :4]).flatten(1)
    inner = grown.aggregator.aggregator
    expected = old @ inner.weight.T + inner.bias + weights[:, 4:] * everyone[:, 4]
    torch.testing.assert_close(grown(x), expected, rtol=1e-12, atol=1e-12)


def test_a_second_newcomer_leaves_the_samples_of_the_first_alone(images):
    one = joined(hub(15), x=images)
    two = joined(one, x=images)
    before, after = one.route(images), two.route(images)
    sent = (after.experts == 16).any(dim=1)
    assert 0 < sent.sum() < N
    assert (before.experts[~sent] == 15).any()
    assert torch.equal(after.experts[~sent], before.experts[~sent])
    assert torch.equal(after.weights[~sent], before.weights[~sent])
    assert torch.equal(two(images)[~sent], one(images)[~sent])


def test_what_the_description_says_builds_it_again(images):
    grown = joined(joined(hub(), x=images), x=images)
    said = describe(grown)
    assert said["generator"] == {
        "kind": "newcomers",
        "generator": {"kind": "image", "in_channels": 3, "width": 2, "stride": 1},
        "k": 2,
        "newcomers": 2,
    }
    assert said["aggregator"] == {
        "kind": "newcomers", "aggregator": {"kind": "linear"}, "num_old": 4, "newcomers": 2,
    }  # fmt: skip
    again = hp.HubPathway(
        [Tiny() for _ in range(6)],
        NewcomerGenerator(hp.PathwayGenerator(4, width=2), 2, count=2),
        NewcomerAggregator(hp.LinearAggregator(4, C), 4, count=2),
        k=2,
        normalization=(torch.rand(6, 3), torch.rand(6, 3) + 0.1),
    ).eval()
    again.load_state_dict(grown.state_dict())
    assert torch.equal(again(images), grown(images))


def test_removing_the_newcomer_gives_the_hub_as_it_was(images):
    model = hub()
    grown = joined(model, x=images)
    grown.remove_expert(4)
    assert torch.equal(grown(images), model(images))


def test_removing_an_old_expert_keeps_the_newcomer(images):
    x = images.double()
    grown = joined(hub(dtype=torch.float64, k=1), x=x)
    grown.generator.generator.clean.bias.data[1] = -1e4
    before, routing = grown(x), grown.route(x)
    grown.remove_expert(1)
    after = grown.route(x)
    assert torch.equal(after.experts, routing.experts - (routing.experts > 1).long())
    assert (routing.experts == 4).any()
    torch.testing.assert_close(grown(x), before, rtol=1e-12, atol=1e-12)


def test_gradients_reach_the_newcomer_where_it_is_asked_and_nothing_else(images):
    grown = joined(hub(), x=images)
    grown.requires_grad_(False)
    score, expert = grown.generator.clean[0].requires_grad_(True), grown.experts[4]
    expert.requires_grad_(True)
    sent = (grown.route(images).experts == 4).any(dim=1)
    grown(images[sent]).sum().backward()
    assert score.weight.grad.abs().max() > 0
    assert expert.weight.grad.abs().max() > 0


def test_training_mode_draws_noise_for_the_newcomer_too(images):
    grown = joined(hub(), x=images).train()
    output = grown(images)
    assert output.prediction.shape == (N, C)
    assert output.routing.num_experts == 5


def test_what_cannot_be_extended_is_refused(images):
    fixed = hub()
    fixed.generator = hp.FixedRoutes([0, 1], [0.5, 0.5], 4)
    with pytest.raises(ValueError, match=r"generator: .* this is a FixedRoutes"):
        add_newcomer(fixed, Tiny(), **IMAGES)
    grown = joined(hub(), x=images)
    with pytest.raises(ValueError, match="use add_newcomer"):
        grown.add_expert(Tiny(), **IMAGES)
    for _ in range(2):
        grown.remove_expert(0)
    with pytest.raises(ValueError, match="remove newcomers first"):
        grown.remove_expert(0)
    with pytest.raises(ValueError, match="give both"):
        add_newcomer(grown, Tiny())
    assert len(grown.experts) == 3
