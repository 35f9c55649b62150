"""A game of four actions, as environments are, without the emulator."""

import numpy as np


class Follow:
    """Shows the number of an action; it is worth 5 points, any other -1. Three lives are lost, at
    every fourth step, and with the last the game is over. ``limit``: of steps."""

    num_actions, frame_shape, history = 4, (6, 6), 2
    action_names = ("a", "b", "c", "d")

    def __init__(self, limit=100):
        self.limit, self.resets, self.actions = limit, 0, []

    def reset(self, seed=None, options=None):
        self.resets += 1
        self.lives, self.steps = 3, 0
        return self.show(), {"lives": 3, "life_lost": False}

    def show(self):
        self.shown = (self.resets + 3 * self.steps) % self.num_actions
        return np.full((2, 6, 6), self.shown, np.uint8)

    def step(self, action):
        self.actions.append(action)
        reward = 5.0 if action == self.shown else -1.0
        self.steps += 1
        lost = self.steps % 4 == 0
        self.lives -= lost
        over = self.lives == 0
        info = {"lives": self.lives, "life_lost": lost and not over}
        return self.show(), reward, over, not over and self.steps >= self.limit, info

    def render(self):
        return np.full((8, 8, 3), 10 * self.steps, np.uint8)
