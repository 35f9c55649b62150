"""Stacking: both forms reach their optimum, and no image is judged by weights that know it."""

import dataclasses

import pytest
import torch
from support.shelf_problems import clusters, drawn

from hubpath_fast.shelf.rivals import costs, score
from hubpath_fast.shelf.rivals.stacking import MIXTURE, PRODUCT, combine, fit, stacked
from hubpath_fast.shelf.rivals.static import uniform


def mixture_loss(weights, likelihood, decay):
    """What expectation and maximisation lower, over n: its own words."""
    return -((likelihood @ weights).log().sum() + decay * weights.log().mean()) / len(likelihood)


def test_a_mixture_is_the_most_likely_one():
    problem = drawn()
    log_probs, targets = problem.log_probs["validation"], problem.targets["validation"]
    [found] = fit(MIXTURE, log_probs, targets, torch.ones(1, 40), torch.tensor([3.0]))
    likelihood = (-problem.losses("validation").double()).exp()
    free = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([free], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = mixture_loss(free.softmax(0), likelihood, 3.0)
        loss.backward()
        return loss

    solver.step(closure)
    assert found.sum().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(found, free.detach().softmax(0).float(), atol=1e-3, rtol=0)


def test_a_product_has_no_slope_left():
    problem = drawn()
    log_probs, targets = problem.log_probs["validation"], problem.targets["validation"]
    decays = torch.tensor([0.003, 0.3])
    found = fit(PRODUCT, log_probs, targets, torch.ones(2, 40), decays)
    for weights, decay in zip(found, decays, strict=True):
        free = weights.double().requires_grad_()
        logits = torch.einsum("m,mnc->nc", free, log_probs.double())
        loss = torch.nn.functional.cross_entropy(logits, targets)
        (loss + decay / 2 * (free - 1 / 6).square().sum()).backward()
        assert free.grad.abs().max() < 1e-4  # float32 sums of 40 images, and LBFGS's own bound


@pytest.mark.parametrize("form", [MIXTURE, PRODUCT])
def test_problems_solved_at_once_are_those_solved_alone(form):
    problem = drawn()
    log_probs, targets = problem.log_probs["validation"], problem.targets["validation"]
    seen = torch.ones(2, 40)
    seen[0, 30:] = 0
    at_once = fit(form, log_probs, targets, seen, torch.tensor([0.3, 0.3]))
    alone = fit(form, log_probs[:, :30], targets[:30], torch.ones(1, 30), torch.tensor([0.3]))
    torch.testing.assert_close(at_once[:1], alone, atol=1e-3, rtol=0)
    assert (at_once[0] - at_once[1]).abs().max() > 0.01


def test_the_model_that_knows_gets_the_weight_and_others_none_of_it():
    problem = drawn(models=8, images=60)
    problem.targets["validation"] = problem.log_probs["validation"][5].argmax(-1)
    problem.targets["test"] = problem.log_probs["test"][5].argmax(-1)
    stack, mean = stacked(problem), uniform(problem)
    target = problem.targets["test"]
    of_stack, of_mean = (score(a.probabilities["test"], target) for a in (stack, mean))
    assert of_stack["accuracy"] > 0.9 > of_mean["accuracy"] + 0.1
    assert of_stack["loss"] < of_mean["loss"]
    assert costs(stack, problem)["forwards"] == 8


def test_of_two_equal_models_neither_form_prefers_one():
    log_probs = clusters().log_probs["validation"][:1].expand(2, -1, -1)
    targets = clusters().targets["validation"]
    for form in (MIXTURE, PRODUCT):
        [weights] = fit(form, log_probs, targets, torch.ones(1, 24), torch.tensor([1.0]))
        assert weights[0].item() == pytest.approx(weights[1].item(), abs=1e-6)


def test_an_image_is_judged_by_weights_that_do_not_know_it():
    problem = drawn()
    before = stacked(problem)
    changed = problem.targets["validation"].clone()
    changed[7] = (changed[7] + 1) % 4
    after = stacked(
        dataclasses.replace(problem, targets={**problem.targets, "validation": changed})
    )
    assert before.chosen == after.chosen
    said = [answer.probabilities["validation"] for answer in (before, after)]
    torch.testing.assert_close(said[0][7], said[1][7], atol=1e-6, rtol=0)
    assert (said[0] - said[1]).abs().max() > 1e-4


def test_test_images_are_judged_by_weights_that_know_all_validation_images():
    problem = drawn()
    log_probs, targets = problem.log_probs["validation"], problem.targets["validation"]
    answer = stacked(problem)
    form, decay = answer.chosen["form"], torch.tensor([answer.chosen["decay"]])
    [weights] = fit(form, log_probs, targets, torch.ones(1, 40), decay)
    expected = combine(form, problem.log_probs["test"], weights)
    torch.testing.assert_close(answer.probabilities["test"], expected, atol=2e-3, rtol=0)


def test_combining_is_what_the_formulas_say():
    log_probs = drawn().log_probs["test"]
    weights = torch.tensor([0.5, 0.0, 0.25, 0.0, 0.25, 0.0])
    mixed = sum(w * p.exp() for w, p in zip(weights, log_probs, strict=True))
    torch.testing.assert_close(combine(MIXTURE, log_probs, weights), mixed)
    product = sum(w * p for w, p in zip(weights, log_probs, strict=True)).softmax(-1)
    torch.testing.assert_close(combine(PRODUCT, log_probs, weights), product)
