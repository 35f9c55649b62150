"""Intervals, interquartile mean, probability of improvement: by hand, and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from hubpath_fast.tasks.atari.statistics import (
    Interval,
    bootstrap,
    bootstrap_band,
    interquartile_mean,
    paired_difference,
    probability_of_improvement,
    student_quantile,
)

RANDOM = np.random.default_rng(0)
GAMES = [RANDOM.normal(0.2, 0.1, 5), RANDOM.normal(1.0, 0.5, 7)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], 3.0),
        ([1.0, 2.0, 9.0], 4.0),  # nothing is left out
        ([100.0, 1.0, 3.0, -50.0], 2.0),
        ([8.0, 1.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0], 4.5),
        ([0.0, 1.0, 2.0, 4.0, 100.0], 7 / 3),
    ],
)
def test_the_interquartile_mean_by_hand(values, expected):
    assert interquartile_mean(values) == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 3, 4, 6, 9, 15, 16])
def test_the_interquartile_mean_is_scipys_trimmed_mean(count):
    values = RANDOM.normal(size=(3, count))
    found = interquartile_mean(values)
    np.testing.assert_allclose(found, stats.trim_mean(values, 0.25, axis=1))


def test_of_two_values_the_bootstrap_draws_three_means():
    # 0, 1/2 and 1 with probability 1/4, 1/2, 1/4.
    assert bootstrap([[0.0, 1.0]]) == (0.5, 0.0, 1.0)
    assert bootstrap([[0.0, 1.0]], level=0.4) == (0.5, 0.5, 0.5)


def test_a_games_seeds_are_drawn_from_that_game():
    assert bootstrap([[0.0, 0.0], [10.0, 10.0, 10.0]]) == (6.0, 6.0, 6.0)


@pytest.mark.parametrize("statistic", [interquartile_mean, lambda scores: scores.mean(axis=-1)])
def test_the_interval_of_one_game_is_scipys(statistic):
    found = bootstrap([GAMES[1]], statistic, resamples=20_000)
    theirs = stats.bootstrap(
        (GAMES[1],), lambda x, axis: statistic(np.moveaxis(x, axis, -1)), n_resamples=20_000,
        method="percentile", rng=np.random.default_rng(1), vectorized=True,
    ).confidence_interval  # fmt: skip
    assert found.value == pytest.approx(statistic(GAMES[1]))
    # 4 standard errors of a quantile of 20,000 draws are below a tenth of the draws' deviation.
    tolerance = 0.1 * np.std(GAMES[1]) / math.sqrt(len(GAMES[1])) * 2
    np.testing.assert_allclose(found[1:], theirs, atol=tolerance)


def test_intervals_repeat_and_narrow_with_their_level():
    wide, again = (bootstrap(GAMES, interquartile_mean) for _ in range(2))
    narrow = bootstrap(GAMES, interquartile_mean, level=0.5)
    assert wide == again
    assert wide.low < narrow.low < wide.value < narrow.high < wide.high
    assert bootstrap(GAMES, interquartile_mean, seed=1) != wide


def test_a_single_seed_has_no_interval():
    for found in (bootstrap([[1.0, 2.0], [3.0]]), probability_of_improvement([[1.0]], [[0.0]])):
        assert math.isnan(found.low)
        assert math.isnan(found.high)
        assert not found.excludes(0)
    assert bootstrap([[1.0, 2.0], [3.0]]).value == 2.0
    assert probability_of_improvement([[1.0]], [[0.0]]).value == 1.0


def test_a_band_draws_whole_curves():
    curves = np.array([[0.0, 10.0, 4.0], [1.0, 30.0, 4.0]])
    middle, low, high = bootstrap_band(curves)
    np.testing.assert_array_equal(middle, [0.5, 20.0, 4.0])
    np.testing.assert_array_equal(low, [0.0, 10.0, 4.0])
    np.testing.assert_array_equal(high, [1.0, 30.0, 4.0])
    curves = RANDOM.normal(size=(6, 4))
    middle, low, high = bootstrap_band(curves, resamples=20_000)
    for point in range(4):
        found = bootstrap([curves[:, point]], resamples=20_000)
        ours = (middle[point], low[point], high[point])
        np.testing.assert_allclose(ours, found, atol=0.05 * curves[:, point].std())
    middle, low, _ = bootstrap_band(curves[:1])
    np.testing.assert_array_equal(middle, curves[0])
    assert np.isnan(low).all()


def test_the_probability_of_improvement_by_hand():
    # Of six pairs three are won and one is tied; in the second game all four are ties.
    one = probability_of_improvement([[1.0, 3.0]], [[0.0, 1.0, 4.0]])
    assert one.value == pytest.approx(3.5 / 6)
    both = probability_of_improvement([[1.0, 3.0], [5.0, 5.0]], [[0.0, 1.0, 4.0], [5.0, 5.0]])
    assert both.value == pytest.approx((3.5 / 6 + 0.5) / 2)
    assert probability_of_improvement([[2.0, 3.0]], [[0.0, 1.0]]) == (1.0, 1.0, 1.0)


def test_the_probability_of_improvement_is_scipys_mann_whitney():
    ours, theirs = RANDOM.integers(0, 6, 8), RANDOM.integers(0, 6, 5)  # with ties
    found = probability_of_improvement([ours], [theirs])
    expected = stats.mannwhitneyu(ours, theirs).statistic / 40
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high


def test_the_interval_of_a_probability_draws_both_sides():
    # With a side of equal values only the other one's draws count: 0, 1/2, 1 as of two values.
    assert probability_of_improvement([[1.0, 3.0]], [[2.0, 2.0]]) == (0.5, 0.0, 1.0)
    assert probability_of_improvement([[2.0, 2.0]], [[1.0, 3.0]]) == (0.5, 0.0, 1.0)


def test_paired_differences_are_of_common_seeds():
    first, second = {0: 5.0, 1: 7.0, 2: 9.5, 7: 99.0}, {2: 7.0, 1: 6.0, 0: 3.0, 8: -99.0}
    found = paired_difference(first, second)
    theirs = stats.ttest_rel([5.0, 7.0, 9.5], [3.0, 6.0, 7.0]).confidence_interval(0.95)
    np.testing.assert_allclose(found, (5.5 / 3, *theirs))
    # 2, 1 and 2.5: all of one sign, and still three seeds do not exclude 0.
    assert found.low < 0
    assert not found.excludes(0)
    assert paired_difference({0: 3.0, 1: 3.1}, {0: 1.0, 1: 1.0}).excludes(0)
    assert math.isnan(paired_difference({0: 3.0}, {0: 1.0}).high)
    equal = paired_difference({0: 3.0, 1: 4.0}, {0: 1.0, 1: 2.0})
    assert equal.value == 2
    assert not equal.excludes(0)
    assert math.isnan(paired_difference({0: 3.0}, {1: 1.0}).value)


def test_an_interval_excludes_what_lies_on_either_side():
    assert Interval(1.0, 0.5, 2.0).excludes(0)
    assert Interval(-1.0, -2.0, -0.5).excludes(0)
    assert not Interval(0.0, -1.0, 1.0).excludes(0)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 10, 31, 100])
def test_quantiles_are_scipys(degrees):
    for probability in (0.6, 0.95, 0.975, 0.995):
        expected = stats.t.ppf(probability, degrees)
        assert student_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: bootstrap([]), "scores: expected the values of at least one game"),
        (lambda: bootstrap([[1.0], []]), r"scores\[1\]: expected finite numbers"),
        (lambda: bootstrap([[1.0, math.nan]]), r"scores\[0\].*nan"),
        (lambda: bootstrap([[1.0, 2.0]], level=95), "level: expected a number between 0 and 1"),
        (lambda: paired_difference({0: 1, 1: 2}, {0: 0, 1: 0}, level=0), "level: expected"),
        (lambda: bootstrap_band([[1.0, math.inf]]), r"curves.*shape \[1, 2\] with 1"),
        (lambda: bootstrap_band([1.0]), r"curves: expected finite numbers \[seeds, points\]"),
        (lambda: probability_of_improvement([[1.0]], [[1.0], [2.0]]), "second: expected 1 games"),
    ],
)
def test_what_is_no_score_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
