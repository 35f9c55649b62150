"""DESlib on numbers of images: what it says of the images themselves, and where it cannot run."""

import sys

import numpy as np
import pytest
import torch
from support.shelf_problems import clusters, drawn, problem_of_logits

from hubpath_fast.shelf.rivals import CannotRun, Look, costs, every_rival, score

pytest.importorskip("deslib")
from hubpath_fast.shelf.rivals import dynamic as module
from hubpath_fast.shelf.rivals.dynamic import Given, OfNumbers, Pool, column, dynamic


class OfVectors(Given):
    """A linear classifier on the vectors themselves: what DESlib's users have."""

    def __init__(self, weights):
        super().__init__(np.zeros((1, len(weights))))
        self.weights = weights

    def predict_proba(self, X):
        return torch.from_numpy(X @ self.weights.T).softmax(-1).numpy()


def on_a_sphere(models=6, classes=4, images=40, seed=0):
    """A problem, and the same as DESlib's users would put it: a pool, X and y of the validation
    images, X of the test images. The validation vectors' mean is 0, as the look's is made to be."""
    draw = torch.Generator().manual_seed(seed)
    half = torch.randn(images // 2, 3, generator=draw, dtype=torch.float64)
    vectors = {"validation": torch.cat([half, -half]),
               "test": torch.randn(25, 3, generator=draw, dtype=torch.float64)}  # fmt: skip
    vectors = {s: v / v.norm(dim=1, keepdim=True) for s, v in vectors.items()}
    weights = 2 * torch.randn(models, classes, 3, generator=draw, dtype=torch.float64)
    logits = {s: torch.einsum("mcf,nf->mnc", weights, v) for s, v in vectors.items()}
    targets = {
        s: each[torch.arange(each.shape[1]) % models, torch.arange(each.shape[1])].argmax(-1)
        for s, each in logits.items()
    }
    problem = problem_of_logits(logits, targets, vectors)
    pool = [OfVectors(each.numpy()) for each in weights]
    return problem, pool, {s: v.numpy() for s, v in vectors.items()}


@pytest.mark.parametrize("name", ["knora_e", "meta_des"])
@pytest.mark.parametrize("classes", [2, 4])
def test_numbers_of_images_say_what_the_images_say(name, classes):
    problem, classifiers, vectors = on_a_sphere(classes=classes)
    pool = Pool(problem, problem.looks[0])
    ours = pool.fit(name, 7, np.arange(40))
    theirs = type("Plain", (OfNumbers, module.METHODS[name].__mro__[2]), {})(
        classifiers, k=7, voting="soft", n_jobs=1
    ).fit(vectors["validation"], problem.targets["validation"].numpy())
    numbers = np.arange(40, 65)
    np.testing.assert_array_equal(ours.predict(column(numbers)), theirs.predict(vectors["test"]))
    np.testing.assert_allclose(
        ours.predict_proba(column(numbers)), theirs.predict_proba(vectors["test"]), atol=1e-6
    )


def test_knora_e_is_the_models_that_are_right_about_the_nearest_images():
    problem = drawn(models=3, classes=2, images=30)
    said = problem.log_probs["test"].argmax(-1)
    assert (said == said[0]).all(0).any()  # all agree on some, of which DESlib would ask all
    pool = Pool(problem, problem.looks[0])
    model = pool.fit("knora_e", 5, np.arange(30))
    numbers = np.arange(30, 48)
    selected, said = model.selected(column(numbers)), pool.answer(model, numbers)
    right = problem.log_probs["validation"].argmax(-1) == problem.targets["validation"]
    vectors = torch.from_numpy(pool.vectors)
    for row, number in enumerate(numbers):
        near = (vectors[:30] @ vectors[number]).argsort(descending=True)[:5]
        runs = [next((j for j in range(5) if not right[m, near[j]]), 5) for m in range(3)]
        expected = [m for m in range(3) if runs[m] == max(runs)]
        assert selected[row].nonzero()[0].tolist() == expected
        mean = problem.log_probs["test"][expected, row].exp().mean(0)
        torch.testing.assert_close(said[row], mean, atol=1e-6, rtol=0)
    assert np.array_equal(said.argmax(1), model.predict(column(numbers)))


@pytest.mark.parametrize("name", ["knora_e", "meta_des"])
def test_each_cluster_is_answered_by_the_model_that_knows_it(name):
    problem = clusters(per_cluster=20)
    answer = dynamic(problem, name, problem.looks[0])
    for split in ("validation", "test"):
        assert score(answer.probabilities[split], problem.targets[split])["accuracy"] == 1
    forwards = {"knora_e": 1, "meta_des": 2}[name]
    assert costs(answer, problem)["forwards"] == forwards


def test_a_model_that_is_looked_at_is_counted():
    problem = clusters(per_cluster=20)
    look = Look("its features", problem.looks[0].vectors, model=0)
    assert costs(dynamic(problem, "knora_e", look), problem)["forwards"] == 1.5


@pytest.mark.parametrize("name", ["knora_e", "meta_des"])
def test_a_class_without_validation_images_is_no_obstacle(name):
    problem = drawn()
    problem.targets["validation"][problem.targets["validation"] == 2] = 1
    answer = dynamic(problem, name, problem.looks[0])
    found = answer.probabilities["test"]
    assert found.shape == (23, 4)
    torch.testing.assert_close(found.sum(1), torch.ones(23), atol=1e-5, rtol=0)


def test_an_image_is_judged_without_itself():
    """The classes of a fold do not matter for what is said of it."""
    problem = drawn()
    pool = Pool(problem, problem.looks[0])
    rest, left = np.arange(10, 40), np.arange(10)
    before = pool.answer(pool.fit("knora_e", 5, rest), left)
    pool.targets = pool.targets.copy()
    pool.targets[:10] = (pool.targets[:10] + 1) % 4
    assert torch.equal(before, pool.answer(pool.fit("knora_e", 5, rest), left))
    pool.targets[10:] = (pool.targets[10:] + 1) % 4
    assert not torch.equal(before, pool.answer(pool.fit("knora_e", 5, rest), left))


def test_what_it_cannot_do_is_said():
    few, single = drawn(images=8), drawn(models=1)
    with pytest.raises(CannotRun, match="at least 9 validation images, got 8"):
        dynamic(few, "knora_e", few.looks[0])
    with pytest.raises(CannotRun, match="at least 2 models"):
        dynamic(single, "meta_des", single.looks[0])
    same = drawn(models=3)
    same.log_probs["validation"] = same.log_probs["validation"][:1].expand(3, -1, -1)
    same.targets["validation"] = same.log_probs["validation"][0].argmax(-1)
    with pytest.raises(CannotRun, match="META-DES learns when heads are right and when wrong"):
        dynamic(same, "meta_des", same.looks[0])
    assert dynamic(same, "knora_e", same.looks[0]).probabilities["test"].isfinite().all()


def test_the_smallest_selection_set_that_is_taken_works():
    for name in ("knora_e", "meta_des"):
        problem = drawn(images=9)
        dynamic(problem, name, problem.looks[0])


def test_meta_des_is_bounded(monkeypatch):
    problem = drawn()
    monkeypatch.setattr(module, "MOST_OUTPUTS", 40 * 6 * 4 - 1)
    with pytest.raises(CannotRun, match="META-DES would take too long: 40 validation images"):
        dynamic(problem, "meta_des", problem.looks[0])
    dynamic(problem, "knora_e", problem.looks[0])


def test_without_deslib_a_row_says_how_to_get_it(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "deslib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.setitem(sys.modules, "deslib", None)
    rivals = {rival.name: rival for rival in every_rival(drawn())}
    for name in ("knora_e", "meta_des"):
        with pytest.raises(CannotRun, match=r'pip install "hubpath_fast\[shelf\]"'):
            rivals[name].answer()
    rivals["stacked"].answer()
