"""A finished run, opened again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from ..model import HubPathway
from ..training import (
    find_checkpoint,
    load_weights,
)
from .build import build_model
from .config import FitConfig
from .resolve import read_record


@dataclass
class Run:
    """A trained run, opened again: its settings, its classes and its model in evaluation mode."""

    config: FitConfig
    classes: tuple[str, ...]
    image_size: int
    model: HubPathway


def open_run(run: str | Path, device: str = "cpu") -> Run:
    """Opens a run's best checkpoint (the last one, where none was evaluated yet).

    Raises:
        ValueError: the folder holds no run, or its checkpoint is damaged or of another model.
    """
    run = Path(run)
    record = read_record(run)
    config = FitConfig.from_dict(record["config"])
    folder = next((run / n for n in ("best", "last") if find_checkpoint(run / n)), None)
    if folder is None:
        raise ValueError(f"{run} has no checkpoint yet; finish the run with --resume first")
    there = torch.device(config.trainer.device).type
    executor = config.executor if torch.device(device).type == there else "auto"
    here = dataclasses.replace(config, executor=executor)
    model = build_model(here, len(record["classes"]), record["image_size"], pretrained=False)
    load_weights(model, folder)
    model.to(device).eval()
    return Run(config, tuple(record["classes"]), record["image_size"], model)
