"""Policies, ensembles and cascades of stored answers, against values computed by hand."""

import math

import pytest
import torch
from torch import nn

import hubpath_fast as hp
from hubpath_fast.runs.answers import HubAnswers
from hubpath_fast.runs.budget import Cascade, Costs, Judge, best_within, candidates
from hubpath_fast.tasks import Classification

F64 = torch.float64
P = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.1, 0.3, 0.6]], dtype=F64)
COSTS = Costs(1.0, (1.0, 2.0, 4.0))
# The expert that knows each image: what p says, but for the last, which the second one knows too.
KNOWN = [[0], [1], [2], [1, 2]]


class Sum(nn.Module):
    """The experts' weighted outputs, added up."""

    def forward(self, concat):
        return concat.unflatten(1, (-1, 2)).sum(dim=1)


def answers(k, probabilities=None):
    """Of two classes, 0 being right: +-1 where an expert knows the image or not; or logits of given
    probabilities [M, n] of class 0."""
    if probabilities is None:
        signs = torch.tensor([[1.0 if i in own else -1.0 for i in range(3)] for own in KNOWN])
        outputs = torch.stack([signs, -signs], dim=2).double()
        return HubAnswers(P.log(), outputs, torch.zeros(4, dtype=torch.long), k, False, Sum())
    p = torch.tensor(probabilities, dtype=F64).t()
    outputs = torch.stack([p, 1 - p], dim=2).log()
    return HubAnswers(
        torch.zeros(p.shape, dtype=F64), outputs, torch.tensor([0, 0, 1]), k, False, Sum()
    )


def judge(k=1, costs=COSTS):
    return Judge(answers(k), Classification(("a", "b")), costs)


@pytest.mark.parametrize(
    ("budget", "mu", "cost", "value"),
    [
        # 1 + (1 + 2 + 4 + 4) / 4 without a penalty: within 4.
        (4.0, 0.0, 3.75, 1.0),
        # The last image leaves expert 2 for 1 at log(2) / 2, the third for 0 at log(3) / 3.
        (3.25, math.log(2) / 2, 3.25, 1.0),
        (2.6, math.log(3) / 3, 2.5, 0.75),
        # The last goes on to expert 0 at log 3, the second at log 8: all are with the cheapest.
        (2.25, math.log(3), 2.25, 0.5),
        (2.0, math.log(8), 2.0, 0.25),
    ],
)
def test_mu_is_the_smallest_that_keeps_the_budget(budget, mu, cost, value):
    found = candidates(judge(), [budget])
    best = min(found, key=lambda candidate: candidate.outcome.milliseconds)
    # An interval of (log 8 + 50) / 1 is halved 30 times.
    assert best.mu == pytest.approx(mu, abs=53 / 2**29)
    assert best.outcome.milliseconds == pytest.approx(cost, rel=1e-12)
    assert best.outcome.value == value
    assert best.outcome.forwards == 1.0
    assert best_within(found, budget, Classification.metric) == best
    assert best.policy.penalty == (None if mu == 0 else pytest.approx((0, best.mu, 3 * best.mu)))


def test_experts_of_one_cost_are_saved_by_share_and_k_alone():
    of_one = judge(k=2, costs=Costs(0.5, (1.0, 1.0, 1.0)))
    found = candidates(of_one, [1.5, 1.75, 2.0, 2.5])
    assert {candidate.mu for candidate in found} == {0.0}
    best = best_within(found, 1.9, Classification.metric)
    assert (best.policy.k, best.policy.top_mass) == (1, None)
    assert best.outcome.milliseconds == 1.5
    assert best_within(found, 1.4, Classification.metric) is None
    costs = {c.policy.top_mass: c.outcome.milliseconds for c in found if c.policy.k == 2}
    assert costs[0.5] == 1.5
    # The likeliest expert holds 0.6 to 0.8; at 0.6, 0.7 and 0.8 roundings decide.
    assert costs[0.9] == costs[None] == 2.5
    assert list(costs.values())[1:] == sorted(list(costs.values())[1:])


def test_a_larger_budget_is_never_worse_on_what_it_was_chosen_on():
    budgets = torch.linspace(2.0, COSTS.full(2), 9).tolist()
    found = candidates(judge(k=2), budgets)
    best = [best_within(found, budget, Classification.metric) for budget in budgets]
    values = [candidate.outcome.value for candidate in best]
    assert values == sorted(values)
    for budget, candidate in zip(budgets, best, strict=True):
        assert candidate.outcome.milliseconds <= budget * (1 + 1e-9)


def test_a_policys_outcome_is_the_models():
    stored = answers(2)
    task = Classification(("a", "b"))
    policy = hp.RoutingPolicy(0.75, [0.0, 0.1, 0.2])
    found = Judge(stored, task, COSTS).policy(policy)
    odds = P * torch.tensor([0.0, -0.1, -0.2], dtype=F64).exp()
    odds = odds / odds.sum(dim=1, keepdim=True)
    cost = correct = rows = 0
    for n in range(4):
        order = odds[n].argsort(descending=True, stable=True).tolist()[:2]
        asked = order[:1] if odds[n, order[0]] >= 0.75 else order
        cost += 1 + sum(COSTS.experts[i] for i in asked)
        rows += len(asked)
        correct += sum(odds[n, i] * (1 if i in KNOWN[n] else -1) for i in asked) > 0
    assert found.milliseconds == pytest.approx(cost / 4, rel=1e-12)
    assert found.forwards == rows / 4
    assert found.value == correct / 4


def test_single_models_and_ensembles_have_no_router():
    alone = judge().ensemble([1])
    assert (alone.value, alone.milliseconds, alone.forwards) == (0.5, 2.0, 1.0)
    # The mean of probabilities: two of three say class 1 of all images but the last.
    both = judge().ensemble([0, 1, 2])
    assert (both.value, both.milliseconds, both.forwards) == (0.25, 7.0, 3.0)


@pytest.mark.parametrize(
    ("budget", "threshold", "cost", "forwards", "value"),
    [
        # Sure after the first: 0.6, 0.9, 0.7; after both: 0.75, 0.65, 0.8.
        (1.0, 0.6, 1.0, 1.0, 1.0),
        (5 / 3, 0.7, 5 / 3, 4 / 3, 1.0),
        (2.0, 0.7, 5 / 3, 4 / 3, 1.0),
        (7 / 3, 0.9, 7 / 3, 5 / 3, 1.0),
        (3.0, 2.0, 3.0, 2.0, 1.0),
    ],
)
def test_a_cascade_goes_on_while_it_is_not_sure(budget, threshold, cost, forwards, value):
    stored = answers(1, [[0.6, 0.9, 0.3], [0.9, 0.4, 0.1]])
    cascade = Cascade(Judge(stored, Classification(("a", "b")), Costs(9.0, (1.0, 2.0))), [0, 1])
    found = cascade.threshold(budget)
    # Probabilities are float32.
    assert found == pytest.approx(threshold, abs=1e-6)
    outcome = cascade.at(found)
    assert outcome.milliseconds == pytest.approx(cost, rel=1e-12)
    assert outcome.forwards == pytest.approx(forwards, rel=1e-12)
    assert outcome.value == value
    assert cascade.threshold(0.99) is None


def test_a_budget_below_the_cheapest_expert_says_what_it_takes():
    COSTS.check(2.0, ["a", "b", "c"])
    says = r"at least 2 ms an image, which the router \(1\) and a, the cheapest expert \(1\), take"
    for budget in (1.99, -1.0, math.nan):
        with pytest.raises(ValueError, match=says):
            COSTS.check(budget, ["a", "b", "c"])
