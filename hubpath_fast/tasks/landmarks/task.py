"""Landmarks as a task: maps are learned, their maxima are the points.

Letters: S models, N faces, L landmarks, h x w cells of a map.

A target is [L, 4]: x and y in cells, the weight (0 where the cell lies outside the map), and the
unit that errors are divided by, in cells, the same in every row. A crop is a similarity, so that
an error over its unit is what it is in the photograph. A prediction is [L, 3]: x, y and the
confidence, the maximum of its map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...measure import Measure
from ...model import HubPathwayLoss
from .head import attach_heatmap_head
from .layouts import LandmarkLayout
from .loss import map_loss
from .maps import decode
from .metrics import auc, failure_rate, nme

NME = Measure("nme", "min", (0.0, None), scale=100, unit="%", decimals=2, title="NME")
FAILURES = Measure("fr_10", "min", (0.0, 1.0), scale=100, unit="%", decimals=1, title="FR@10")
AREA = Measure("auc_10", "max", (0.0, 1.0), scale=100, unit="%", decimals=1, title="AUC@10")
THRESHOLD = 0.10  # of fr_10 and auc_10, in units
EMPTY = 0.1  # a map whose maximum is below it says nothing: bumps are taught to be 1 high
MOSTLY_EMPTY = 0.5  # the share of empty maps from which a run is said to have learned nothing


def mean_points(points: Tensor) -> Tensor:
    """[S, N, L, 3] -> [N, L, 3]: the means of the models' points."""
    return points.mean(dim=0)


@dataclass(frozen=True)
class Landmarks:
    """The task of finding the landmarks of ``layout``; see ``training.Task``.

    targets, sigma: of the maps that are taught, see ``gaussian_targets``; sigma None: the layout's.
    head_width: see ``HeatmapHead``. unit: what errors are divided by; None: the layout's.
    """

    layout: LandmarkLayout
    targets: str = "subpixel"
    sigma: float | None = None
    head_width: int = 256
    unit: str | None = None

    name: ClassVar[str] = "landmarks"
    metric: ClassVar[Measure] = NME
    votes: ClassVar[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType(
        {"soft": mean_points}
    )
    also: ClassVar[tuple[str, ...]] = ("fr_10", "auc_10", "empty")
    # What models say together is the mean of their maps, which are too large to be stored.
    votes_on_outputs: ClassVar[bool] = True
    vote_titles: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"outputs": "mean of maps", "soft": "mean of points"}
    )
    other_measures: ClassVar[tuple[Measure, ...]] = (FAILURES, AREA)  # of tables

    @property
    def num_outputs(self) -> int:
        return self.layout.num_points

    @property
    def bump(self) -> float:
        """sigma of the bumps, in cells."""
        return self.layout.sigma if self.sigma is None else self.sigma

    @property
    def unit_name(self) -> str:
        return self.unit or self.layout.unit

    @property
    def measured(self) -> str:
        """What errors are shares of, in words."""
        words = {"ocular": "inter-ocular distance", "pupil": "inter-pupil distance",
                 "diagonal": "diagonal of the points' box",
                 "ink": "diagonal of the ink's box"}  # fmt: skip
        return f"of the {words.get(self.unit_name, f'distance of landmarks {self.unit_name}')}"

    def facts(self) -> dict[str, str]:
        """What figures of one run have to share with those of another to be compared."""
        return {"normalizer": self.unit_name, "targets": self.targets}

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[N]: of maps [N, L, h, w] the published mean of squares, in units of what it is for maps
        of zeros, pi sigma^2 / (h w): 1 is what a network has that says nothing.

        So its scale is that of a cross-entropy, and the weights of the other losses mean the same
        as for other tasks. Adam's steps do not depend on a loss's scale.
        """
        loss = map_loss(outputs, targets[..., :3], self.bump, self.targets)
        return self._per_empty(outputs) * loss

    def criterion(
        self,
        explore: float,
        exploit: bool = True,
        router_supervision: float = 0.0,
        router_temperature: float = 1.0,
    ) -> HubPathwayLoss:
        return HubPathwayLoss(
            self.loss,
            explore,
            exploit=exploit,
            router_supervision=router_supervision,
            router_temperature=router_temperature,
        )

    def ensemble(self, outputs: Tensor, temperature: float = 1.0) -> Tensor:
        """[S, N, L, h, w] -> [N, L, h, w]: the mean of the maps."""
        return outputs.mean(dim=0)

    def distance(self, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """[N]: the mean of squares between maps [N, L, h, w], in the units of ``loss``."""
        squares = (student.float() - teacher.detach().float()).square()
        return self._per_empty(student) * squares.flatten(1).mean(dim=1)

    def _per_empty(self, maps: Tensor) -> float:
        """One over the mean of squares that maps of zeros have."""
        return maps.shape[-2] * maps.shape[-1] / (math.pi * self.bump**2)

    def meter(self, device: torch.device) -> LandmarkMeter:
        return LandmarkMeter(self)

    def predict(self, outputs: Tensor) -> Tensor:
        """Maps [N, L, h, w] -> [N, L, 3], float32: x and y in cells, and the confidence."""
        points, confidence = decode(outputs.float())
        return torch.cat([points, confidence[..., None]], dim=2)

    def scores(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """[N] float64: the normalised mean error of each face, a share of the unit."""
        unit = targets[:, 0, 3].double()
        return nme(predictions[..., :2].double(), targets[..., :2].double(), unit)

    def results(self, predictions: Tensor, targets: Tensor) -> dict[str, float]:
        """Of stored points, which have no maps any more: "loss" is the mean square of the distances
        over the unit."""
        distances = (predictions[..., :2].double() - targets[..., :2].double()).norm(dim=2)
        squares = (distances / targets[..., 3].double()).square()
        errors = self.scores(predictions, targets)
        return {**_of_errors(errors), "loss": squares.mean().item()}

    def summary(self, scores: Tensor) -> dict[str, float]:
        """The metric and ``other_measures``, of errors [N]."""
        return _of_errors(scores)

    def remarks(self, results: Mapping[str, Any]) -> list[str]:
        """What to say of an evaluation besides its figures."""
        if results.get("empty", 0) < MOSTLY_EMPTY:
            return []
        return [
            f"{results['empty']:.0%} of the maps have no value of {EMPTY} anywhere: the networks "
            "answer with zeros, as they do before they have learned to find anything; train for "
            "more steps, or with a higher rate"
        ]

    def record(self) -> dict[str, list[str]]:
        return {"landmarks": list(self.layout.names)}

    def check_same(self, other: Landmarks, where: Any) -> None:
        """Raises ValueError if ``other``, the task of the data ``where``, has other landmarks."""
        if other.layout.names != self.layout.names:
            raise ValueError(
                f"{where} has other landmarks than the run: {other.num_outputs} "
                f"({_some(other.layout.names)}), where it was trained on {self.num_outputs} "
                f"({_some(self.layout.names)}); give data of these"
            )

    def report(self, predictions: Tensor, targets: Tensor) -> dict[str, Any]:
        from .report import report_fields  # matplotlib is of no use to a training

        return report_fields(self, predictions, targets)

    def expected_shape(self, size: int) -> tuple[int, ...]:
        return (self.num_outputs, size // 4, size // 4)

    def attach_head(self, network: nn.Module) -> nn.Module:
        """The network with deconvolutions to maps of a quarter of its images' side."""
        return attach_heatmap_head(network, self.num_outputs, self.head_width)


