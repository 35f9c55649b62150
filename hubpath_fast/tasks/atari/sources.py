"""Policies of finished runs: as sources of another game, or to play with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ...training.checkpoint import CheckpointError, find_checkpoint, load_config, load_weights
from .network import RainbowNetwork
from .policies import make_policy
from .settings import FINETUNE, SCRATCH, AtariSettings

if TYPE_CHECKING:
    from .policy import Policy

LAST = "last"


@dataclass(frozen=True)
class Source:
    """A network that plays a game. actions: names of its actions."""

    name: str
    game: str
    network: RainbowNetwork
    actions: tuple[str, ...]


@dataclass(frozen=True)
class OpenRun:
    """A run as its last checkpoint has it. actions: names of its game's; networks: constructors'
    arguments of those that the policy was made of."""

    policy: Policy
    settings: AtariSettings
    actions: tuple[str, ...]
    networks: tuple[dict[str, Any], ...]


def checkpoint_config(
    settings: AtariSettings, actions: Sequence[str], networks: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What ``config.json`` of a checkpoint says: all that ``open_run`` needs beside the weights."""
    return {
        "atari": settings.to_dict(),
        "actions": list(actions),
        "networks": [dict(config) for config in networks],
    }


def open_run(folder: str | Path, device: str = "cpu") -> OpenRun:
    """The policy of a run's last checkpoint, in evaluation mode.

    Raises CheckpointError where there is none, or one that is damaged or of another kind of run.
    """
    folder = Path(folder)
    last = find_checkpoint(folder / LAST)
    if last is None:
        hint = "" if folder.is_dir() else "; there is no such folder"
        raise CheckpointError(
            f"{folder} holds no run of `hubpath atari`{hint}: expected {folder / LAST}, which "
            "`hubpath atari pretrain` and `fit` write"
        )
    record = load_config(last)
    try:
        settings = AtariSettings.from_dict(record["atari"])
        actions, networks = tuple(record["actions"]), tuple(record["networks"])
        bodies = [RainbowNetwork(**config) for config in networks]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{last} is not of a run of `hubpath atari` ({error})") from error
    policy = make_policy(settings, bodies, len(actions))
    # Twice the policy, as it was saved: the target network beside the one that learns.
    weights = nn.ModuleDict(
        {"online": policy, "target": make_policy(settings, bodies, len(actions))}
    )
    load_weights(weights, last)
    return OpenRun(policy.to(device).eval(), settings, actions, networks)


def saved_networks(folder: Path) -> list[RainbowNetwork]:
    """Networks like those that a run's policy was made of, without their weights."""
    return [RainbowNetwork(**config) for config in load_config(folder / LAST)["networks"]]


def open_policy(folder: str | Path, device: str = "cpu") -> tuple[Policy, AtariSettings]:
    """See ``open_run``."""
    found = open_run(folder, device)
    return found.policy, found.settings


def open_source(folder: str | Path) -> Source:
    """The network of a run of a single one.

    Raises ValueError for a run of several networks, which is no source.
    """
    found = open_run(folder)
    if found.settings.method not in (SCRATCH, FINETUNE):
        raise ValueError(
            f"hub: {folder} is a run of the method {found.settings.method}; a source is one "
            f"network, of `hubpath atari pretrain`"
        )
    return Source(Path(folder).name, found.settings.game, found.policy.network, found.actions)


def open_sources(settings: AtariSettings, env: Any) -> list[Source]:
    """The sources that the settings name, in their order.

    env: of the game. Raises ValueError, about all that is wrong at once, where one is no source, or
    does not fit the settings, the game's frames or, with kept heads, its actions.
    """
    sources, wrong = [], []
    for folder in settings.hub:
        try:
            source = open_source(folder)
        except ValueError as error:
            wrong.append(str(error))
            continue
        sources.append(source)
        wrong += [f"{folder}: {text}" for text in _misfits(source, settings, env)]
    if wrong:
        raise ValueError("hub: " + "; ".join(text.removeprefix("hub: ") for text in wrong))
    return sources


def _misfits(source: Source, settings: AtariSettings, env: Any) -> list[str]:
    config, found = source.network.config(), []
    wanted = {
        "hidden": settings.hidden, "num_atoms": settings.atoms, "history": env.history,
        "frame_shape": list(env.frame_shape), "patches": list(settings.patches),
        "widths": list(settings.widths),
    }  # fmt: skip
    for name, value in wanted.items():
        if config[name] != value:
            said = "atoms" if name == "num_atoms" else name
            found.append(
                f"expected {said} {value} as this run has, got a source with {config[name]}"
            )
    if settings.heads == "keep" and source.actions != tuple(env.action_names):
        found.append(
            f"its head is of the actions of {source.game} ({len(source.actions)}), the game has "
            f"{env.num_actions} or others; --heads new"
        )
    return found
