"""Cross-validated linear heads: the solver against scikit-learn's, and what a shelf keeps."""

import dataclasses

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from support.shelves import make_shelf
from torch.nn.functional import cross_entropy

from hubpath_fast.features import Shelf
from hubpath_fast.runs import answers
from hubpath_fast.shelf import heads as heads_module
from hubpath_fast.shelf.heads import fit_heads, held_out, outputs
from hubpath_fast.shelf.logistic import Axes, Problem, fit_logistic, folds_of

CLASSES = 5


def data(n=150, width=12, seed=0, separation=1.0):
    """Features of unlike scales, far from 0, that depend on one another."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    mix = torch.randn(width, width, generator=draw) * torch.logspace(0, -1.5, width)
    x = separation * torch.randn(CLASSES, width, generator=draw)[y]
    x = (x + torch.randn(n, width, generator=draw)) @ mix
    return x * torch.logspace(-2, 2, width) + 5, y


def standard(x):
    x = x.double()
    deviation = x.std(0, correction=0)
    return (x - x.mean(0)) / deviation.masked_fill(deviation == 0, 1)


def objective(z, y, weight, bias, decay):
    loss = cross_entropy(z @ weight.double().mT + bias.double(), y)
    return float(loss + decay / 2 * weight.double().square().sum())


def best(z, y, decay):
    """scikit-learn's weight and bias on standardised features, and the objective there."""
    model = LogisticRegression(C=1 / (len(z) * decay), max_iter=5000, tol=1e-8)
    model.fit(z.numpy(), y.numpy())
    weight, bias = torch.tensor(model.coef_), torch.tensor(model.intercept_)
    return weight, bias, objective(z, y, weight, bias, decay)


@pytest.mark.parametrize("width", [12, 400], ids=["narrow", "wide"])
@pytest.mark.parametrize("separation", [0.2, 3.0], ids=["mixed", "apart"])
@pytest.mark.parametrize("decay", [1.0, 0.03, 1e-4])
def test_a_head_minimises_the_objective_on_standardised_features(width, separation, decay):
    x, y = data(width=width, separation=separation)
    head = fit_logistic(x, y, CLASSES, folds_of(y, 0), (decay,))
    weight = head.weight.double() * x.double().std(0, correction=0)
    bias = head.bias.double() + head.weight.double() @ x.double().mean(0)
    z = standard(x)
    _, _, least = best(z, y, decay)
    found = objective(z, y, weight, bias, decay)
    # A step is taken while it is expected to gain 3e-4 of the objective; a dozen such gains
    # may be left where the curvature is least.
    assert least - 1e-6 <= found <= least * (1 + 4e-3)


def test_images_left_out_are_judged_by_heads_that_did_not_see_them():
    x, y = data(separation=0.6)
    folds, decay, z = folds_of(y, 0), 0.03, standard(x)
    head = fit_logistic(x, y, CLASSES, folds, (decay,))
    expected = torch.empty(len(y), CLASSES, dtype=torch.float64)
    for fold in range(5):
        seen = folds != fold
        weight, bias, _ = best(z[seen], y[seen], decay)
        expected[~seen] = z[~seen] @ weight.mT + bias
    # 3e-4 of an objective of about 1 nat, and curvatures of 0.03 upwards: logits to about 0.1.
    torch.testing.assert_close(
        head.out_of_fold.double().softmax(1), expected.softmax(1), rtol=0, atol=0.03
    )
    assert head.loss == pytest.approx(float(cross_entropy(head.out_of_fold.double(), y)))
    assert head.loss == pytest.approx(float(cross_entropy(expected, y)), rel=5e-3)
    assert head.accuracy == float((head.out_of_fold.argmax(1) == y).double().mean())


