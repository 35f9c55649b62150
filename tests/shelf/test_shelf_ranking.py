"""Orders of models, and how a score's order agrees with that of the linear heads."""

import pytest
import torch
from support.shelves import make_shelf

from hubpath_fast.features import write_shelf
from hubpath_fast.shelf import scores
from hubpath_fast.shelf.heads import fit_heads
from hubpath_fast.shelf.ranking import (
    YARDSTICK,
    Ranked,
    agreements,
    kendall,
    ordered,
    rank,
    recall,
)


def row(index, linear=None, loss=None, **others):
    found = others if linear is None else {**others, YARDSTICK: linear}
    return Ranked(index, f"m{index}", found, {}, loss)


def test_models_are_in_the_order_of_a_score_and_equal_accuracies_in_that_of_the_loss():
    rows = [
        row(0, 0.5, 1.0, knn=3),
        row(1, 0.7, 0.9),
        row(2, 0.7, 0.8, knn=9),
        row(3, 0.9, 2.0, knn=3),
    ]
    assert [r.index for r in ordered(rows, "linear")] == [3, 2, 1, 0]
    assert [r.index for r in ordered(rows, "knn")] == [2, 0, 3, 1]
    with pytest.raises(ValueError, match="by: expected one of knn, linear; no model has leep"):
        ordered(rows, "leep")
    with pytest.raises(ValueError, match="got 'best'"):
        ordered(rows, "best")


def test_kendalls_tau_counts_pairs_and_takes_ties_into_account():
    a, b = [1, 2, 3, 4], [1, 3, 2, 4]  # five pairs of six in the same order
    assert kendall(a, b) == pytest.approx(4 / 6)
    # tau-b: (4 - 1) / sqrt(6 * 5), one pair of b tied, one the other way round
    assert kendall([1, 2, 3, 4], [1, 3, 2, 3]) == pytest.approx(3 / 30**0.5)
    assert kendall([1, 2], [4, 4]) is None


def test_agreement_is_over_the_models_that_have_the_score():
    rows = [
        row(i, i / 10, 1 - i / 10, h_score=i, **({"leep": -i} if i < 5 else {})) for i in range(9)
    ]
    found = agreements(rows)
    assert set(found) == {"h_score", "leep"}
    assert (found["h_score"].models, found["leep"].models) == (9, 5)
    assert found["h_score"].tau == pytest.approx(1)
    assert found["h_score"].tau_loss == pytest.approx(1)
    assert found["leep"].tau == pytest.approx(-1)
    assert found["h_score"].recall is None  # 9 models are no more than 16
    assert agreements([row(0, knn=1), row(1, knn=2)]) == {}


def test_recall_is_the_share_of_the_best_that_a_score_has_among_its_first():
    rows = [row(i, -i, i, knn=-i if i % 2 else -100 - i) for i in range(40)]
    # The best eight are 0..7; the first sixteen by the score are the odd numbers up to 31.
    assert recall(rows, "knn") == 0.5
    assert recall(rows, "knn", best=1, top=5) == 0.0
    assert recall(rows, "knn", best=1, top=40) is None


def test_a_shelf_is_ranked_by_its_training_images_alone(tmp_path):
    shelf = make_shelf(tmp_path / "s", views=2, source_classes=4, dtype=torch.float16)
    rows, heads = rank(shelf)
    y = shelf.targets[:60]
    for i, found in enumerate(rows):
        x = shelf.features(i)[0, :60]
        m = scores.moments(x, y, 3)
        p = scores.source_probabilities(x, *shelf.source_head(i))
        expected = {
            "h_score": scores.h_score(m), "log_me": scores.log_me(m), "knn": scores.knn(x, y, 3),
            "leep": scores.leep(p, y, 3), "nce": scores.nce(p, y, 3), "linear": heads[i].accuracy,
        }  # fmt: skip
        assert found.scores == expected
        assert set(found.seconds) == set(expected)
        assert (found.index, found.label, found.loss) == (i, f"model{i}", heads[i].loss)
    assert [h.loss for h in heads] == [h.loss for h in fit_heads(shelf)]
    cheap, none = rank(shelf, linear=False)
    assert none == []
    assert all(YARDSTICK not in found.scores and found.loss is None for found in cheap)


def test_a_model_without_the_head_that_it_was_pre_trained_with_has_no_score_of_it(tmp_path):
    shelf = make_shelf(tmp_path / "s")
    rows, _ = rank(shelf, linear=False)
    assert all(set(found.scores) == {"h_score", "log_me", "knn"} for found in rows)


def test_probabilities_of_many_source_classes_are_of_some_images(tmp_path, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=draw), torch.arange(50) % 2
    head = torch.randn(6, 4, generator=draw), torch.zeros(6)
    shelf = write_shelf(tmp_path / "s", {"m": x}, y, "ab", {"train": 50}, source_heads={"m": head})
    monkeypatch.setattr("hubpath_fast.shelf.ranking.MAX_PROBABILITIES", 60)
    [found], _ = rank(shelf, linear=False)
    rows = torch.arange(10) * 5
    p = scores.source_probabilities(x[rows], *head)
    assert found.scores["leep"] == scores.leep(p, y[rows], 2)
    assert found.scores["nce"] == scores.nce(p, y[rows], 2)


def test_fewer_images_than_classes_are_refused_before_anything_is_computed(tmp_path):
    shelf, told = make_shelf(tmp_path / "s", classes=9, sizes=(8, 5, 0)), []
    with pytest.raises(ValueError, match="got 8 images of 9 classes"):
        rank(shelf, tell=told.append)
    assert told == []
