"""Cross: four roads with kerbs between them to get over, from the bottom to the top, then again.

A road crossed is a point. Who is run over loses a life and begins at the bottom; so does, with no
loss, who has reached the top.
"""

from __future__ import annotations

import numpy as np

from .board import DANGER, DOWN, PLAYER, SIDE, UP, SmallGame

COLUMN = 4  # of the walker, who goes up and down only
LANES = (2, 4, 6, 8)  # rows; the others are kerbs
TOP = 1
CAR = 2  # squares long


class Cross(SmallGame):
    """row: of the walker. best: the smallest row since the bottom. lanes: [4][SIDE], 1 where a car
    stands. Cars go a square a step, round and round, in turn to the left and to the right.
    """

    name = "cross"
    STATE = ("row", "best", "lanes")

    def _begin(self) -> None:
        self.row = self.best = SIDE - 1
        self.lanes = [self._lane() for _ in LANES]

    def _lane(self) -> list[int]:
        """Two cars with a gap of one square at least on both sides."""
        lane, start = [0] * SIDE, self._random.randrange(SIDE)
        apart = self._random.randrange(CAR + 1, SIDE - CAR)
        for begin in (start, start + apart):
            for square in range(begin, begin + CAR):
                lane[square % SIDE] = 1
        return lane

    def _play(self, button: int) -> tuple[int, bool]:
        self.row = min(max(self.row + (button == DOWN) - (button == UP), TOP), SIDE - 1)
        for i, lane in enumerate(self.lanes):
            self.lanes[i] = lane[1:] + lane[:1] if i % 2 else lane[-1:] + lane[:-1]
        if self.row in LANES and self.lanes[LANES.index(self.row)][COLUMN]:
            self.row = self.best = SIDE - 1
            return 0, True
        crossed = self.row < self.best and self.row not in LANES
        self.best = min(self.best, self.row)
        if self.row == TOP:
            self.row = self.best = SIDE - 1
        return int(crossed), False

    def _draw(self, planes: np.ndarray) -> None:
        planes[PLAYER, self.row, COLUMN] = True
        for row, lane in zip(LANES, self.lanes, strict=True):
            planes[DANGER, row] = np.array(lane, bool)