def test_the_decay_is_that_of_the_least_cross_validated_loss():
    x, y = data(separation=0.5, width=40)
    folds, decays = folds_of(y, 0), (1.0, 0.1, 0.01, 0.001)
    head = fit_logistic(x, y, CLASSES, folds, decays)
    losses = {d: fit_logistic(x, y, CLASSES, folds, (d,)).loss for d in decays}
    assert head.decay == min(losses, key=losses.get)
    assert 1e-3 < head.decay < 1


def test_gradients_are_those_of_the_losses_of_the_images_inside():
    x, y = data(60)
    folds = folds_of(y, 1)
    inside = folds[:, None] != torch.arange(5)
    problem = Problem(Axes.of(x), y, CLASSES, inside)
    problem.rows = 7  # blocks, the last of 4
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(CLASSES, 5, 13, generator=draw)
    value, gradient = problem.value_and_gradient(weights, 0.3)
    exact = weights.double().requires_grad_()
    logits = torch.einsum("nr,cbr->bnc", problem.axes.seen.double(), exact)
    expected = torch.stack(
        [cross_entropy(logits[b][inside[:, b]], y[inside[:, b]]) for b in range(5)]
    ) + 0.15 * exact[..., :-1].square().sum((0, 2))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)
    expected.sum().backward()
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-5, atol=1e-6)
    for b in range(5):  # of the images that it did not see
        out = logits[b][~inside[:, b]].float()
        torch.testing.assert_close(problem.logits.mT[~inside[:, b]], out, rtol=1e-4, atol=1e-4)


def test_folds_deal_each_class_out_evenly():
    y = torch.tensor([0] * 12 + [1] * 7 + [2] * 1 + [3] * 10)
    folds = folds_of(y, 0)
    for c in range(4):
        counts = folds[y == c].bincount(minlength=5)
        assert counts.max() - counts.min() <= 1
    assert folds.bincount().tolist() == [6] * 5
    assert torch.equal(folds, folds_of(y, 0))
    assert not torch.equal(folds, folds_of(y, 1))


@pytest.mark.parametrize("width", [3, 60])
def test_dead_features_and_classes_of_one_image_break_nothing(width):
    x, y = data(40, width)
    x[:, 0] = 0.1
    y[y == 4] = 0
    y[-1] = 4
    head = fit_logistic(x, y, CLASSES, folds_of(y, 0))
    assert head.weight.isfinite().all()
    assert head.bias.isfinite().all()
    assert head.weight[:, 0].count_nonzero() == 0
    dead = fit_logistic(torch.full((40, width), 0.1), y, CLASSES, folds_of(y, 0), (0.1,))
    assert dead.weight.count_nonzero() == 0
    # With nothing to see, the classes' shares.
    torch.testing.assert_close(dead.bias.softmax(0), y.bincount() / 40, rtol=0, atol=0.02)


def test_what_cannot_be_fitted_is_refused(tmp_path):
    x, y = data(4)
    with pytest.raises(ValueError, match="got 4 images of 5 classes"):
        fit_logistic(x, y, CLASSES, folds_of(y, 0))
    x, y = data(20)
    x[3, 4] = torch.nan
    with pytest.raises(ValueError, match="expected finite numbers"):
        fit_logistic(x, y, CLASSES, folds_of(y, 0))
    shelf = make_shelf(tmp_path / "s", classes=7, sizes=(6, 5, 0))
    with pytest.raises(ValueError, match="got 6 images of 7 classes; extract more images"):
        fit_heads(shelf)


def test_heads_are_kept_and_read_again(tmp_path, monkeypatch):
    shelf = make_shelf(tmp_path / "s", dtype=torch.float16)
    told = []
    made = fit_heads(shelf, tell=told.append)
    assert told == [f"head {i + 1} of 4: model{i}" for i in range(4)]
    monkeypatch.setattr(heads_module, "fit_logistic", None)  # nothing is fitted again
    for read, models in ((fit_heads(Shelf.open(tmp_path / "s")), range(4)),
                         (fit_heads(shelf, [2, 0]), [2, 0])):  # fmt: skip
        for head, i in zip(read, models, strict=True):
            for field in dataclasses.fields(head):
                ours, theirs = getattr(made[i], field.name), getattr(head, field.name)
                same = torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs
                assert same, field.name


