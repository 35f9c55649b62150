"""The scores of features against their papers' formulas, written out in NumPy float64."""

import math

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf_shrinkage

from hubpath_fast.shelf import scores
from hubpath_fast.shelf.scores import h_score, knn, leep, log_me, moments, nce

CLASSES = 4


def data(n, width, classes=CLASSES, dtype=torch.float64, seed=0):
    """Features that say something of the classes, at a distance from 0, of unlike scales."""
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (n,), generator=draw)
    targets[:classes] = torch.arange(classes)
    centres = torch.randn(classes, width, generator=draw)
    scales = torch.logspace(-1, 1, width, dtype=torch.float64)
    noise = torch.randn(n, width, generator=draw)
    return ((centres[targets] + 2 * noise + 3).double() * scales).to(dtype), targets


SHAPES = [(60, 7), (40, 40), (30, 90), (2500, 5)]  # the last: several blocks of rows


def naive_h_score(x, y):
    """tr(cov_a(f)^-1 (1 - a) cov(E[f|y])), a as scikit-learn estimates it."""
    x = x - x.mean(0)
    a = ledoit_wolf_shrinkage(x, assume_centered=True)
    covariance = x.T @ x / len(x)
    mu = np.trace(covariance) / x.shape[1]
    expected = np.stack([x[y == c].mean(0) for c in y])
    shrunk = (1 - a) * covariance + a * mu * np.eye(x.shape[1])
    return np.trace(np.linalg.inv(shrunk) @ ((1 - a) * expected.T @ expected / len(x)))


def naive_log_me(x, y):
    """Algorithm 1 of the paper: each class by itself, with the D x D matrix A."""
    n, width = x.shape
    found = []
    for c in np.unique(y):
        target, alpha, beta = (y == c).astype(float), 1.0, 1.0
        for _ in range(300):
            a = alpha * np.eye(width) + beta * x.T @ x
            mean = beta * np.linalg.solve(a, x.T @ target)
            gamma = width - alpha * np.trace(np.linalg.inv(a))
            alpha, beta = gamma / (mean @ mean), (n - gamma) / ((target - x @ mean) ** 2).sum()
        a = alpha * np.eye(width) + beta * x.T @ x
        mean = beta * np.linalg.solve(a, x.T @ target)
        found.append(
            n / 2 * math.log(beta) + width / 2 * math.log(alpha) - n / 2 * math.log(2 * math.pi)
            - beta / 2 * ((x @ mean - target) ** 2).sum() - alpha / 2 * mean @ mean
            - np.linalg.slogdet(a)[1] / 2
        )  # fmt: skip
    return np.mean(found) / n


def naive_leep(p, y):
    joint = np.array([[p[y == c, z].sum() for z in range(p.shape[1])] for c in range(CLASSES)])
    given = joint / joint.sum(0)
    return np.mean([math.log(sum(given[y[i], z] * p[i, z] for z in range(p.shape[1])))
                    for i in range(len(y))])  # fmt: skip


def naive_nce(p, y):
    z, total = p.argmax(1), 0.0
    for c in np.unique(y):
        for s in np.unique(z):
            both = np.mean((y == c) & (z == s))
            total += both * math.log(both / np.mean(z == s)) if both else 0
    return total


def naive_knn(x, y, k):
    unit, right = x / np.linalg.norm(x, axis=1, keepdims=True), 0
    for i in range(len(x)):
        near = [j for j in np.argsort(-(unit @ unit[i])) if j != i][:k]
        votes = {c: sum(y[j] == c for j in near) for c in set(y[near])}
        most = [y[j] for j in near if votes[y[j]] == max(votes.values())]
        right += most[0] == y[i]
    return right / len(x)


@pytest.mark.parametrize(("n", "width"), SHAPES)
def test_h_score_is_the_papers(n, width):
    x, y = data(n, width)
    expected = naive_h_score(x.numpy(), y.numpy())
    # Both solve in float64; Ledoit and Wolf's shrinkage keeps the condition below about 1e4.
    assert h_score(moments(x, y, CLASSES)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "width"), SHAPES)
def test_log_me_is_the_evidence_at_the_papers_fixed_point(n, width):
    x, y = data(n, width)
    # The evidence is flat at its maximum: of a ratio that is off by 1e-5, the square of that.
    assert log_me(moments(x, y, CLASSES)) == pytest.approx(
        naive_log_me(x.numpy(), y.numpy()), abs=1e-7
    )


def test_leep_and_nce_are_the_papers():
    draw = torch.Generator().manual_seed(1)
    _, y = data(50, 3)
    p = torch.randn(50, 6, generator=draw, dtype=torch.float64).mul(2).softmax(1)
    assert leep(p, y, CLASSES) == pytest.approx(naive_leep(p.numpy(), y.numpy()), rel=1e-12)
    assert nce(p, y, CLASSES) == pytest.approx(naive_nce(p.numpy(), y.numpy()), rel=1e-12)