class LandmarkMeter:
    """Errors of all faces, the loss, and how many maps are empty, kept on the device."""

    def __init__(self, task: Landmarks) -> None:
        self._task = task
        self._errors: list[Tensor] = []
        self._loss: list[Tensor] = []
        self._empty: list[Tensor] = []

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        predictions = self._task.predict(outputs)
        self._errors.append(self._task.scores(predictions, targets))
        self._loss.append(self._task.loss(outputs, targets).double())
        self._empty.append((~(predictions[..., 2] >= EMPTY)).double().mean(dim=1))

    def cpu(self) -> LandmarkMeter:
        for parts in (self._errors, self._loss, self._empty):
            parts[:] = [part.cpu() for part in parts]
        return self

    def merge(self, other: LandmarkMeter) -> None:
        self._errors += other._errors
        self._loss += other._loss
        self._empty += other._empty

    def result(self) -> dict[str, float]:
        """ "nme", "fr_10", "auc_10", "loss" (see ``Landmarks.loss``), "empty": the share of maps
        whose maximum is below 0.1, and "n"."""
        if not self._errors:
            raise ValueError("batches: expected at least one face to evaluate on, got none")
        parts = [torch.cat(part) for part in (self._errors, self._loss, self._empty)]
        errors, loss, empty = torch.stack(parts).cpu()  # one read
        return {
            **_of_errors(errors),
            "loss": loss.mean().item(),
            "empty": empty.mean().item(),
            "n": len(errors),
        }


def _of_errors(errors: Tensor) -> dict[str, float]:
    return {
        "nme": errors.mean().item(),
        "fr_10": failure_rate(errors, THRESHOLD),
        "auc_10": auc(errors, THRESHOLD),
    }


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