def test_a_head_that_is_damaged_or_of_another_seed_is_fitted(tmp_path):
    shelf = make_shelf(tmp_path / "s")
    [made] = fit_heads(shelf, [1])
    [path] = (tmp_path / "s" / "heads").iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    told = []
    [again] = fit_heads(shelf, [1], tell=told.append)
    assert len(told) == 1
    assert torch.equal(made.weight, again.weight)
    [other] = fit_heads(shelf, [1], seed=1, tell=told.append)
    assert len(told) == 2
    assert not torch.equal(made.out_of_fold, other.out_of_fold)


def test_heads_of_other_classes_are_fitted_anew(tmp_path):
    shelf = make_shelf(tmp_path / "s")
    [head] = fit_heads(shelf, [0])
    shelf.targets = shelf.targets.roll(1)
    [other] = fit_heads(shelf, [0])
    assert not torch.equal(head.weight, other.weight)
    shelf.targets = shelf.targets.roll(-1)
    [again] = fit_heads(shelf, [0])
    assert torch.equal(head.weight, again.weight)


@pytest.mark.parametrize("sizes", [(60, 30, 30), (60, 0, 30)])
def test_what_all_heads_say_must_fit_into_memory(tmp_path, monkeypatch, sizes):
    shelf = make_shelf(tmp_path / "s", sizes=sizes)
    heads = fit_heads(shelf)
    needed = 4 * 3 * 4 * (sizes[1] or sizes[0])  # models, classes, bytes, images
    monkeypatch.setattr(answers, "free_memory", lambda: 2 * needed)
    held_out(shelf, heads, range(4))
    monkeypatch.setattr(answers, "free_memory", lambda: 2 * needed - 1)
    with pytest.raises(ValueError, match="extract a shelf of fewer than 4 models"):
        held_out(shelf, heads, range(4))


def test_outputs_are_the_heads_on_the_evaluation_view(tmp_path):
    shelf = make_shelf(tmp_path / "s", views=2)
    fitted, models = fit_heads(shelf, [3, 1]), [3, 1]
    numbers = torch.tensor([5, 100, 61])
    found = outputs(shelf, fitted, numbers, models)
    for out, head, i in zip(found, fitted, models, strict=True):
        features = shelf.features(i)[0, numbers].double()
        expected = features @ head.weight.double().mT + head.bias.double()
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    logits, targets, split = held_out(shelf, fitted, models)
    assert (split, logits.shape) == ("validation", (2, 30, 3))
    assert torch.equal(logits, outputs(shelf, fitted, shelf.splits["validation"], models))
    assert torch.equal(targets, shelf.targets[60:90])


def test_without_validation_images_those_of_training_are_judged_out_of_fold(tmp_path):
    shelf = make_shelf(tmp_path / "s", sizes=(60, 0, 30))
    fitted = fit_heads(shelf)
    logits, targets, split = held_out(shelf, fitted, range(4))
    assert (split, logits.shape) == ("train", (4, 60, 3))
    for out, head in zip(logits, fitted, strict=True):
        assert float(cross_entropy(out.double(), targets)) == pytest.approx(head.loss, rel=1e-3)


def test_images_of_one_class_and_classes_without_images_end_soon():
    alone = fit_logistic(torch.randn(2, 3), torch.tensor([0, 1]), 2, folds_of(torch.arange(2), 0))
    assert alone.accuracy == 0  # a fold's head has seen the other class alone
    assert alone.passes < 200
    x, y = data(40)
    y[y == 4] = 1
    head = fit_logistic(x, y, CLASSES, folds_of(y, 0), (0.1,))
    assert (x @ head.weight.mT + head.bias).softmax(1)[:, 4].max() < 0.01
    assert head.passes < 50
