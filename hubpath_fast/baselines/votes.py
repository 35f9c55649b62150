"""Several models together: their outputs as one, and the oracle that knows which model to ask
(table 5 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..training import Task


class Ensemble(nn.Module):
    """Models as one, whose outputs are what the task says that they say together
    (``task.ensemble``): images -> outputs [N, C, ...].

    For tasks whose stored predictions are no outputs any more, such as points that were maps; of
    others ``task.votes`` needs no model. members: the models, which take the same images.
    """

    def __init__(self, members: Sequence[nn.Module], task: Task) -> None:
        super().__init__()
        if not members:
            raise ValueError("members: expected at least one model, got none")
        self.members, self.task = nn.ModuleList(members), task

    def forward(self, images: Tensor) -> Tensor:
        return self.task.ensemble(torch.stack([member(images) for member in self.members]))


def oracle(task: Task, predictions: Tensor, targets: Any) -> Tensor:
    """[S, N, P] predictions of S models, N targets -> [N] float64: of each sample the best score
    that one of the models has."""
    scores = torch.stack([task.scores(model, targets) for model in predictions])
    return scores.amax(dim=0) if task.metric.better == "max" else scores.amin(dim=0)
