"""What hubs lose without some of their experts, against values computed by hand."""

import math

import pytest
import torch
from torch import nn

import hubpath_fast.runs.prune as module
from hubpath_fast.measure import Measure
from hubpath_fast.runs.answers import HubAnswers
from hubpath_fast.runs.prune import (
    Loss,
    Losses,
    Step,
    best_of,
    paired_intervals,
    smallest_within,
)
from hubpath_fast.tasks import Classification

F64 = torch.float64
# Scores are the logarithms of these, so a softmax over some experts is their shares.
P = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.1, 0.3, 0.6]]
KNOWN = [[0], [1], [2], [1, 2]]  # the experts that are right about each image
# Experts 1 and 2 stand in for each other.
TWINS = [[0.8, 0.1, 0.1], [0.1, 0.5, 0.4], [0.1, 0.4, 0.5], [0.1, 0.3, 0.6]]
KNOWN_BY_TWINS = [[0], [1, 2], [1, 2], [1, 2]]


class Sum(nn.Module):
    """The experts' weighted outputs, added up."""

    def forward(self, concat):
        return concat.unflatten(1, (-1, 2)).sum(dim=1)


class Errors(Classification):
    """Judged by the share of images that are wrong."""

    metric = Measure("error", "min", (0.0, 1.0), 100, "%", 1)

    def scores(self, predictions, targets):
        return 1 - super().scores(predictions, targets)


def losses(p=P, known=KNOWN, k=1, task=Classification):
    """Of two classes, 0 being right: +-1 where an expert knows the image or not."""
    signs = torch.tensor([[1.0 if i in own else -1.0 for i in range(3)] for own in known])
    outputs = torch.stack([signs, -signs], dim=2).double()
    clean, targets = torch.tensor(p, dtype=F64).log(), torch.zeros(len(p), dtype=torch.long)
    return Losses(HubAnswers(clean, outputs, targets, k, False, Sum()), task(("a", "b")))


def figures(loss):
    return loss.value, loss.lost


@pytest.mark.parametrize("task", [Classification, Errors])
def test_an_experts_images_go_to_the_others(task):
    found = losses(task=task)

    def figure(right):
        return right if task is Classification else 1 - right

    assert found.value == figure(1.0)
    assert found.asked() == [0.25, 0.25, 0.5]
    # Without 0 the first image is wrong, without 1 the second; without 2 the third, and the last
    # goes to 1, which knows it.
    for kept in ([1, 2], [0, 2], [0, 1]):
        assert figures(found.of(kept)) == (figure(0.75), 25.0)
    # 1 alone knows two, 0 alone one.
    assert figures(found.of([1])) == (figure(0.5), 50.0)
    assert figures(found.of([0])) == (figure(0.25), 75.0)
    assert found.of([0, 1, 2]) == Loss(figure(1.0), 0.0, (0.0, 0.0))


def test_two_active_experts_are_weighed():
    found = losses(k=2)
    # The first: 0.7 - 0.2; the second 0.8 - 0.1; the third 0.6 - 0.2; the last 0.6 + 0.3.
    assert found.value == 1.0
    # Without 0 it is 1 - 2 everywhere: shares 2/3, 8/9, 1/4 against 3/4, and both know the last.
    assert figures(found.of([1, 2])) == (0.75, 25.0)


@pytest.mark.parametrize("task", [Classification, Errors])
def test_of_equal_experts_the_one_with_the_least_weight_goes(task):
    # Weights add up to 0.7, 0.8, 1.2; then of 1 and 2 to 2/3 + 8/9 and 3/4 + 2/3.
    steps = losses(task=task).eliminate()
    assert [(step.dropped, step.kept) for step in steps] == [(0, (1, 2)), (2, (1,))]
    assert [step.loss.lost for step in steps] == [25.0, 50.0]


def test_fixed_experts_stay():
    steps = losses().eliminate(fixed=[0])
    assert [(step.dropped, step.kept) for step in steps] == [(1, (0, 2)), (2, (0,))]
    assert [step.kept for step in losses().eliminate(fixed=[0, 1])] == [(0, 1)]


def test_it_ends_at_k_experts():
    assert [len(step.kept) for step in losses(k=2).eliminate()] == [2]


def test_twins_are_not_both_dropped():
    found = losses(TWINS, KNOWN_BY_TWINS)
    # Nothing is lost without the one or the other.
    assert [found.of(kept).lost for kept in ([1, 2], [0, 2], [0, 1])] == [25.0, 0.0, 0.0]
    steps = found.eliminate()
    assert [step.kept for step in steps] == [(0, 2), (2,)]
    assert [step.loss.lost for step in steps] == [0.0, 25.0]
    assert smallest_within(steps, 0.0) == steps[0]
    assert smallest_within(steps, 24.9) == steps[0]
    assert smallest_within(steps, 25.0) == steps[1]


def test_the_smallest_hub_may_lie_behind_a_worse_one():
    lost = [0.4, 0.9, 0.5 + 1e-12, 2.0]
    steps = [Step(i, (), Loss(0.0, points, None)) for i, points in enumerate(lost)]
    assert smallest_within(steps, 0.5) == steps[2]
    assert smallest_within(steps, 0.45) == steps[0]
    assert smallest_within(steps, 0.3) is None


def test_the_best_gains_most_with_the_fewest_experts():
    lost = [-0.5, -1.0, -1.0, 0.0]
    steps = [Step(i, (), Loss(0.0, points, None)) for i, points in enumerate(lost)]
    assert best_of(steps) is steps[2]
    assert smallest_within(steps, -0.9) is steps[2]
    assert smallest_within(steps, -1.1) is None
    assert best_of(steps[3:]) is None
    assert best_of([Step(0, (), Loss(0.0, -1e-13, None))]) is None  # a rounding
    assert best_of([]) is None


def test_an_interval_is_of_differences_on_the_same_images():
    # However much images differ, a hub that loses the same on each loses that in each resample.
    assert paired_intervals(torch.full((1, 50), 0.25, dtype=F64)) == [(0.25, 0.25)]
    assert paired_intervals(torch.tensor([[0.0, 1.0]], dtype=F64)) == [(0.0, 1.0)]
    assert paired_intervals(torch.tensor([[3.0], [4.0]], dtype=F64)) == [None, None]


@pytest.mark.parametrize("at_once", [module.AT_ONCE, 1000])
def test_an_interval_is_the_normal_one_of_many_images(monkeypatch, at_once):
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    differences = torch.linspace(-100, 100, 400, dtype=F64)
    error = 100 / math.sqrt(3 * 400)  # of the mean, 0
    [found] = paired_intervals(differences[None])
    # A quantile of 2,000 draws errs by sqrt(0.025 * 0.975 / 2000) over the density 0.058 there,
    # 0.06 of their deviation; four of these.
    assert found == pytest.approx((-1.96 * error, 1.96 * error), abs=0.24 * error)
    both = paired_intervals(torch.stack([differences / 2, differences]))
    assert both[1] == pytest.approx(found, rel=1e-12)
    assert both[0] == pytest.approx([end / 2 for end in found], rel=1e-12)
    assert paired_intervals(differences[None], seed=1) != [found]


def test_a_hubs_loss_has_the_interval_of_its_images():
    found = losses()
    # Differences 100, 0, 0, 0: of four draws three or more are the first in 5 %, all in 0.4 %.
    low, high = found.of([1, 2]).interval
    assert (low, high) == (0.0, 75.0)
