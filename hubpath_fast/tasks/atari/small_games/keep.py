"""Keep: balls come from the right, and a keeper three squares tall has to be where they arrive.

A ball kept is a point, one that gets past costs a life.
"""

from __future__ import annotations

import numpy as np

from .board import DANGER, DOWN, GOOD, PLAYER, SIDE, UP, SmallGame

EVERY = 6  # steps from a ball to the next: enough to get nearly anywhere
GOAL = 0  # column


class Keep(SmallGame):
    """keeper: row of his middle. balls: [[row, column], ...]. wait: steps to the next one."""

    name = "keep"
    STATE = ("keeper", "balls", "wait")

    def _begin(self) -> None:
        self.keeper = self._random.randrange(1, SIDE - 1)
        self.balls, self.wait = [], 0

    def _play(self, button: int) -> tuple[int, bool]:
        step = (button == DOWN) - (button == UP)
        self.keeper = min(max(self.keeper + step, 1), SIDE - 2)
        flown = [[row, column - 1] for row, column in self.balls]
        arrived = [row for row, column in flown if column == GOAL + 1]
        self.balls = [ball for ball in flown if ball[1] > GOAL + 1]
        if self.wait == 0:
            self.balls.append([self._random.randrange(SIDE), SIDE - 1])
            self.wait = EVERY
        self.wait -= 1
        kept = sum(abs(row - self.keeper) <= 1 for row in arrived)
        return kept, kept < len(arrived)

    def _draw(self, planes: np.ndarray) -> None:
        planes[DANGER, :, GOAL] = True
        planes[PLAYER, self.keeper - 1 : self.keeper + 2, GOAL + 1] = True
        for row, column in self.balls:
            planes[GOOD, row, column] = True
