"""Runs that go on: whether a folder holds the one that is asked for, and its state."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import (
    CONFIG_FILE,
    STATE_FILE,
    CheckpointError,
    Written,
    find_checkpoint,
    load_config,
    load_weights,
    remember,
)
from ..fields import differences
from ..parallel.ranks import Ranks
from .checkpoint import load_state
from .config import TrainerConfig
from .optimizer import group_names
from .optimizer_files import load_optimizer

STATE_KEYS = ("run", "optimizer", "groups", "random", "window", "watch", "interval")  # of last/


def refuse_other_run(out_dir: Path, resume_hint: str, name: str = "out_dir") -> None:
    """Raises ValueError if the folder, the argument ``name``, holds a run already, or is none."""
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{name}: expected a folder, got the file {str(out_dir)!r}")
    held = [str(p) for p in (out_dir / "last", out_dir / "best") if find_checkpoint(p)]
    log = out_dir / "log.jsonl"
    held += [str(log)] if log.exists() else []
    if held:
        raise ValueError(
            f"{name}: expected a new folder, but {str(out_dir)!r} holds another run "
            f"({', '.join(held)}); go on with it by {resume_hint}, delete it, or choose another"
        )


def check_same_run(out_dir: Path, config: TrainerConfig, run: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a checkpoint in the folder is of another run: of other settings,
    but for those that change no result, or another ``run`` as given to the trainer."""
    # Both sides as files are read, which may name today's defaults otherwise.
    now = _identity(TrainerConfig.from_dict(config.to_dict()), _one_form(run))
    for folder in (out_dir / "last", out_dir / "best"):
        if find_checkpoint(folder) is None:
            continue
        saved = load_config(folder)
        try:
            there = _identity(TrainerConfig.from_dict(saved["trainer"]), _one_form(saved["run"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / CONFIG_FILE} does not hold the settings of a run ({error!r}); restore "
                f"{folder} from a copy, or delete it and resume, which makes it again"
            ) from error
        found = differences(there, now)
        if found:
            raise CheckpointError(
                f"{folder} is of another configuration ({'; '.join(found)}); use the same settings "
                "to resume, or another output folder"
            )


def check_same_settings(
    ranks: Ranks, out_dir: Path, config: TrainerConfig, run: Mapping[str, Any]
) -> None:
    """Raises ValueError, on all ranks, unless all train the same; each may have its own device."""
    settings = config.to_dict()
    del settings["device"]
    ranks.check_same(
        {"out_dir": str(out_dir), **_flat({"trainer": settings, "run": _one_form(run)}, "")}
    )


def load_run(
    last: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    labels: Sequence[str] = (),
    ranks: Ranks = Ranks(),
) -> tuple[dict[str, Any], Written]:
    """Loads a checkpoint, of any number of ranks, into model and optimizer; its whole state, and
    its files, for the next save to link to.

    ranks: all of them call this alike, and each loads its own experts. Raises CheckpointError, on
    all ranks whichever finds it, if the checkpoint is damaged, or of another model or other
    parameter groups.
    """
    with ranks.agreed(f"loading {last}"):
        return _load_run(last, model, optimizer, labels)


def _load_run(
    last: Path, model: nn.Module, optimizer: torch.optim.Optimizer, labels: Sequence[str]
) -> tuple[dict[str, Any], Written]:
    state = load_state(last)
    missing = [key for key in STATE_KEYS if key not in state]
    if missing:
        raise CheckpointError(f"{last / STATE_FILE} cannot be resumed from: it lacks {missing[0]}")
    if state["groups"] != group_names(model, optimizer):
        raise CheckpointError(
            f"{last} is of another optimizer: its parameter groups are not the ones given now; "
            "use the same groups to resume, or another output folder"
        )
    saved = load_weights(model, last)
    files = load_optimizer(saved.place, state["optimizer"], model, optimizer, labels)
    return state, remember(saved, model, labels) | files


def _one_form(run: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, with names in one Unicode form: an accent may be written as two."""
    return json.loads(unicodedata.normalize("NFC", json.dumps(run, ensure_ascii=False)))


def _identity(config: TrainerConfig, run: Mapping[str, Any]) -> dict[str, Any]:
    trainer = {f"trainer.{name}": value for name, value in config.identity().items()}
    return {**trainer, **_flat(run, "run.")}


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
