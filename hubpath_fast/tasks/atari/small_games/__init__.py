"""Three small games of our own on a board of 10 x 10 squares, and the medley of them.

For the demo and for tests: policies learn them in minutes on a core, with no emulator. They are not
Atari games, and no table calls them so.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .board import MAX_STEPS, PATCHES, SmallGame
from .medley import GAMES, Medley

NAMES = (*(game.name for game in GAMES), Medley.name)

# Of a run on one, where they differ from those of Atari's games: chosen on seed 0 in runs of STEPS.
# Returns are sums of points, none of which is lost again.
STEPS = 6_000
SETTINGS: Mapping[str, Any] = MappingProxyType(
    {
        "steps": STEPS, "learn_start": 400, "target_every": 500, "n_step": 10, "gamma": 0.97,
        "lr": 2.5e-4, "hidden": 64, "widths": (16, 64), "patches": PATCHES, "v_min": 0.0,
        "v_max": 10.0, "eval_every": 1_000, "eval_episodes": 20, "save_every": 2_000,
    }
)  # fmt: skip

__all__ = [
    "GAMES",
    "NAMES",
    "SETTINGS",
    "STEPS",
    "Medley",
    "SmallGame",
    "make_small_game",
]


def make_small_game(
    name: str, seed: int, training: bool = False, max_steps: int = MAX_STEPS
) -> SmallGame | Medley:
    """The environment of a small game: ``catch``, ``cross``, ``keep``, or ``medley``."""
    for game in (*GAMES, Medley):
        if game.name == name:
            return game(seed, training, max_steps)
    raise ValueError(f"game: expected one of {', '.join(NAMES)}, got {name!r}")
