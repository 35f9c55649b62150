"""Catch: stones fall, and a paddle three squares wide has to be where they land.

A stone caught is a point, one that reaches the ground beside the paddle costs a life.
"""

from __future__ import annotations

import numpy as np

from .board import GOOD, LEFT, PLAYER, RIGHT, SIDE, SmallGame

EVERY = 6  # steps from a stone to the next: enough to get nearly anywhere


class Catch(SmallGame):
    """paddle: column of its middle. stones: [[row, column], ...]. wait: steps to the next one."""

    name = "catch"
    STATE = ("paddle", "stones", "wait")

    def _begin(self) -> None:
        self.paddle = self._random.randrange(1, SIDE - 1)
        self.stones, self.wait = [], 0

    def _play(self, button: int) -> tuple[int, bool]:
        step = (button == RIGHT) - (button == LEFT)
        self.paddle = min(max(self.paddle + step, 1), SIDE - 2)
        fallen = [[row + 1, column] for row, column in self.stones]
        landed = [column for row, column in fallen if row == SIDE - 1]
        self.stones = [stone for stone in fallen if stone[0] < SIDE - 1]
        if self.wait == 0:
            self.stones.append([0, self._random.randrange(SIDE)])
            self.wait = EVERY
        self.wait -= 1
        caught = sum(abs(column - self.paddle) <= 1 for column in landed)
        return caught, caught < len(landed)

    def _draw(self, planes: np.ndarray) -> None:
        planes[PLAYER, SIDE - 1, self.paddle - 1 : self.paddle + 2] = True
        for row, column in self.stones:
            planes[GOOD, row, column] = True
