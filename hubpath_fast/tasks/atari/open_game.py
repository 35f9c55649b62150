"""What is played, by its name: a game of the emulator, or one of our small games."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from .environments import make_env
from .games import find_game
from .small_games import NAMES, SETTINGS, make_small_game


def known_game(name: str) -> tuple[str, Mapping[str, Any]]:
    """(its name as all else takes it, settings that differ from those of Atari's games).

    Raises ValueError with the closest names where there is none.
    """
    small = str(name).strip().lower()
    if small in NAMES:
        return small, SETTINGS
    try:
        return find_game(name), {}
    except ValueError as error:
        close = difflib.get_close_matches(small, NAMES, n=1)
        if close:
            raise ValueError(f"{error}; or is the small game {close[0]} meant?") from None
        raise


def about(game: str) -> str:
    """What a step and a game are, for who reads a run's first lines."""
    if game in NAMES:
        return "a small game of our own, a board of 10 x 10 squares"
    return (
        "4 frames a step, no sticky actions, the game's minimal actions, a lost life ends what is "
        "learned from but not the game, rewards clipped to -1..1, at most 27,000 steps a game"
    )


def open_game(game: str, seed: int, training: bool) -> Any:
    """An environment; see ``environments.make_env`` and ``small_games.make_small_game``."""
    make = make_small_game if game in NAMES else make_env
    return make(game, seed, training)
