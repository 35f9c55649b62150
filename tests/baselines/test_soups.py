"""Soups against averages by hand, greedy choices on a made-up table, and BatchNorm's statistics."""

import copy

import pytest
import torch
from torch import nn

from hubpath_fast.baselines.architectures import difference
from hubpath_fast.baselines.soups import greedy_soup, reestimate_batchnorm, uniform_soup
from hubpath_fast.hub import Resized, RunningStatistics
from hubpath_fast.measure import Measure
from hubpath_fast.tasks import Classification

ACCURACY = Measure("accuracy")
TASK = Classification(("a", "b", "c", "d"))


def net(seed=0, width=3, stride=1):
    """A network for images of 2 channels and 4 pixels a side, in evaluation mode."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(2, width, 1, stride=stride), nn.BatchNorm2d(width), nn.Dropout(0.5)
    head = nn.Linear(width * (4 // stride) ** 2, 2)
    return nn.Sequential(*layers, nn.Flatten(), head).eval()


def test_a_uniform_soup_is_the_mean_rounded_once():
    """bfloat16 around 256 knows even numbers only: adding up in it would lose the ones."""
    states = [
        {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([256.0], dtype=torch.bfloat16)},
        {"w": torch.tensor([4.0, -8.0]), "b": torch.tensor([1.0], dtype=torch.bfloat16)},
        {"w": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0], dtype=torch.bfloat16)},
    ]
    soup = uniform_soup(states)
    assert soup["w"].tolist() == [2.0, -2.0]
    assert soup["w"].dtype == torch.float32
    assert soup["b"].tolist() == [86.0]
    assert soup["b"].dtype == torch.bfloat16


def test_a_soup_of_networks_by_hand():
    models = [net(seed).double() for seed in range(3)]
    models[0][1].num_batches_tracked += 7
    states = [model.state_dict() for model in models]
    before = copy.deepcopy(states)
    soup = uniform_soup(states)
    assert list(soup) == list(states[0])
    for name in ("0.weight", "1.running_var", "4.bias"):
        by_hand = (states[0][name] + states[1][name] + states[2][name]) / 3
        torch.testing.assert_close(soup[name], by_hand, rtol=1e-15, atol=1e-15)
    assert soup["1.num_batches_tracked"].item() == 7
    for name in soup:
        soup[name].zero_()
    for old, state in zip(before, states, strict=True):
        assert all(torch.equal(old[name], state[name]) for name in state)
    models[0].load_state_dict(soup)


def numbered(count):
    """States that can be told apart in any average: powers of two."""
    return [{"w": torch.tensor([2.0**i], dtype=torch.float64)} for i in range(count)]


def scorer(table, calls):
    """Looks a soup up by its ingredients, which the mean betrays."""
    means = {sum(2.0**i for i in key) / len(key): key for key in table}

    def score(state):
        key = means[state["w"].item()]
        calls.append(key)
        return table[key]

    return score


def test_a_greedy_soup_leaves_out_what_lowers_the_score():
    """By their own scores: 2 (0.9), then 0 and 3 (0.8, the lower index first), then 1 (0.5).
    0 lowers the soup; 3 leaves it as it is, and stays; 1, the worst alone, raises it."""
    table = {(0, 2): 0.89, (2, 3): 0.9, (1, 2, 3): 0.95}
    calls = []
    soup, chosen = greedy_soup(numbered(4), scorer(table, calls), ACCURACY, [0.8, 0.5, 0.9, 0.8])
    assert calls == [(0, 2), (2, 3), (1, 2, 3)]
    assert chosen == [2, 3, 1]
    assert soup["w"].item() == (4 + 8 + 2) / 3


def test_a_greedy_soup_compares_with_the_soup_so_far():
    """2 would equal the best state alone (0.7), but not the soup with 1 (0.8)."""
    table = {(0,): 0.7, (1,): 0.6, (2,): 0.5, (0, 1): 0.8, (0, 1, 2): 0.7}
    calls = []
    soup, chosen = greedy_soup(numbered(3), scorer(table, calls), ACCURACY)
    assert calls == [(0,), (1,), (2,), (0, 1), (0, 1, 2)]
    assert chosen == [0, 1]
    assert soup["w"].item() == 1.5


def test_states_of_different_architectures_are_refused():
    a, wider = net().state_dict(), net(width=4).state_dict()
    less = {name: value for name, value in a.items() if name != "0.bias"}
    match = (
        r"equal architectures, but 0.weight is float32 \[3, 2, 1, 1\] in state 0, .*\[4, 2, 1, 1"
    )
    with pytest.raises(ValueError, match=match):
        uniform_soup([a, a, wider])
    with pytest.raises(ValueError, match=r"0.bias is in state 0, not in state 1"):
        greedy_soup([a, less], lambda _: 0.5, ACCURACY)
    with pytest.raises(ValueError, match=r"0.bias is in state 1, not in state 0"):
        uniform_soup([less, a])


def test_bad_arguments():
    with pytest.raises(ValueError, match="states: got none"):
        uniform_soup([])
    with pytest.raises(ValueError, match="expected 2, one for each state, got 1"):
        greedy_soup(numbered(2), len, ACCURACY, scores=[0.1])
    with pytest.raises(ValueError, match="got NaN for state 1"):
        greedy_soup(numbered(2), len, ACCURACY, scores=[0.1, float("nan")])


def test_batchnorm_gets_the_mean_statistics_of_the_batches():
    """Of two batches of 4 and 3 images, without the dropout that comes before it."""
    convolution, bn, dropout, *rest = net()
    model = RunningStatistics(nn.Sequential(convolution, dropout, bn, *rest)).train()
    bn.momentum = 0.3
    batches = [(torch.randn(n, 2, 4, 4) + n, "target") for n in (4, 3, 5)]
    reestimate_batchnorm(model, iter(batches), num_batches=2)
    inner = [convolution(images).transpose(0, 1).flatten(1) for images, _ in batches[:2]]
    mean = sum(x.mean(1) for x in inner) / 2
    var = sum(x.var(1) for x in inner) / 2
    torch.testing.assert_close(bn.running_mean, mean.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bn.running_var, var.detach(), rtol=1e-5, atol=1e-6)
    assert (bn.momentum, bn.training, dropout.training) == (0.3, False, True)


def test_batchnorm_without_batches():
    model = net()
    model[1].running_mean += 1
    with pytest.raises(ValueError, match="batches: got none"):
        reestimate_batchnorm(model, [])
    assert model[1].running_mean.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="num_batches"):
        reestimate_batchnorm(model, [torch.zeros(1)], num_batches=0)
    reestimate_batchnorm(nn.Linear(1, 1), None)  # no such layers: nothing is read


def test_difference():
    models = [net(0), net(1)]
    assert difference(models) is None
    assert difference(models[:1]) is None
    assert difference([RunningStatistics(models[0]), Resized(models[1], 8)]) is None
    wider = difference([*models, net(width=4)])
    assert wider.startswith("model 0 (Sequential) and model 2 (Sequential) have different arch")
    assert "0 is Conv2d(2, 3" in wider
    assert "Conv2d(2, 4" in wider
    assert "stride=(2, 2)" in difference([models[0], net(stride=2)], ["a", "b"])
    assert difference([models[0], net(stride=2)], ["a", "b"]).startswith("a and b have")
    assert "Sequential, the other" in difference([models[0], nn.Linear(1, 1)])
    extra = nn.Sequential(*net(2), nn.ReLU())
    assert difference([*models, extra]).endswith("only the other has 5")
    rate = net(3)
    rate[2].p = 0.1
    assert difference([*models, rate]) is None
    for model in (models[0], rate):  # a parameter that is no layer's own
        model.scale = nn.Parameter(torch.ones(2 if model is rate else 1))
    assert difference([models[0], rate]).endswith("scale is [1] in one and [2] in the other")
