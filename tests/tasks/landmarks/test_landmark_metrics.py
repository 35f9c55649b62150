"""Errors by hand: units, thresholds, areas."""

import math

import pytest
import torch

from hubpath_fast.tasks.landmarks import (
    LAYOUTS,
    LandmarkLayout,
    auc,
    failure_rate,
    nme,
    normalizer,
)


def test_nme_by_hand():
    truth = torch.tensor([[[0.0, 0.0], [10.0, 0.0]], [[5.0, 5.0], [5.0, 9.0]]])
    prediction = truth + torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, -1.0]]])
    errors = nme(prediction, truth, torch.tensor([10.0, 4.0]))
    assert errors.dtype == torch.float64
    assert errors.tolist() == [0.25, 0.25]  # (5 + 0) / 2 / 10, (1 + 1) / 2 / 4


def test_nme_does_not_change_by_a_similarity():
    """So an evaluation in cells needs no way back to the picture."""
    truth = torch.rand(3, 5, 2, dtype=torch.float64)
    prediction, unit = truth + 0.1 * torch.rand_like(truth), torch.tensor([0.5, 0.6, 0.7])
    turned = torch.tensor([[0.0, 3.0], [-3.0, 0.0]], dtype=torch.float64)
    moved = nme(prediction @ turned + 7, truth @ turned + 7, 3 * unit)
    assert torch.allclose(moved, nme(prediction, truth, unit), atol=1e-12)


def test_units():
    truth = torch.zeros(1, 29, 2)
    truth[0, 8], truth[0, 9] = torch.tensor([10.0, 10.0]), torch.tensor([40.0, 50.0])
    truth[0, 16], truth[0, 17] = torch.tensor([20.0, 10.0]), torch.tensor([20.0, 22.0])
    assert normalizer(truth, "cofw").tolist() == [50.0]
    assert normalizer(truth, "cofw", how="pupil").tolist() == [12.0]
    assert normalizer(truth, "cofw", how="diagonal").item() == pytest.approx(math.hypot(40, 50))
    assert normalizer(truth, "cofw", how="0-16").item() == pytest.approx(math.hypot(20, 10))
    assert normalizer(truth, LAYOUTS["cofw"]).dtype == torch.float64


def test_pupils_of_300w_are_means_of_the_eyes_points():
    truth = torch.zeros(1, 68, 2)
    truth[0, 36:42] = torch.tensor([[0.0, 0], [1, -1], [2, -1], [3, 0], [2, 1], [1, 1]])
    truth[0, 42:48] = truth[0, 36:42] + torch.tensor([6.0, 8.0])
    assert normalizer(truth, "300w", "pupil").item() == pytest.approx(10.0)  # 6-8-10
    assert normalizer(truth, "300w", "ocular").item() == pytest.approx(math.hypot(9, 8))


def test_failures_are_strictly_above_the_threshold():
    errors = torch.tensor([0.05, 0.10, 0.11, 0.30], dtype=torch.float64)
    assert failure_rate(errors, 0.10) == 0.5
    assert failure_rate(errors) == failure_rate(errors.float()) == 0.5
    assert failure_rate([0.08, 0.09], 0.08) == 0.5
    assert failure_rate([0.01, math.nan], 0.10) == 0.5  # what is no number has failed


def test_the_area_is_exact():
    errors = [0.0, 0.025, 0.05, 0.10, 0.2]
    assert auc(errors, 0.10) == pytest.approx((1 + 0.75 + 0.5) / 5, abs=1e-15)
    assert auc(errors) == auc(errors, 0.10)
    assert auc([0.0]) == 1.0
    assert auc([0.5, math.nan]) == 0.0
    # The staircase itself, summed in small steps, comes to the same.
    errors = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 5
    steps = torch.arange(200_000, dtype=torch.float64).add(0.5) / 200_000 * 0.1
    curve = torch.searchsorted(errors.sort().values, steps, right=True) / 50
    assert auc(errors) == pytest.approx(curve.mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: nme(torch.zeros(2, 3, 2), torch.zeros(2, 4, 2), torch.ones(2)),
            r"prediction: expected \[2, 4, 2\] as truth, got \[2, 3, 2\]",
        ),
        (
            lambda: nme(torch.zeros(2, 3, 2), torch.zeros(2, 3, 2), torch.ones(3)),
            r"unit: expected \[2\], one a face, got \[3\]",
        ),
        (
            lambda: nme(torch.zeros(3, 3, 2), torch.zeros(3, 3, 2), [1.0, 0.0, math.nan]),
            r"unit: expected a length > 0 in every face, got 0 in face 1 \(and 1 more\)",
        ),
        (
            lambda: normalizer(torch.zeros(2, 29, 2), "cofw"),
            r'unit "ocular": expected a length > 0 in every face, got 0 in face 0 \(and 1 more\)',
        ),
        (
            lambda: normalizer(torch.zeros(2, 28, 2), "cofw"),
            r"truth: expected \[N, 29, 2\] of cofw, got \[2, 28, 2\]",
        ),
        (
            lambda: normalizer(torch.zeros(2, 29, 2), "cofw", "eyes"),
            'unit: cofw has "ocular", "pupil", "diagonal" and "I-J", .* got "eyes"',
        ),
        (
            lambda: normalizer(torch.zeros(2, 5, 2), LandmarkLayout("own", 5), "ocular"),
            'unit: own has "diagonal" and "I-J"',
        ),
        (
            lambda: normalizer(torch.zeros(2, 29, 2), "cofw", "3-29"),
            'expected two of the landmarks 0..28 of cofw as "I-J", got "3-29"',
        ),
        (lambda: failure_rate([]), "errors: expected .* at least one face"),
        (lambda: auc([0.1], 0), "threshold: expected a share > 0"),
        (lambda: auc([0.1], "10 %"), "threshold: expected a share > 0.*got '10 %'"),
    ],
)
def test_what_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
