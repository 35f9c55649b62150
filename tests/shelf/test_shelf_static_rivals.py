"""Rivals that ask the same models about every image, the oracle, and what answers cost."""

import itertools
import math

import pytest
import torch
from support.shelf_problems import clusters, drawn, problem_of_logits

from hubpath_fast.shelf.rivals import Answer, costs, score
from hubpath_fast.shelf.rivals.static import (
    best_single,
    oracle,
    random_sets,
    static_best,
    uniform,
)


def test_the_best_single_model_has_the_least_validation_loss():
    problem = drawn()
    answer = best_single(problem)
    losses = [
        torch.nn.functional.cross_entropy(each.double(), problem.targets["validation"]).item()
        for each in problem.log_probs["validation"]
    ]
    best = losses.index(min(losses))
    assert answer.chosen == {"models": [f"model{best}"]}
    torch.testing.assert_close(answer.probabilities["test"], problem.log_probs["test"][best].exp())
    found = costs(answer, problem)
    assert found == {"forwards": 1.0, "parameters": 100.0 * (best + 1), "ms": best + 1.0}


def test_one_model_is_right_about_its_own_cluster_alone_and_two_averaged_tell_neither():
    problem = clusters()
    found = best_single(problem).probabilities
    assert score(found["test"], problem.targets["test"])["accuracy"] == 0.5
    # The mean gives the right class and the one after it the same probability.
    mean = uniform(problem).probabilities["test"]
    top = mean.topk(2).values
    torch.testing.assert_close(top[:, 0], top[:, 1])


@pytest.mark.parametrize("seed", range(4))
def test_the_static_best_two_are_the_best_pair_with_the_best_model(seed):
    problem = drawn(k=2, seed=seed)
    first = int(problem.losses("validation").mean(0).argmin())
    probabilities = problem.log_probs["validation"].exp()
    pairs = {}
    for second in set(range(6)) - {first}:
        mean = (probabilities[first] + probabilities[second]) / 2
        pairs[second] = score(mean, problem.targets["validation"])["loss"]
    best = min(pairs, key=pairs.get)
    answer = static_best(problem)
    assert set(answer.chosen["models"]) == {f"model{first}", f"model{best}"}
    found = score(answer.probabilities["validation"], problem.targets["validation"])
    assert found["loss"] == pytest.approx(pairs[best], abs=1e-6)
    assert costs(answer, problem)["forwards"] == 2


def test_all_models_at_random_are_the_mean_of_all():
    problem = drawn(k=6)
    answer, mean = random_sets(problem), uniform(problem)
    target = problem.targets["test"]
    for found in answer.probabilities["test"]:
        torch.testing.assert_close(found, mean.probabilities["test"])
    assert score(answer.probabilities["test"], target) == pytest.approx(
        score(mean.probabilities["test"], target), abs=1e-6
    )
    assert costs(answer, problem) == costs(mean, problem)
    assert costs(mean, problem) == {"forwards": 6, "parameters": 2100, "ms": 21}


def test_random_sets_have_k_models_each_and_are_scored_one_by_one():
    problem = drawn(k=2)
    answer = random_sets(problem)
    probabilities = problem.log_probs["test"].exp()
    pairs = [(probabilities[list(pair)].mean(0)) for pair in itertools.combinations(range(6), 2)]
    for found in answer.probabilities["test"]:
        assert any(torch.allclose(found, pair, atol=1e-6) for pair in pairs)
    each = [score(p, problem.targets["test"])["loss"] for p in answer.probabilities["test"]]
    found = score(answer.probabilities["test"], problem.targets["test"])["loss"]
    assert found == pytest.approx(math.fsum(each) / len(each))
    assert costs(answer, problem)["forwards"] == pytest.approx(2)


def test_the_oracle_is_right_where_any_model_is():
    problem = drawn()
    for split in ("validation", "test"):
        target = problem.targets[split]
        anyone = (problem.log_probs[split].argmax(-1) == target).any(0)
        found = oracle(problem).probabilities[split]
        assert torch.equal(found.argmax(-1) == target, anyone)
    assert costs(oracle(problem), problem)["forwards"] == 1


def test_the_oracle_takes_the_model_that_is_right_before_the_surest_and_then_the_surest():
    first = [[0.40, 0.35, 0.25], [0.1, 0.2, 0.7], [0.1, 0.2, 0.7]]
    second = [[0.45, 0.55, 0.0], [0.3, 0.0, 0.7], [0.8, 0.1, 0.1]]
    probabilities = torch.tensor([first, second])
    logits, targets = probabilities.log(), torch.tensor([0, 0, 0])
    vectors = torch.zeros(3, 1)
    both = dict.fromkeys(("validation", "test"), logits)
    problem = problem_of_logits(both, dict.fromkeys(both, targets), dict.fromkeys(both, vectors))
    answer = oracle(problem)
    assert answer.asked.tolist() == [[1, 0], [0, 1], [0, 1]]
    assert answer.probabilities["test"][:, 0].tolist() == pytest.approx([0.40, 0.3, 0.8])


def test_costs_are_those_of_the_models_that_run():
    problem = drawn(models=3)
    asked = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    answer = Answer({}, asked, extra_parameters=7)
    assert costs(answer, problem) == {"forwards": 1.5, "parameters": 307, "ms": 2.0}
    everything = Answer({}, asked, kept=torch.ones(3))
    assert costs(everything, problem)["parameters"] == 600
    problem.ms[2] = problem.parameters[2] = math.nan  # not asked: it does not matter
    assert costs(answer, problem)["ms"] == 2.0
    problem.ms[1] = math.nan
    assert costs(answer, problem)["ms"] is None
    assert costs(everything, problem)["parameters"] is None


def test_losses_are_cross_entropies_and_none_is_infinite():
    problem = drawn()
    for i, each in enumerate(problem.log_probs["test"]):
        expected = torch.nn.functional.cross_entropy(
            each, problem.targets["test"], reduction="none"
        )
        torch.testing.assert_close(problem.losses("test")[:, i], expected)
    never = torch.tensor([[1.0, 0.0]])
    assert score(never, torch.tensor([1])) == {"accuracy": 0, "loss": -math.log(1e-12)}


@pytest.mark.parametrize("k", [0, 7])
def test_k_is_of_the_models(k):
    with pytest.raises(ValueError, match=rf"k: expected an integer in 1\.\.6.*got {k}"):
        drawn(k=k)


def test_without_validation_images_nothing_can_be_chosen():
    with pytest.raises(ValueError, match="no validation images"):
        drawn(images=0)


def test_without_test_images_the_validation_images_are_scored():
    problem = drawn()
    problem.log_probs["test"], problem.targets["test"] = torch.zeros(6, 0, 4), torch.zeros(0).long()
    answer = uniform(problem)
    assert problem.split == "validation"
    assert set(answer.probabilities) == {"validation"}
    assert answer.asked.shape == (40, 6)
