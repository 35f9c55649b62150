"""The kNN router: against a loop, and where the answer is known."""

import itertools

import torch
from support.shelf_problems import clusters, drawn

from hubpath_fast.shelf.rivals import Look, costs, score
from hubpath_fast.shelf.rivals.nearest import NEIGHBOURS, Neighbours, knn_router, pools, route


def test_each_cluster_goes_to_the_model_that_knows_it():
    problem = clusters()
    answer = knn_router(problem, problem.looks[0])
    for split in ("validation", "test"):
        assert score(answer.probabilities[split], problem.targets[split])["accuracy"] == 1
    assert torch.equal(answer.asked[:, 0], (torch.arange(24) < 12).float())
    assert costs(answer, problem) == {"forwards": 1, "parameters": 300, "ms": 1.5}


def test_training_images_are_looked_up_as_well():
    """The validation images are of the first cluster alone, so they do not tell who knows the
    second; the training images do."""
    problem = clusters()
    losses = problem.losses("validation")
    first = torch.arange(12)
    log_probs = {**problem.log_probs, "validation": problem.log_probs["validation"][:, first]}
    targets = {**problem.targets, "validation": problem.targets["validation"][first]}
    vectors = problem.looks[0].vectors
    look = Look("the image", {**vectors, "validation": vectors["validation"][first],
                              "train": vectors["validation"]})  # fmt: skip
    for train_losses, accuracy in ((None, 0.5), (losses, 1.0)):
        told = type(problem)(
            problem.labels, log_probs, targets, 1, (look,), problem.parameters, problem.ms,
            train_losses,
        )  # fmt: skip
        answer = knn_router(told, look)
        assert score(answer.probabilities["test"], targets["test"])["accuracy"] == accuracy


def test_routes_are_those_of_a_loop():
    problem = drawn(models=5, images=30)
    look, losses = problem.looks[0], problem.losses("validation")
    seen, asked = look.vectors["validation"].double(), look.vectors["test"].double()
    near = Neighbours(look.vectors["validation"]).of(look.vectors["test"])
    members, weights = route(losses, near, 4, [0, 2, 3], 2)
    mean = seen.mean(0)
    for i, vector in enumerate(asked):
        cosines = [
            torch.nn.functional.cosine_similarity(vector - mean, other - mean, dim=0)
            for other in seen
        ]
        order = sorted(range(len(seen)), key=lambda j: -cosines[j])[:4]
        local = {m: losses[order, m].mean() for m in (0, 2, 3)}
        chosen = sorted(local, key=local.get)[:2]
        assert members[i].tolist() == chosen
        likelihoods = torch.stack([(-local[m]).exp() for m in chosen])
        torch.testing.assert_close(weights[i], (likelihoods / likelihoods.sum()))


def test_no_validation_image_is_its_own_neighbour():
    problem = drawn()
    vectors = problem.looks[0].vectors["validation"]
    known = Neighbours(torch.cat([vectors, problem.looks[0].vectors["test"]]))
    near = known.of(vectors, themselves=True)
    assert near.shape == (40, min(NEIGHBOURS[-1], 62))
    assert not (near == torch.arange(40)[:, None]).any()
    assert (known.of(vectors)[:, 0] == torch.arange(40)).all()


def test_the_number_of_neighbours_is_what_loses_the_least_on_validation_images():
    problem = drawn(k=2)
    losses, targets = problem.losses("validation"), problem.targets["validation"]
    vectors = problem.looks[0].vectors["validation"]
    near = Neighbours(vectors).of(vectors, themselves=True)
    found = {}
    for count in (1, 2, 3, 5, 8, 12, 20, 30, 39):
        members, weights = route(losses, near, count, range(6), 2)
        mixed = torch.zeros(40, 4)
        for i in range(40):
            for member, weight in zip(members[i], weights[i], strict=True):
                mixed[i] += weight * problem.log_probs["validation"][member, i].exp()
        found[count] = score(mixed, targets)["loss"]
    answer = knn_router(problem, problem.looks[0])
    assert answer.chosen["neighbours"] == min(found, key=found.get)
    chosen = score(answer.probabilities["validation"], targets)["loss"]
    assert abs(chosen - min(found.values())) < 1e-6


def test_a_model_that_is_looked_at_runs_for_every_image_and_once():
    problem = clusters()
    look = Look("its features", problem.looks[0].vectors, model=0)
    answer = knn_router(problem, look)
    assert torch.equal(answer.asked, torch.tensor([[1.0, 0.0]] * 12 + [[1.0, 1.0]] * 12))
    assert costs(answer, problem)["forwards"] == 1.5


def test_pools_of_models_lie_in_one_another_and_end_with_all():
    problem = drawn(models=40, k=2)
    found = pools(problem)
    assert [len(pool) for pool in found] == [8, 16, 32, 40]
    for smaller, larger in itertools.pairwise(found):
        assert set(smaller) < set(larger)
    assert [len(pool) for pool in pools(drawn(models=6))] == [6]
