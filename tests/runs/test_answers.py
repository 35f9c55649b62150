"""What is computed of stored answers is what the model, and a hub of fewer experts, would say."""

import copy

import pytest
import torch
from torch import nn

from hubpath_fast.model import FixedRoutes, HubPathway, make_aggregator
from hubpath_fast.runs.answers import ask

N, M, C, F = 24, 4, 3, 5


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.clean, self.noise = nn.Linear(F, M), nn.Linear(F, M)

    def forward(self, x):
        return self.clean(x), self.noise(x)


def make_hub(aggregator="linear", k=2, seed=0, renormalize=False):
    torch.manual_seed(seed)
    made = make_aggregator(aggregator, M, C)
    for p in made.parameters():
        nn.init.normal_(p)
    experts = [nn.Linear(F, C) for _ in range(M)]
    hub = HubPathway(experts, Scores(), made, k=k, renormalize=renormalize)
    return hub.double().eval()


def answers_of(hub):
    x = torch.randn(N, F, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    batches = [(x[:10], torch.zeros(10)), (x[10:], torch.ones(N - 10))]
    return x, ask(hub, batches, "cpu")


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("aggregator", ["linear", "sum", "mlp"])
def test_all_experts_predict_what_the_model_predicts(aggregator, renormalize):
    hub = make_hub(aggregator, renormalize=renormalize)
    x, answers = answers_of(hub)
    # Sums of some tens of numbers of about 1 in float64, in another order: 1e-12 is generous.
    torch.testing.assert_close(answers.predict(), hub(x), rtol=0, atol=1e-12)
    assert answers.targets.tolist() == [0] * 10 + [1] * (N - 10)


def test_a_subset_predicts_what_a_hub_of_it_predicts():
    hub = make_hub()
    x, answers = answers_of(hub)
    kept = [0, 2, 3]
    less = copy.deepcopy(hub)
    experts = [less.experts[i] for i in kept]
    rest = HubPathway(experts, Rows(less.generator, kept), k=2, num_outputs=C)
    blocks = less.aggregator.weight.unflatten(1, (M, C))[:, kept].flatten(1)
    rest.aggregator.weight.data, rest.aggregator.bias.data = blocks, less.aggregator.bias.data
    expected = rest.double().eval()(x)
    torch.testing.assert_close(answers.predict(kept), expected, rtol=0, atol=1e-12)


class Rows(nn.Module):
    def __init__(self, generator, kept):
        super().__init__()
        self.generator, self.kept = generator, kept

    def forward(self, x):
        clean, noise = self.generator(x)
        return clean[:, self.kept], noise[:, self.kept]


def test_another_k_predicts_what_the_model_predicts_with_it():
    hub = make_hub()
    x, answers = answers_of(hub)
    hub.k = 3
    torch.testing.assert_close(answers.predict(k=3), hub(x), rtol=0, atol=1e-12)


def test_experts_that_are_not_asked_do_not_spoil_the_outputs():
    hub = make_hub()
    _, answers = answers_of(hub)
    expected = answers.predict([0, 1, 2])
    answers.outputs[:, 3] = torch.nan
    assert torch.equal(answers.predict([0, 1, 2]), expected)


def test_weights_by_hand():
    hub = make_hub(k=1)
    _, answers = answers_of(hub)
    answers.clean[0] = torch.tensor([0.0, 2.0, 1.0, -1.0]).log1p().nan_to_num(neginf=-9.0)
    # exp: 1, 3, 2, e^-9; without expert 1 the largest is 2 of 3 + e^-9.
    expected = torch.zeros(M, dtype=torch.float64)
    expected[2] = 2 / (3 + torch.tensor(-9.0, dtype=torch.float64).exp())
    torch.testing.assert_close(answers.weights([0, 2, 3])[0], expected, rtol=0, atol=1e-7)


def test_the_models_mode_and_gradients_stay():
    hub = make_hub().train()
    _, answers = answers_of(hub)
    assert hub.training
    assert hub.experts[0].training
    assert not answers.outputs.requires_grad
    assert not answers.clean.requires_grad


def test_fixed_routes_and_an_empty_split_are_refused():
    hub = make_hub()
    with pytest.raises(ValueError, match="at least one image"):
        ask(hub, [], "cpu")
    hub.generator = FixedRoutes([0, 1], [0.5, 0.5], M)
    with pytest.raises(ValueError, match="fixed routes"):
        ask(hub, [], "cpu")
