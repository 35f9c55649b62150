"""What a task is to everything that trains, compares or reports: one object that owns what is
learned.

The trainer, ``compare``, the baselines and the reports ask this protocol and nothing else, so that
a new kind of task is a new object and no change to them. Shapes: N samples, S models, T the shape
of one target, P that of one prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..measure import Measure
from ..model import HubPathwayLoss


class Meter(Protocol):
    """Totals of an evaluation, kept on the device and read once."""

    def add(self, outputs: Tensor, targets: Any) -> None:
        """Takes in a batch: a model's outputs and their targets."""

    def result(self) -> dict[str, float]:
        """Means over all samples, by name; the task's ``metric`` and "n", the samples, among them.

        Raises ValueError where there was no sample.
        """

    def cpu(self) -> Meter:
        """Moves the totals to the host; returns itself. Asked for on several ranks only."""

    def merge(self, other: Any) -> None:
        """Takes in what another one, of the same kind, has counted of other samples, perhaps of
        none: ``result`` then is of both. Asked for on several ranks only, after ``cpu``."""


class Task(Protocol):
    """What is learned: targets, losses, the measure, and what becomes of predictions.

    name: as settings have it. num_outputs: C, outputs of a head. metric: what it is judged by;
    models and steps are chosen by it. votes: ways to combine predictions [S, N, P] into one [N, P],
    by name; "soft", their mean, is always there.
    """

    name: str
    num_outputs: int
    metric: Measure
    votes: Mapping[str, Callable[[Tensor], Tensor]]

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """[N]: the loss of each sample, of a model's outputs [N, C, ...]."""

    def criterion(
        self,
        explore: float,
        exploit: bool = True,
        router_supervision: float = 0.0,
        router_temperature: float = 1.0,
    ) -> HubPathwayLoss:
        """The losses of a Hub-Pathway on this task. The last two are passed only where the router
        is supervised."""

    def ensemble(self, outputs: Tensor, temperature: float = 1.0) -> Tensor:
        """[S, N, C, ...] -> [N, C, ...]: outputs that say what the S models say together."""

    def distance(self, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """[N]: how far outputs are from those of a teacher, without gradient to the teacher."""

    def meter(self, device: torch.device) -> Meter:
        """An empty one, on the device."""

    def predict(self, outputs: Tensor) -> Tensor:
        """Outputs [N, C, ...] -> predictions [N, P], float32: what is stored and voted with."""

    def scores(self, predictions: Tensor, targets: Any) -> Tensor:
        """[N] float64: the metric, sample by sample; its mean is the metric."""

    def results(self, predictions: Tensor, targets: Any) -> dict[str, float]:
        """Of stored predictions: the metric and "loss", means over the samples."""

    def record(self) -> dict[str, list[str]]:
        """What makes the task besides a run's settings, as files keep it: lists of names."""

    def check_same(self, other: Any, where: Any) -> None:
        """Raises ValueError if the task of other data, which lies at ``where``, is another."""

    def report(self, predictions: Tensor, targets: Any) -> dict[str, Any]:
        """Fields of a ``report.Analysis`` that only the task can fill: what stands with each
        sample, the groups that samples fall into, and sections of its own (``extra``, or ``own``
        for those made of the whole analysis)."""

    def expected_shape(self, size: int) -> tuple[int, ...]:
        """Of the outputs for one image of ``size`` pixels a side, without the batch."""

    def attach_head(self, network: nn.Module) -> nn.Module | None:
        """Replaces a network's head once its weights are loaded, where this task's head is not the
        one that the network's own library makes for ``num_outputs``.

        Returns the network to use, such as a module around the one given (see
        ``hub.dense.DenseNetwork``); None: the one given, changed in place or as it was."""
