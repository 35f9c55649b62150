"""Greedy selection against trying all candidates one by one, and what budgets allow."""

import math

import pytest
import torch
from torch.nn.functional import nll_loss

from hubpath_fast.features import ShelfModel
from hubpath_fast.shelf.selection import OBJECTIVES, Budget, greedy

MODELS, IMAGES, CLASSES = 7, 40, 3


def logits_and_targets(seed=0, scale=3.0):
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (IMAGES,), generator=draw)
    logits = scale * torch.randn(MODELS, IMAGES, CLASSES, generator=draw)
    skill = torch.rand(MODELS, IMAGES, generator=draw)
    logits[:, torch.arange(IMAGES), targets] += 3 * skill
    return logits, targets


def costing(parameters, ms):
    pairs = enumerate(zip(parameters, ms, strict=True))
    return [ShelfModel(f"m{i}", f"m{i}", i, "", 1, parameters=p, ms=t) for i, (p, t) in pairs]


def worth(logits, targets, members, objective):
    """The loss and the accuracy of a set, from the definition."""
    p = logits[list(members)].double().softmax(2)
    if objective == "ensemble":
        mean = p.mean(0)
        return float(nll_loss(mean.log(), targets)), float(
            (mean.argmax(1) == targets).double().mean()
        )
    own = -p[:, torch.arange(len(targets)), targets].log()
    right = (p.argmax(2) == targets).any(0)
    return float(own.min(0).values.mean()), float(right.double().mean())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", range(3))
def test_each_choice_is_the_best_of_all_that_are_left(objective, seed):
    logits, targets = logits_and_targets(seed)
    found = greedy(logits, targets, MODELS, objective)
    assert sorted(chosen.index for chosen in found) == list(range(MODELS))
    members = []
    for chosen in found:
        left = [i for i in range(MODELS) if i not in members]
        losses = {i: worth(logits, targets, [*members, i], objective)[0] for i in left}
        assert chosen.index == min(losses, key=losses.get)
        members.append(chosen.index)
        loss, accuracy = worth(logits, targets, members, objective)
        assert chosen.loss == pytest.approx(loss, rel=1e-12)
        assert chosen.accuracy == pytest.approx(accuracy, abs=1e-12)


def test_routing_takes_models_that_know_different_images_and_an_ensemble_those_that_agree():
    targets = torch.zeros(30, dtype=torch.int64)
    logits = torch.zeros(4, 30, 2)
    logits[0, :, 0] = 1.5  # knows a little of all
    logits[1, :10, 0], logits[2, 10:20, 0], logits[3, 20:, 0] = 9.0, 9.0, 9.0
    logits[1, 10:, 1] = logits[2, :10, 1] = logits[2, 20:, 1] = logits[3, :20, 1] = 4.0
    assert [c.index for c in greedy(logits, targets, 4, "routing")] == [0, 1, 2, 3]
    routed = greedy(logits, targets, 4, "routing")
    assert routed[3].loss < 1e-3 < routed[2].loss
    together = greedy(torch.stack([*logits, logits[0]]), targets, 2, "ensemble")
    assert [c.index for c in together] == [0, 4]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_of_equals_the_first_is_taken(objective):
    logits, targets = logits_and_targets()
    found = greedy(logits[[3, 3, 3]], targets, 3, objective)
    assert [chosen.index for chosen in found] == [0, 1, 2]


def test_a_model_that_does_not_fit_is_passed_over_for_the_next_best():
    logits, targets = logits_and_targets()
    free = [chosen.index for chosen in greedy(logits, targets, 2)]
    parameters = [10] * MODELS
    parameters[free[1]] = 50
    models = costing(parameters, [1.0] * MODELS)
    found = greedy(logits, targets, Budget(parameters=45), models=models)
    assert found[0].index == free[0]
    assert free[1] not in [chosen.index for chosen in found]
    assert [chosen.parameters for chosen in found] == [10, 20, 30, 40]
    assert [chosen.ms for chosen in found] == [1.0, 2.0, 3.0, 4.0]
    found = greedy(logits, targets, Budget(models=3, parameters=45, ms=2.0), models=models)
    assert len(found) == 2
    # 0.1 + 0.1 + 0.1 is above 0.3 in float64.
    tenths = costing([1] * MODELS, [0.1] * MODELS)
    assert len(greedy(logits, targets, Budget(ms=0.3), models=tenths)) == 3


def test_costs_that_are_not_known_are_no_budget():
    logits, targets = logits_and_targets()
    models = costing([None] * MODELS, [1.0, None, *[1.0] * (MODELS - 2)])
    found = greedy(logits, targets, 3, models=models)
    assert {chosen.parameters for chosen in found} == {None}
    for budget, given in ((Budget(parameters=5), models), (Budget(ms=5.0), models)):
        with pytest.raises(ValueError, match=r"are not known; give a number of models"):
            greedy(logits, targets, budget, models=given)
    with pytest.raises(ValueError, match="the ms of these models are not known"):
        greedy(logits, targets, Budget(ms=5.0))


def test_what_no_model_fits_or_nobody_knows_is_refused():
    logits, targets = logits_and_targets()
    models = costing([10] * MODELS, [2.0] * MODELS)
    with pytest.raises(ValueError, match=r"no model fits .*; the least costs 2 ms"):
        greedy(logits, targets, Budget(ms=1.0), models=models)
    for value in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="models: expected a number above 0"):
            Budget(models=value)
    with pytest.raises(ValueError, match="expected ensemble or routing, got 'best'"):
        greedy(logits, targets, 3, "best")


def test_probabilities_that_underflow_break_nothing():
    logits, targets = logits_and_targets(scale=1.0)
    logits[2, 5, targets[5]] = -5000.0
    for objective in OBJECTIVES:
        assert all(math.isfinite(c.loss) for c in greedy(logits, targets, MODELS, objective))
