"""Policies of finished runs: as sources of another game, or to play with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ...checkpoints import CheckpointError, find_checkpoint, load_config, load_weights
from ...written import GAME, described
from .network import RainbowNetwork
from .policies import make_policy
from .settings import FINETUNE, SCRATCH, AtariSettings

if TYPE_CHECKING:
    from .policy import Policy

LAST = "last"


@dataclass(frozen=True)
class Record:
    """What a checkpoint's ``config.json`` says: all that the weights need to be a policy again.

    actions: names of the game's. networks: constructors' arguments of those that the policy was
    made of.
    """

    settings: AtariSettings
    actions: tuple[str, ...]
    networks: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "atari": self.settings.to_dict(),
            "actions": list(self.actions),
            "networks": list(self.networks),
        }

    def bodies(self) -> list[RainbowNetwork]:
        """Networks of these sizes, with weights of their own."""
        return [RainbowNetwork(**config) for config in self.networks]


@dataclass(frozen=True)
class Source:
    """A network that plays a game. record: of its run."""

    network: RainbowNetwork
    record: Record


def read_config(last: Path) -> dict[str, Any]:
    """``config.json`` of the checkpoint in ``last``. Raises CheckpointError as ``read_record``."""
    kept = load_config(last)
    if "atari" not in kept:
        other = described(last.parent)
        raise CheckpointError(other or f"{last} is not of a run of `hubpath atari`")
    return kept


def read_record(last: Path) -> Record:
    """Of the checkpoint in ``last``.

    Raises CheckpointError where it is damaged or of another kind of run.
    """
    kept = read_config(last)
    try:
        settings = AtariSettings.from_dict(kept["atari"])
        record = Record(settings, tuple(kept["actions"]), tuple(kept["networks"]))
        record.bodies()
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{last} is not of a run of `hubpath atari` ({error!r})") from error
    return record


def open_run(folder: str | Path, device: str = "cpu") -> tuple[Policy, Record]:
    """The policy of a run's last checkpoint, in evaluation mode.

    Raises CheckpointError where there is none, or one that is damaged or of another kind of run.
    """
    folder = Path(folder)
    last = find_checkpoint(folder / LAST)
    if last is None:
        hint = "" if folder.is_dir() else "; there is no such folder"
        raise CheckpointError(
            described(folder, GAME)
            or f"{folder} holds no run of `hubpath atari`{hint}: expected {folder / LAST}, which "
            "`hubpath atari pretrain` and `fit` write"
        )
    record = read_record(last)
    # The target network, too, is among the weights.
    policy, target = (
        make_policy(record.settings, record.bodies(), len(record.actions)) for _ in range(2)
    )
    load_weights(nn.ModuleDict({"online": policy, "target": target}), last)
    return policy.to(device).eval(), record


def open_source(folder: str | Path) -> Source:
    """The network of a run of a single one.

    Raises ValueError for a run of several networks, which is no source.
    """
    policy, record = open_run(folder)
    if record.settings.method not in (SCRATCH, FINETUNE):
        raise ValueError(
            f"hub: {folder} is a run of the method {record.settings.method}; a source is one "
            f"network, of `hubpath atari pretrain`"
        )
    return Source(policy.network, record)


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
    there, found = source.record.settings, []
    mine = source.network.config() | {"v_min": there.v_min, "v_max": there.v_max}
    wanted = {
        "hidden": settings.hidden, "num_atoms": settings.atoms, "history": env.history,
        "frame_shape": list(env.frame_shape), "patches": list(settings.patches),
        "widths": list(settings.widths),
    }  # fmt: skip
    if settings.heads == "keep":  # a kept head speaks of its own returns and actions
        wanted |= {"v_min": settings.v_min, "v_max": settings.v_max}
    for name, value in wanted.items():
        if mine[name] != value:
            said = name.removeprefix("num_")
            found.append(f"expected {said} {value} as this run has, got a source with {mine[name]}")
    actions = source.record.actions
    if settings.heads == "keep" and actions != tuple(env.action_names):
        found.append(
            f"its head is of the actions of {there.game} ({len(actions)}), the game has "
            f"{env.num_actions} or others; --heads new"
        )
    return found
