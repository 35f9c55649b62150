"""Medley: every episode is one of the small games, drawn, with its buttons in another place.

Each game has its own fixed order of buttons, so that a policy's last layer, which knows them, has
to be learned anew, while all that it knows of what is on the board remains of use. Which game is
played stands in ``info`` for reports, never in the observation.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from .board import BUTTONS, FRAME_SHAPE, HISTORY, MAX_STEPS, SmallGame, Stored
from .catch import Catch
from .cross import Cross
from .keep import Keep

GAMES: tuple[type[SmallGame], ...] = (Catch, Cross, Keep)
# ORDERS[game][button pressed] = the game's own button. No button is where it was, and none does the
# same in two games.
ORDERS = {"catch": (1, 2, 0, 4, 5, 3), "cross": (2, 3, 4, 5, 0, 1), "keep": (5, 4, 3, 1, 2, 0)}


class Medley(Stored):
    """The games as one environment; see ``SmallGame`` for arguments and calls."""

    name = "medley"
    action_names = tuple(f"button {i}" for i in range(len(BUTTONS)))
    num_actions = len(BUTTONS)
    frame_shape, history = FRAME_SHAPE, HISTORY

    def __init__(self, seed: int, training: bool = False, max_steps: int = MAX_STEPS):
        self._random = random.Random(seed)
        self._games = [game(self._random.randrange(2**32), training, max_steps) for game in GAMES]
        self._current = 0

    @property
    def game(self) -> SmallGame:
        """That of the current episode."""
        return self._games[self._current]

    def reset(
        self, seed: int | None = None, options: Any = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """As a game's. The order of games hangs on the seed alone, not on how they are played."""
        if seed is not None:
            self._random.seed(seed)
            for game in self._games:
                game.reset(self._random.randrange(2**32))
        self._current = self._random.randrange(len(GAMES))
        return self.game.reset()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """As a game's, whose button is at another place."""
        if not 0 <= action < self.num_actions:
            raise ValueError(f"action: expected 0..{self.num_actions - 1}, got {action}")
        return self.game.step(ORDERS[self.game.name][action])

    def render(self) -> np.ndarray:
        return self.game.render()

    def _held(self) -> dict[str, Any]:
        return {"current": self._current, "games": [game.state_dict() for game in self._games]}

    def _hold(self, state: Mapping[str, Any]) -> None:
        if state["current"] not in range(len(GAMES)):
            raise ValueError(f"it plays game {state['current']!r}")
        for game, own in zip(self._games, state["games"], strict=True):
            game.load_state_dict(own)
        self._current = state["current"]
