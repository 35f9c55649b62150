"""One Atari game as an environment, in the protocol of Data-Efficient Rainbow.

A step is one action for 4 frames; the observation is the last ``history`` of the small grey frames
that ``screens`` makes of the last two screens of a step. No sticky actions, the game's minimal
actions, raw scores as rewards. docs/atari.md says where public codes do otherwise.

Imports the emulator: everything else gets at this module through ``environments.make_env``.
"""

from __future__ import annotations

import functools
import operator
import zlib
from typing import Any

import gymnasium
import numpy as np
import torch
from ale_py import ALEInterface, ALEState, LoggerMode, roms
from torch import Tensor

from .screens import shrink

FRAME_SKIP = 4
HISTORY = 4
SIZE = 84
MAX_SEED = 2**63 - 1  # of torch's generators
NOOP = 0  # the emulator's number of "no action", whatever the game
STATE = (
    "game",
    "emulator",
    "checksum",
    "generator",
    "stack",
    "screens",
    "lives",
    "steps",
    "running",
)


class AtariEnv(gymnasium.Env):
    """A game of the emulator.

    A lost life, ``lives < before and lives > 0``, is ``info["life_lost"]``: for a learner the
    episode ends there. Here the game goes on with the next action, and no step is spent on a no-op.
    In training the observation is then all zeros but for the newest frame, as after a reset, so
    that who acts sees what a replay gives to who learns. In evaluation frames stay.

    A game that is over is ``terminated``; one that reached ``max_steps`` is ``truncated``, which is
    no end of the game: a return goes on in the value of the last observation.

    Args:
        game: the emulator's name of it, see ``games.find_game``.
        seed: of the emulator and of the no-ops.
        training: whether lost lives clear the frames.
        noop_max: a game starts with 0 to ``noop_max - 1`` frames of no action; 0 or 1: none.
        max_steps: that a game has at most.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012 gymnasium's
    render_mode = "rgb_array"

    def __init__(
        self, game: str, seed: int, training: bool, noop_max: int = 30, max_steps: int = 27_000
    ):
        self.noop_max = _integer("noop_max", noop_max, 0)
        self.max_steps = _integer("max_steps", max_steps, 1)
        self.game, self.training = game, bool(training)
        ALEInterface.setLoggerMode(LoggerMode.Error)  # before the first one, which greets otherwise
        self._ale = ALEInterface()
        self._ale.setFloat("repeat_action_probability", 0.0)
        self._generator = torch.Generator()
        self._start_emulator(_integer("seed", seed, 0, MAX_SEED))
        self._actions = self._ale.getMinimalActionSet()
        self.action_names = tuple(action.name for action in self._actions)
        self.num_actions = len(self._actions)
        self.frame_shape, self.history = (SIZE, SIZE), HISTORY
        self.action_space = gymnasium.spaces.Discrete(self.num_actions)
        self.observation_space = gymnasium.spaces.Box(0, 255, (HISTORY, SIZE, SIZE), np.uint8)
        # The last two: what the second last frame of a step shows, and the maximum of both.
        self._screens = np.zeros((2, *self._ale.getScreenDims()), np.uint8)
        self._stack = np.zeros((HISTORY, SIZE, SIZE), np.uint8)
        self._lives = self._steps = 0
        self._running = False

    def _start_emulator(self, seed: int) -> None:
        """The emulator takes a seed when it loads a game, in 31 bits."""
        self._generator.manual_seed(seed)
        self._ale.setInt("random_seed", self._draw(2**31))
        self._ale.loadROM(_path(self.game))

    def _draw(self, end: int) -> int:
        return int(torch.randint(end, (), generator=self._generator))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts a new game. seed: start all over with this one; None: go on drawing."""
        super().reset(seed=seed)
        if seed is not None:
            self._start_emulator(_integer("seed", seed, 0, MAX_SEED))
        self._ale.reset_game()
        for _ in range(self._draw(self.noop_max) if self.noop_max > 1 else 0):
            self._ale.act(NOOP)
            if self._ale.game_over():
                self._ale.reset_game()
        self._screens[0] = 0
        self._ale.getScreenGrayscale(self._screens[1])
        self._lives, self._steps, self._running = self._ale.lives(), 0, True
        self._see(cleared=True)
        return self._stack.copy(), {"lives": self._lives, "life_lost": False}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes one of ``num_actions`` actions for 4 frames.

        Returns:
            (observation, the raw score of the 4 frames, terminated, truncated, info).
        """
        if not self._running:
            raise ValueError("step: no game is running; call reset() first, and after each game")
        action = _integer("action", action, 0, self.num_actions - 1)
        score, over = 0, False
        for frame in range(FRAME_SKIP):
            score += self._ale.act(self._actions[action])
            over = self._ale.game_over()
            if over:  # the screens stay those before; nobody acts on what is seen here
                break
            if frame >= FRAME_SKIP - 2:
                self._ale.getScreenGrayscale(self._screens[frame - (FRAME_SKIP - 2)])
        before, self._lives = self._lives, self._ale.lives()
        life_lost = not over and 0 < self._lives < before
        self._steps += 1
        truncated = not over and self._steps >= self.max_steps
        self._running = not (over or truncated)
        self._see(cleared=life_lost and self.training)
        info = {"lives": self._lives, "life_lost": life_lost}
        return self._stack.copy(), float(score), over, truncated, info

    def _see(self, cleared: bool) -> None:
        """The screens become the newest frame. cleared: as the only one."""
        np.maximum(self._screens[0], self._screens[1], out=self._screens[1])
        self._stack[:-1] = 0 if cleared else self._stack[1:]
        self._stack[-1] = shrink(self._screens[1], SIZE)

    def render(self) -> np.ndarray:
        """The screen in colour, uint8 [210, 160, 3]: the last frame of the last step.

        After ``load_state_dict`` it is an old one until the next step.
        """
        return self._ale.getScreenRGB()

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, as tensors and plain values."""
        blob = self._ale.cloneState(include_rng=True).serialize()
        return {
            "game": self.game,
            "emulator": torch.frombuffer(bytearray(blob), dtype=torch.uint8),
            "checksum": zlib.crc32(blob),
            "generator": self._generator.get_state(),
            "stack": torch.from_numpy(self._stack.copy()),
            # The emulator draws no screen when it is restored.
            "screens": torch.from_numpy(self._screens.copy()),
            "lives": self._lives,
            "steps": self._steps,
            "running": self._running,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken, to the bit.

        Raises ValueError for a state of another game, or one that is damaged; this environment
        then is as it was before.
        """
        missing = [name for name in STATE if name not in state]
        if missing:
            raise ValueError(f"state of {self.game}: damaged, {', '.join(missing)} missing")
        if state["game"] != self.game:
            raise ValueError(f"state: expected one of {self.game}, got one of {state['game']}")
        stack = _bytes(state, "stack", self._stack.shape)
        screens = _bytes(state, "screens", self._screens.shape)
        blob = _bytes(state, "emulator").tobytes()
        try:
            if zlib.crc32(blob) != state["checksum"]:
                raise ValueError(f"the emulator's {len(blob)} bytes are not those saved")
            emulator = ALEState(blob)
            generator = torch.Generator().set_state(state["generator"])
            counts = [operator.index(state[name]) for name in ("lives", "steps")]
        except (RuntimeError, SystemError, TypeError, ValueError) as error:
            raise ValueError(f"state of {self.game}: damaged, {error}") from error
        self._ale.restoreState(emulator)
        self._generator = generator
        self._stack[:], self._screens[:] = stack, screens
        self._lives, self._steps = counts
        self._running = bool(state["running"])


def _bytes(state: dict[str, Any], name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A tensor of bytes in a state. shape: that it must have."""
    value = state[name]
    right = isinstance(value, Tensor) and value.dtype == torch.uint8
    if not right or (value.ndim != 1 if shape is None else tuple(value.shape) != shape):
        wanted = "[n]" if shape is None else list(shape)
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value)
        raise ValueError(f"state: damaged, {name} should be uint8 {wanted}, got {got}")
    return value.cpu().numpy()


@functools.lru_cache(maxsize=16)
def _path(game: str) -> str:
    """Of the game's file, whose hash ale_py has checked."""
    path = None if game not in roms.get_all_rom_ids() else roms.get_rom_path(game)
    if path is None:
        raise ValueError(f"game {game!r} is unknown; `hubpath atari games` lists all")
    return str(path)


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value as an int; numpy's and torch's integers are as good as Python's."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    outside = number is None or number < low or (high is not None and number > high)
    if outside or isinstance(value, bool):
        wanted = f"an integer in {low}..{high}" if high is not None else f"an integer >= {low}"
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    return number
