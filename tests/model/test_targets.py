"""Targets of several tensors, and the loss of each sample."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.pathway import CLOSE, MapExpert, build
from torch import Tensor

import hubpath_fast as hp
from hubpath_fast import reference


class Taken(NamedTuple):
    actions: Tensor
    target: Tensor


def chosen_action(prediction, y):
    """Of a policy: cross-entropy of the chosen action's distribution [N, A, Z] -> [N]."""
    actions, target = (y["actions"], y["target"]) if isinstance(y, dict) else y
    rows = torch.arange(len(actions))
    return -(target * F.log_softmax(prediction.flatten(2), 2)[rows, actions]).sum(1)


def batch(n=9):
    ours, truth, x, _, eps = build(n, 3, 2, expert=MapExpert, num_outputs=7)
    actions = torch.randint(0, 7, (n,))
    target = torch.softmax(torch.randn(n, 6, dtype=torch.float64), 1)
    return ours, truth, x, eps, actions, target, torch.rand(n, dtype=torch.float64)


@pytest.mark.parametrize(
    "make",
    [tuple, lambda pair: Taken(*pair), lambda pair: dict(zip(("actions", "target"), pair))],  # noqa: B905
    ids=["tuple", "named tuple", "dict"],
)
def test_targets_of_several_tensors_give_the_rows_of_each(make):
    ours, truth, x, eps, actions, target, weight = batch()
    out, expected = ours(x, eps), truth(x, eps)
    losses = hp.HubPathwayLoss(chosen_action, explore=0.3)(out, make((actions, target)), weight)
    # The formula, row by row: what a row is compared with is its own sample's.
    of_sample = [chosen_action(expected.prediction, (actions, target)), None]
    exploit, k = 0, expected.routing.k
    for row, slot in enumerate(expected.routing.rows.tolist()):
        n = slot // k
        pair = actions[n : n + 1], target[n : n + 1]
        exploit += weight[n] * chosen_action(expected.expert_outputs[row : row + 1], pair)[0]
    torch.testing.assert_close(losses.per_sample, of_sample[0], **CLOSE)
    torch.testing.assert_close(losses.task, (of_sample[0] * weight).mean(), **CLOSE)
    torch.testing.assert_close(losses.exploit, exploit / len(x), **CLOSE)


def test_a_named_tuple_stays_one():
    seen = []

    def loss(prediction, y):
        seen.append(y)
        return chosen_action(prediction, (y.actions, y.target))

    ours, _, x, eps, *y, _ = batch()
    hp.HubPathwayLoss(loss)(ours(x, eps), Taken(*y))
    assert [type(y) for y in seen] == [Taken, Taken]
    assert [len(y.actions) for y in seen] == [9, 18]  # the samples, then their rows


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_each_sample_is_not_weighted(weighted):
    ours, truth, x, y, eps = build(11, 4, 2)
    weight = torch.rand(11, dtype=torch.float64) if weighted else None
    losses = hp.HubPathwayLoss(label_smoothing=0.1)(ours(x, eps), y, weight)
    expected = truth(x, eps).prediction
    per_sample = F.cross_entropy(expected, y, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(losses.per_sample, per_sample, **CLOSE)
    _, task, *_ = reference.losses(truth(x, eps), y, 0.5, sample_weight=weight)
    assert losses.per_sample.shape == (11,)
    if weighted:
        torch.testing.assert_close((losses.per_sample * weight).mean(), losses.task, **CLOSE)
    else:
        without = hp.HubPathwayLoss()(ours(x, eps), y)
        torch.testing.assert_close(without.per_sample.mean(), task, **CLOSE)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ((torch.zeros(9), torch.zeros(8)), r"y\[1\]: expected 9 targets as predictions, got \[8\]"),
        ({"boxes": torch.zeros(2, 9)}, r"y\['boxes'\]: expected 9 .*got \[2, 9\]"),
        ((torch.zeros(9), (torch.zeros(9), 3)), r"y\[1\]\[1\]: expected 9 .*got int"),
        ((), "y: expected targets, got an empty tuple"),
        (torch.tensor(3), r"y: expected 9 targets as predictions, got \[\]"),
    ],
)
def test_a_part_of_another_length_is_refused_by_name(y, message):
    ours, _, x, eps, *_ = batch()
    with pytest.raises(ValueError, match=message):
        hp.HubPathwayLoss(chosen_action)(ours(x, eps), y)
