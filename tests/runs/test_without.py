"""Scores without one expert, and the elimination by them, against predictions of every hub."""

import itertools

import pytest
import torch
from torch import nn

from hubpath_fast.measure import Measure
from hubpath_fast.model import LinearAggregator, NewcomerAggregator, SumAggregator
from hubpath_fast.runs import without as module
from hubpath_fast.runs.answers import HubAnswers, terms
from hubpath_fast.runs.prune import Losses
from hubpath_fast.runs.without import WithoutOne
from hubpath_fast.tasks import Classification

F64 = torch.float64
M, C = 7, 3


class Squares(nn.Module):
    """Not a sum over the experts."""

    def forward(self, concat):
        y = concat.unflatten(1, (-1, C)).sum(dim=1)
        return y + (concat**2).mean(dim=1, keepdim=True) * torch.tensor([1.0, -1.0, 0.5]).to(y)


class Distances(Classification):
    """Judged by how far the outputs are from the target: to the last bit of every weight."""

    metric = Measure("distance", "min", (0.0, None))

    def predict(self, outputs):
        return outputs

    def scores(self, predictions, targets):
        return (predictions - targets[:, None]).abs().flatten(1).mean(dim=1).double()


def linear(num_experts):
    found = LinearAggregator(num_experts, C).double()
    nn.init.normal_(found.weight)
    nn.init.normal_(found.bias)
    return found


AGGREGATORS = {
    "sum": lambda: SumAggregator(M, C),
    "linear": lambda: linear(M),
    "newcomers": lambda: NewcomerAggregator(linear(M - 2), M - 2, 2),
    "other": Squares,
}


def make_answers(kind, k, renormalize=False, seed=0, images=40, ties=False, maps=()):
    """With ties scores and outputs are small integers."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        if ties:
            return torch.randint(-1, 2, shape, generator=random).double()
        return 2 * torch.randn(shape, generator=random, dtype=F64)

    clean, outputs = draw(images, M), draw(images, M, C, *maps)
    targets = torch.randint(C, (images, *maps), generator=random)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        aggregator = AGGREGATORS[kind]()
    return HubAnswers(clean, outputs, targets, k, renormalize, aggregator)


def plain_scores(answers, task, kept):
    """[m, n]: of hubs that are asked as a whole, one after another."""
    rests = [[j for j in kept if j != i] for i in kept]
    predictions = [task.predict(answers.predict(rest)) for rest in rests]
    return torch.stack([task.scores(said, answers.targets) for said in predictions])


def plain_elimination(answers, task):
    """[(dropped, kept)], as the words of ``Losses.eliminate`` have it."""
    kept, found = list(range(M)), []
    while len(kept) > answers.k:
        values = plain_scores(answers, task, kept).mean(dim=1)
        weights = answers.weights(kept).sum(dim=0)
        signed = [-task.metric.sign * value for value in values.tolist()]
        dropped = min(zip(signed, weights[kept].tolist(), kept, strict=True))[2]
        kept = [i for i in kept if i != dropped]
        found.append((dropped, tuple(kept)))
    return found


CASES = list(itertools.product(AGGREGATORS, (1, 2, 3), (False, True)))


@pytest.mark.parametrize(("kind", "k", "renormalize"), CASES)
def test_scores_are_those_of_the_smaller_hubs(kind, k, renormalize):
    answers = make_answers(kind, k, renormalize)
    for kept in (list(range(M)), [0, 2, 3, 6], list(range(k + 1))):
        task = Distances(("a", "b", "c"))
        # In float64: some hundred roundings of values of about 10.
        found, plain = WithoutOne(answers, task).scores(kept), plain_scores(answers, task, kept)
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("task", [Classification, Distances])
@pytest.mark.parametrize(("kind", "k", "renormalize"), CASES)
def test_the_elimination_is_that_of_whole_hubs(kind, k, renormalize, task, ties):
    answers = make_answers(kind, k, renormalize, ties=ties and task is Classification, seed=k)
    learned = task(("a", "b", "c"))
    steps = Losses(answers, learned).eliminate()
    assert [(step.dropped, step.kept) for step in steps] == plain_elimination(answers, learned)


@pytest.mark.parametrize("kind", AGGREGATORS)
def test_losses_without_each_are_those_of_each(kind):
    found = Losses(make_answers(kind, 2), Distances(("a", "b", "c")))
    for i, loss in enumerate(found.of_each()):
        alone = found.of([j for j in range(M) if j != i])
        assert (loss.value, loss.lost) == pytest.approx((alone.value, alone.lost), abs=1e-12)
        assert loss.interval == pytest.approx(alone.interval, abs=1e-12)


@pytest.mark.parametrize("kind", ["sum", "linear"])
def test_maps_are_scored_position_by_position(kind):
    answers = make_answers(kind, 2, maps=(2, 2))
    task, kept = Classification(("a", "b", "c")), list(range(M))
    assert torch.equal(WithoutOne(answers, task).scores(kept), plain_scores(answers, task, kept))


def test_images_are_looked_at_in_parts(monkeypatch):
    answers, task = make_answers("linear", 2), Distances(("a", "b", "c"))
    whole = WithoutOne(answers, task).scores(range(M))
    monkeypatch.setattr(module, "AT_ONCE", 3 * M * C)  # three images, and one is left over
    assert torch.equal(WithoutOne(answers, task).scores(range(M)), whole)


def test_an_expert_that_takes_all_the_weight_leaves_the_order_of_the_others():
    # In float32 the others' shares are 0 while the first is there, and 0.73 and 0.27 without it.
    clean = torch.tensor([[0.0, -201.0, -200.0]])
    outputs = torch.tensor([[[9.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    answers = HubAnswers(clean, outputs, torch.tensor([0]), 1, False, SumAggregator(3, 2))
    found = WithoutOne(answers, Classification(("a", "b"))).scores(range(3))
    assert found[:, 0].tolist() == [1.0, 1.0, 1.0]


def test_what_an_expert_says_with_weight_0_is_of_no_matter():
    answers = make_answers("sum", 2)
    last = answers.clean.argsort(dim=1)[:, :-2]
    answers.clean.scatter_(1, last, -1e4)  # their shares are 0 unless both others are gone
    answers.outputs.scatter_(1, last[:, :, None].expand(-1, -1, C), torch.nan)
    assert not WithoutOne(answers, Distances(("a", "b", "c"))).scores(range(M)).isnan().any()


@pytest.mark.parametrize("kind", ["sum", "linear", "newcomers"])
def test_terms_add_up_to_the_aggregator(kind):
    answers = make_answers(kind, 2, maps=(2,))
    added, bias = terms(answers.aggregator, answers.outputs)
    with torch.no_grad():
        whole = answers.aggregator(answers.outputs.flatten(1, 2))
    torch.testing.assert_close(added.sum(dim=1) + bias, whole, rtol=1e-12, atol=1e-12)
    assert terms(Squares(), answers.outputs) is None
