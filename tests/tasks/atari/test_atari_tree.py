"""The tree of priorities against sums of its leaves."""

from __future__ import annotations

import numpy as np
import pytest

from hubpath_fast.tasks.atari.tree import SumTree


def test_a_tree_sums_its_leaves_and_depends_on_nothing_else():
    draw = np.random.default_rng(0)
    for size in (1, 2, 3, 7, 64, 1000):
        one, two, masses = SumTree(size), SumTree(size), draw.random(size)
        for _ in range(50):
            places = draw.integers(size, size=5)
            one.set(places, draw.random(5))
        for places in np.array_split(draw.permutation(size), 3):
            one.set(places, masses[places])
        two.set_all(masses)
        assert np.array_equal(one.masses, masses)
        assert one.total == two.total == pytest.approx(masses.sum())
        points = draw.random(100) * one.total
        assert np.array_equal(one.draw(points), two.draw(points))
        wanted = np.searchsorted(masses.cumsum(), points, side="right")
        assert (one.draw(points) == wanted).mean() >= 0.99  # but for points on a border


def test_a_tree_draws_no_place_without_mass_at_any_border():
    masses = np.zeros(37)
    masses[[3, 4, 18, 30]] = [0.1, 0.2, 0.3, 1e-300]
    tree = SumTree(37)
    tree.set_all(masses)
    borders = np.array([0.0, 0.1, 0.1 + 0.2, tree.total / 2, tree.total])
    points = np.concatenate(
        [borders, np.nextafter(borders, 1), np.nextafter(borders, 0), borders * (1 + 1e-9)]
    )
    found = tree.draw(points)
    assert set(found.tolist()) == {3, 4, 18, 30}
    assert tree.draw(np.array([tree.total, 2 * tree.total])).tolist() == [30, 30]
