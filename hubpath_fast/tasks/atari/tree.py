"""A sum tree: draws of places by their mass, many at once, in float64.

The leaves are the masses; every other node is the sum of its two children, always computed from
them, so that equal leaves give an equal tree to the bit, in whatever order they were set.
"""

from __future__ import annotations

import numpy as np


class SumTree:
    """``size`` places, each of mass 0 at first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._depth = (size - 1).bit_length()
        self._first = 1 << self._depth  # node of place 0; node 1 is the root, 2i and 2i+1 are i's
        self._nodes = np.zeros(2 * self._first)

    @property
    def total(self) -> float:
        """The sum of all masses."""
        return float(self._nodes[1])

    @property
    def masses(self) -> np.ndarray:
        """The mass of each place, float64 [size]: a view, to be read only."""
        return self._nodes[self._first : self._first + self.size]

    def set(self, places: np.ndarray, masses: np.ndarray) -> None:
        """Gives places int64 [n] their masses [n], finite and not negative. Of equal places the
        last counts."""
        if not len(places):
            return
        node = places + self._first
        self._nodes[node] = masses
        for _ in range(self._depth):
            node >>= 1
            left = 2 * node
            self._nodes[node] = self._nodes[left] + self._nodes[left + 1]

    def set_all(self, masses: np.ndarray) -> None:
        """Gives each place its mass, float64 [size]."""
        self.masses[:] = masses
        width = self._first
        while width > 1:
            below = self._nodes[width : 2 * width]
            self._nodes[width // 2 : width] = below[0::2] + below[1::2]
            width //= 2

    def draw(self, points: np.ndarray) -> np.ndarray:
        """The places int64 [n] in which points of the line 0..total lie, float64 [n].

        A place of mass 0 is never drawn, where the tree's total is above 0: not by a point on a
        border, and not by one that rounding has put at the line's end or beyond.
        """
        rest = points.copy()
        node = np.ones(len(points), np.int64)
        for _ in range(self._depth):
            left = 2 * node
            mass = self._nodes[left]
            # A point below the left mass needs one above 0; any other needs mass on the right.
            right = (rest >= mass) & (self._nodes[left + 1] > 0)
            rest -= mass * right
            node = left + right
        return node - self._first
