"""What the small games share: the board, its frames, lives, the episode's limit and exact states.

A board has SIDE x SIDE squares and three kinds of objects, the same in all games, so that their
frames can be told apart by nothing but what is on them. In a frame uint8 [20, 20] each square is
2 x 2 pixels, one a kind, 255 where such an object stands and 0 elsewhere:

    player  good        good: where the player wants to be      danger: where not
    danger  -

Cells of 4 x 4 pixels (``PATCHES``) are then 2 x 2 squares with all their planes, for the network
that the Atari games have. An observation is uint8 [HISTORY, 20, 20], newest last, zeros before the
episode began, and the games keep to the protocol of the Atari environments without needing their
libraries: see ``SmallGame``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

SIDE, KINDS = 10, 3
PLAYER, GOOD, DANGER = range(KINDS)
HISTORY = 2  # frames: the second shows where things go
FRAME_SHAPE = (2 * SIDE, 2 * SIDE)
PATCHES = (4, 5)  # pixels of a cell, cells of a block: all of the board

BUTTONS = ("nothing", "left", "right", "up", "down", "fire")
NOTHING, LEFT, RIGHT, UP, DOWN, FIRE = range(len(BUTTONS))

LIVES = 3
MAX_STEPS = 100  # of an episode, which then ends as truncated

ZOOM = 16  # pixels of a square in a picture
GROUND, RULE = (24, 28, 34), (36, 41, 49)
COLORS = ((86, 180, 233), (240, 228, 66), (213, 94, 0))  # of the kinds


class Stored:
    """The exact state of something that draws from ``_random`` and has a ``name``; it says what
    else there is in ``_held``, plain types by name, and takes it in ``_hold``."""

    name: ClassVar[str]
    _random: random.Random

    def _held(self) -> dict[str, Any]:
        raise NotImplementedError

    def _hold(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """All that the next step hangs on, as plain types."""
        version, internal, _ = self._random.getstate()
        return {"game": self.name, "random": [version, *internal], **self._held()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there, to the bit. Raises ValueError where the state is damaged or of
        another game; the game is then as it was."""
        before = self.state_dict()
        try:
            self._load(state)
        except (
            AttributeError,
            IndexError,
            KeyError,
            OverflowError,
            TypeError,
            ValueError,
        ) as error:
            self._load(before)
            raise ValueError(f"the state of the game {self.name} is damaged: {error}") from None

    def _load(self, state: Mapping[str, Any]) -> None:
        if state["game"] != self.name:
            raise ValueError(f"it is one of {state['game']!r}")
        version, *internal = state["random"]
        self._random.setstate((version, tuple(internal), None))
        self._hold(state)


