"""Games of the emulator: their names, as users spell them, and what humans and chance score.

A game is called as the emulator calls its file: ``gopher``, ``jamesbond``, ``kung_fu_master``.
Importing this module does not import the emulator.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

EXTRA = 'pip install "hubpath-fast[atari]"'
MULTIPLAYER = ("combat", "joust", "maze_craze", "warlords")  # their cartridges start no game alone


class ReferenceScores(NamedTuple):
    """Raw scores of whole games: of a professional tester, and of actions drawn at random."""

    human: float
    random: float


# The 26 games of Atari-100k, and Riverraid, of which the paper takes a source: values of Mnih et
# al. (2015) and Wang et al. (2016), as Dopamine's atari_100k and DeepMind's dqn_zoo list them.
SCORES = {
    "alien": ReferenceScores(7127.7, 227.8),
    "amidar": ReferenceScores(1719.5, 5.8),
    "assault": ReferenceScores(742.0, 222.4),
    "asterix": ReferenceScores(8503.3, 210.0),
    "bank_heist": ReferenceScores(753.1, 14.2),
    "battle_zone": ReferenceScores(37187.5, 2360.0),
    "boxing": ReferenceScores(12.1, 0.1),
    "breakout": ReferenceScores(30.5, 1.7),
    "chopper_command": ReferenceScores(7387.8, 811.0),
    "crazy_climber": ReferenceScores(35829.4, 10780.5),
    "demon_attack": ReferenceScores(1971.0, 152.1),
    "freeway": ReferenceScores(29.6, 0.0),
    "frostbite": ReferenceScores(4334.7, 65.2),
    "gopher": ReferenceScores(2412.5, 257.6),
    "hero": ReferenceScores(30826.4, 1027.0),
    "jamesbond": ReferenceScores(302.8, 29.0),
    "kangaroo": ReferenceScores(3035.0, 52.0),
    "krull": ReferenceScores(2665.5, 1598.0),
    "kung_fu_master": ReferenceScores(22736.3, 258.5),
    "ms_pacman": ReferenceScores(6951.6, 307.3),
    "pong": ReferenceScores(14.6, -20.7),
    "private_eye": ReferenceScores(69571.3, 24.9),
    "qbert": ReferenceScores(13455.0, 163.9),
    "riverraid": ReferenceScores(17118.0, 1338.5),
    "road_runner": ReferenceScores(7845.0, 11.5),
    "seaquest": ReferenceScores(42054.7, 68.4),
    "up_n_down": ReferenceScores(11693.2, 533.4),
}


@functools.lru_cache(maxsize=1)
def games() -> tuple[str, ...]:
    """All games of the emulator that one plays alone, by name.

    Raises ValueError where the emulator is not installed.
    """
    try:
        from ale_py.roms import get_all_rom_ids
    except ImportError as error:
        raise no_emulator(error) from error
    return tuple(sorted(set(get_all_rom_ids()) - set(MULTIPLAYER)))


def no_emulator(error: ImportError) -> ValueError:
    """What to say where the emulator or gymnasium cannot be imported."""
    return ValueError(
        "Atari games need the emulator ale_py, which comes with its games, and gymnasium: "
        f"{EXTRA} installs both ({error})"
    )


def find_game(name: str) -> str:
    """The game that is meant: ``ALE/Gopher-v5``, ``James Bond`` and ``jamesbond`` are spellings.

    Raises ValueError with the closest ones if there is none, or without the emulator.
    """
    game = _match(name, games())
    if game is None:
        close = _closest(name, games())
        raise ValueError(f"game {name!r} is unknown; {close}`hubpath atari games` lists all")
    return game


def match_games(pattern: str | None, known: Sequence[str]) -> tuple[str, ...]:
    """Of known games those whose name has this text in it, or fits this pattern (``*quest``),
    however it is spelt; None: all. ValueError where there is none."""
    if pattern is None:
        return tuple(known)
    wanted = _plain(pattern, "*?")
    wanted = wanted if set(wanted) & set("*?") else f"*{wanted}*"
    found = tuple(game for game in known if fnmatch.fnmatchcase(_plain(game), wanted))
    if not found:
        raise ValueError(
            f"pattern: no game fits {pattern!r}; {_closest(pattern, known)}"
            "`hubpath atari games` lists all"
        )
    return found


def reference_scores(game: str) -> ReferenceScores:
    """What a human and chance score. The emulator is not needed.

    Raises ValueError for a game of which the two are not known here.
    """
    found = _match(game, SCORES)
    if found is None:
        raise ValueError(
            f"game {game!r}: no scores of a human and of chance are known to normalise by; "
            f"{_closest(game, SCORES)}there are those of {', '.join(SCORES)}"
        )
    return SCORES[found]


def human_normalized(score: float, game: str) -> float:
    """(score - random) / (human - random): 0 for actions drawn at random, 1 for a human.

    score: raw, of whole games; a number, or an array or tensor of them. Raises ValueError as
    ``reference_scores`` does.
    """
    reference = reference_scores(game)
    return (score - reference.random) / (reference.human - reference.random)


def _match(name: str, known: Iterable[str]) -> str | None:
    if not isinstance(name, str):
        raise ValueError(f"game: expected a name such as 'gopher', got {name!r}")
    return {_plain(game): game for game in known}.get(_plain(name))


def _closest(name: str, known: Iterable[str]) -> str:
    spellings = {_plain(game): game for game in known}
    close = difflib.get_close_matches(_plain(name), spellings, n=3)
    return f"did you mean {' or '.join(spellings[other] for other in close)}? " if close else ""


def _plain(name: str, others: str = "") -> str:
    """Letters and digits alone, without what gymnasium's names of environments have around them.

    others: signs that stay.
    """
    name = name.strip().lower().removeprefix("ale/")
    name = re.sub(r"-v\d+$", "", name)
    name = name.removesuffix("-ram").removesuffix("noframeskip").removesuffix("deterministic")
    return "".join(sign for sign in name if sign.isascii() and (sign.isalnum() or sign in others))
