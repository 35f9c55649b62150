"""Atari games as environments; the emulator is imported when one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .games import find_game, no_emulator

if TYPE_CHECKING:
    from .emulator import AtariEnv

NOOP_MAX = 30
MAX_STEPS = 27_000  # of 4 frames: half an hour at 60 frames a second


def make_env(
    game: str,
    seed: int,
    training: bool,
    noop_max: int = NOOP_MAX,
    max_steps: int = MAX_STEPS,
) -> AtariEnv:
    """A game, as Data-Efficient Rainbow plays it; see ``AtariEnv``.

    Args:
        game: as ``find_game`` knows it.
        seed: of the emulator and of the no-ops; it is set once, not at each reset.
        training: a lost life ends the learner's episode (info "life_lost"), while the game goes on.
        noop_max: a game starts with 0 to ``noop_max - 1`` frames without an action; 0 or 1: none.
        max_steps: a game is truncated after that many steps.

    Returns:
        A ``gymnasium.Env``: observations uint8 [4, 84, 84], newest last; info "lives", "life_lost".

    Raises:
        ValueError: there is no such game, or the emulator is not installed.
    """
    game = find_game(game)
    try:
        from .emulator import AtariEnv
    except ImportError as error:
        raise no_emulator(error) from error
    return AtariEnv(game, seed, training, noop_max, max_steps)