class SmallGame(Stored):
    """A game as an environment. Subclasses say the rules.

    Args:
        seed: of all that is drawn; every reset goes on with the same generator.
        training: after a lost life earlier frames are cleared from the observation, as they are
            where a learner's episode ends.
        max_steps: of an episode.

    A subclass has ``name``, ``STATE``, the names of what the next step hangs on (integers or nested
    lists of them, made by ``_begin``), and ``_begin``, ``_play`` and ``_draw``.
    """

    STATE: ClassVar[tuple[str, ...]]

    action_names = BUTTONS
    num_actions = len(BUTTONS)
    frame_shape, history = FRAME_SHAPE, HISTORY

    def __init__(self, seed: int, training: bool = False, max_steps: int = MAX_STEPS):
        self.training, self.max_steps = training, max_steps
        self._random = random.Random(seed)
        self._stack = np.zeros((HISTORY, *FRAME_SHAPE), np.uint8)
        self.lives = self.steps = 0
        self._begin()

    def _begin(self) -> None:
        """Sets the board of a new episode."""
        raise NotImplementedError

    def _play(self, button: int) -> tuple[int, bool]:
        """One step. Returns (points, whether a life is lost)."""
        raise NotImplementedError

    def _draw(self, planes: np.ndarray) -> None:
        """Marks the objects on planes bool [KINDS, SIDE, SIDE]."""
        raise NotImplementedError

    def reset(
        self, seed: int | None = None, options: Any = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode; seed: None goes on with the generator. Returns (observation, info)."""
        if seed is not None:
            self._random.seed(seed)
        self.lives, self.steps = LIVES, 0
        self._begin()
        self._stack[:] = 0
        self._stack[-1] = self._frame()
        return self._stack.copy(), self._info(False)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Presses a button.

        Returns:
            (observation, points, terminated, truncated, info with "lives", "life_lost", "game").

        Raises:
            ValueError: no such button, or the episode is over.
        """
        if not 0 <= action < self.num_actions:
            raise ValueError(f"action: expected 0..{self.num_actions - 1}, got {action}")
        if not self.lives or self.steps >= self.max_steps:
            raise ValueError("the episode is over (or none has begun): call reset()")
        points, lost = self._play(int(action))
        self.steps += 1
        self.lives -= lost
        terminated = self.lives == 0
        truncated = not terminated and self.steps >= self.max_steps
        if lost and self.training and not terminated:
            self._stack[:] = 0
        self._stack[:-1] = self._stack[1:]
        self._stack[-1] = self._frame()
        return self._stack.copy(), float(points), terminated, truncated, self._info(lost)

    def render(self) -> np.ndarray:
        """A picture uint8 [h, w, 3] of the board."""
        size = SIDE * ZOOM
        picture = np.empty((size, size, 3), np.uint8)
        picture[:] = RULE
        inside = np.arange(size) % ZOOM > 0  # a thin line before every square
        planes = self._planes()
        colors = np.full((SIDE, SIDE, 3), GROUND, np.uint8)
        for kind, color in enumerate(COLORS):
            colors[planes[kind]] = color
        squares = np.kron(colors, np.ones((ZOOM, ZOOM, 1), np.uint8))
        np.copyto(picture, squares, where=(inside[:, None] & inside)[..., None])
        return picture

    def _held(self) -> dict[str, Any]:
        return {
            "lives": self.lives,
            "steps": self.steps,
            "stack": self._stack.tolist(),
            "board": {name: _copy(getattr(self, name)) for name in self.STATE},
        }

    def _hold(self, state: Mapping[str, Any]) -> None:
        board = {name: _copy(state["board"][name]) for name in self.STATE}
        stack = np.array(state["stack"], dtype=np.uint8)
        if stack.shape != self._stack.shape:
            raise ValueError(f"its frames have shape {list(stack.shape)}")
        if not 0 <= state["lives"] <= LIVES or not 0 <= state["steps"] <= self.max_steps:
            raise ValueError(f"it has {state['lives']} lives after {state['steps']} steps")
        self.lives, self.steps, self._stack = state["lives"], state["steps"], stack
        vars(self).update(board)
        if state["lives"] and not np.array_equal(self._frame(), stack[-1]):
            raise ValueError("its frames do not show its board")

    def _info(self, lost: bool) -> dict[str, Any]:
        return {"lives": self.lives, "life_lost": bool(lost), "game": self.name}

    def _planes(self) -> np.ndarray:
        planes = np.zeros((KINDS, SIDE, SIDE), bool)
        self._draw(planes)
        return planes

    def _frame(self) -> np.ndarray:
        frame = np.zeros(FRAME_SHAPE, np.uint8)
        for kind, plane in enumerate(self._planes()):
            frame[kind // 2 :: 2, kind % 2 :: 2] = 255 * plane
        return frame


def _copy(value: Any) -> Any:
    """Integers and nested lists of them; anything else is a TypeError."""
    if isinstance(value, list):
        return [_copy(item) for item in value]
    if type(value) is not int:
        raise TypeError(f"expected whole numbers, got {value!r}")
    return value