def test_source_probabilities_are_the_heads():
    draw = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*s, generator=draw) for s in ((9, 4), (3, 4), (3,)))
    expected = (x.half().double() @ weight.double().mT + bias.double()).softmax(1)
    found = scores.source_probabilities(x.half(), weight, bias)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4, 5])
def test_knn_is_the_vote_of_the_nearest_others(k):
    x, y = data(120, 6)
    assert knn(x, y, CLASSES, k) == naive_knn(x.numpy(), y.numpy(), k)
    assert knn(7 * x, y, CLASSES, k) == knn(x, y, CLASSES, k)  # cosine


def test_neighbours_of_many_images_are_sought_for_some_evenly_spread(monkeypatch):
    x, y = data(120, 6)
    monkeypatch.setattr(scores, "MAX_QUERIES", 60)
    x[1::2] = x[0::2]  # those of odd numbers are found beside their twins
    y[1::2] = y[0::2]
    assert knn(x, y, CLASSES, 1) == 1.0
    assert scores.evenly(10, 4).tolist() == [0, 2, 5, 7]
    assert scores.evenly(4, 10).tolist() == [0, 1, 2, 3]


def test_scores_do_not_depend_on_the_dtype_beyond_its_rounding():
    x, y = data(80, 6, dtype=torch.float16)
    exact, found = moments(x.double(), y, CLASSES), moments(x, y, CLASSES)
    assert h_score(found) == pytest.approx(h_score(exact), rel=1e-12)
    assert log_me(found) == pytest.approx(log_me(exact), rel=1e-12)
    assert knn(x, y, CLASSES) == knn(x.double(), y, CLASSES)


def test_scores_rise_with_what_features_say():
    draw = torch.Generator().manual_seed(2)
    y = torch.arange(200) % CLASSES
    clean = torch.eye(CLASSES)[y].double()
    noise = torch.randn(200, CLASSES, generator=draw, dtype=torch.float64)
    found = []
    for level in (5.0, 1.0, 0.3, 0.1):
        x = clean + level * noise
        m, p = moments(x, y, CLASSES), (4 * x).softmax(1)
        found.append((h_score(m), log_me(m), knn(x, y, CLASSES), leep(p, y, CLASSES),
                      nce(p, y, CLASSES)))  # fmt: skip
    for score in zip(*found, strict=True):
        assert list(score) == sorted(score)


CONSTANT = torch.ones(12, 5, dtype=torch.float64)


@pytest.mark.parametrize("x", [0 * CONSTANT, CONSTANT, 1e4 * CONSTANT, CONSTANT.half() * 0.1],
                         ids=["zero", "one", "large", "half"])  # fmt: skip
@pytest.mark.parametrize("width", [5, 40])
def test_features_that_are_all_alike_are_worth_nothing_and_break_nothing(x, width):
    y = torch.arange(12) % CLASSES
    m = moments(x[:, :1].expand(12, width), y, CLASSES)
    assert h_score(m) == 0.0
    # A class's indicator by its mean alone: a variance of 3/16 each, or 1/4 around 0.
    assert -0.8 < log_me(m) < -0.4
    assert 0 <= knn(x, y, CLASSES) <= 1


def test_a_class_with_one_image_or_none_and_dead_features_break_nothing():
    x, y = data(40, 8)
    x[:, 3] = 0
    y[y == 3] = 0
    y[0] = 2
    y[1:][y[1:] == 2] = 1
    m = moments(x, y, CLASSES)
    p = x.softmax(1)
    expected = naive_h_score(x.numpy(), y.numpy())
    assert h_score(m) == pytest.approx(expected, rel=1e-9)
    for score in (log_me(m), knn(x, y, CLASSES), leep(p, y, CLASSES), nce(p, y, CLASSES)):
        assert math.isfinite(score)


def test_features_from_which_the_classes_follow_exactly_have_finite_scores():
    y = torch.arange(40) % CLASSES
    x = torch.eye(CLASSES, dtype=torch.float64)[y]
    p = x.float()
    m = moments(x, y, CLASSES)
    assert math.isfinite(log_me(m))
    assert h_score(m) <= CLASSES - 1
    assert (knn(x, y, CLASSES), leep(p, y, CLASSES), nce(p, y, CLASSES)) == (1.0, 0.0, 0.0)


def test_fewer_images_than_classes_are_refused():
    x, y = data(3, 5, classes=3)
    with pytest.raises(ValueError, match=r"got 3 images of 4 classes; extract more images"):
        moments(x, y, 4)
    with pytest.raises(ValueError, match="got 3 images of 4 classes"):
        knn(x, y, 4)
    with pytest.raises(ValueError, match="expected two classes or more"):
        moments(x, 0 * y, 1)
