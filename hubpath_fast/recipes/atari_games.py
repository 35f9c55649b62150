"""``hubpath atari games``: what can be played."""

from __future__ import annotations

from ..tasks.atari.games import SCORES, games, match_games
from ..tasks.atari.small_games import NAMES


def list_games(pattern: str | None = None) -> tuple[list[str], list[str]]:
    """A line for each game whose name has this text in it, or fits this pattern, and notes: of the
    emulator, where it is not installed. None: all games.

    Raises ValueError, with the closest names, where there is none.
    """
    known, notes = (), []
    try:
        known = games()
    except ValueError as error:
        notes = [str(error)]
    try:
        found = match_games(pattern, (*known, *NAMES))
    except ValueError as error:
        raise ValueError("; ".join([str(error), *notes])) from None
    return [f"{name:<18}{_said(name)}".rstrip() for name in found], notes


def _said(name: str) -> str:
    if name in NAMES:
        return "  a small game of our own, without the emulator"
    scores = SCORES.get(name)
    return f"  human {scores.human:g}, random {scores.random:g}" if scores else ""
