"""What a saved model's ``config.json`` says of the run that it comes from, as runs have it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..fields import nested
from ..hub.source import PlainTask
from ..training import Task
from .config import CLASSIFICATION, LANDMARKS, FitConfig
from .kinds import kind_of


def settings_of(config: Mapping[str, Any], folder: Path) -> FitConfig:
    """The settings that a saved model's predictions depend on, from its ``config.json``.

    folder: stands for the data, which is not there.
    """
    model = config["model"]
    told = nested((config.get("run") or {}).get("fit") or {})
    told |= _task_settings(model["task"] or {})
    if "trainer" in config:
        told["trainer"] = config["trainer"]
    # The experts may be others than those that were trained.
    told["hub"] = [expert["spec"] or expert["module"] for expert in model["experts"]]
    return FitConfig.from_dict({**told, "k": model["k"], "data": str(folder)})


def task_of(model: Mapping[str, Any]) -> Task | None:
    """What a ``describe``d model learned; None where its outputs have no meaning.

    Raises ValueError for another number of names than outputs.
    """
    described = model["task"]
    if described is None:
        return None
    config = FitConfig.from_dict({**_task_settings(described), "hub": ["-"], "k": 1, "data": "-"})
    task = kind_of(config).saved_task(config, described)
    if model["num_outputs"] not in (None, task.num_outputs):
        named = "landmarks" if config.task == LANDMARKS else "classes"
        raise ValueError(f"it names {task.num_outputs} {named} for {model['num_outputs']} outputs")
    return task


def head_task(model: Mapping[str, Any]) -> Any:
    """What attaches the heads of a ``describe``d model's experts."""
    return task_of(model) or PlainTask(model["num_outputs"])


def _task_settings(described: Mapping[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"task": described.get("name", CLASSIFICATION)}
    if "dataset" in described:
        told["dataset"] = described["dataset"]
    if told["task"] == LANDMARKS:
        told["landmarks"] = {k: v for k, v in described["settings"].items() if k != "images"}
    return told
