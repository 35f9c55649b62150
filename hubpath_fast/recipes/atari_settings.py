"""The settings of a run on a game, of what a command was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..runs.resolve import parse_set
from ..tasks.atari.open_game import known_game
from ..tasks.atari.settings import AtariSettings


def read_settings(asked: Mapping[str, Any], extra: Sequence[str] = ()) -> AtariSettings:
    """asked: settings by name, "hub" as "RUN,RUN" too. extra: KEY=VALUE of ``--set``, which go
    first. What is not given is as Data-Efficient Rainbow has it, of a small game as that has it.

    Raises ValueError for unknown games and settings, with the closest names.
    """
    given = {**asked, **parse_set(extra, AtariSettings)}
    if isinstance(given.get("hub"), str):
        given["hub"] = [part.strip() for part in given["hub"].split(",") if part.strip()]
    given["game"], defaults = known_game(given["game"])
    return AtariSettings.from_dict({**defaults, **given})
