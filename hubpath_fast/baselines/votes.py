"""The oracle that knows which model to ask (table 5 of the paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..training import Task


def oracle(task: Task, predictions: Tensor, targets: Any) -> Tensor:
    """[S, N, P] predictions of S models, N targets -> [N] float64: of each sample the best score
    that one of the models has."""
    scores = torch.stack([task.scores(model, targets) for model in predictions])
    return scores.amax(dim=0) if task.metric.better == "max" else scores.amin(dim=0)
