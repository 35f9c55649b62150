"""Classification: one class for each image, or for each position of one.

Letters: S models, N samples, C classes, ... the positions of a map, which a sample is the mean of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_smoothing, check_some
from ..measure import Measure
from ..model import HubPathwayLoss

ACCURACY = Measure("accuracy", "max", (0.0, 1.0), scale=100, unit="%", decimals=1)

# Classes are skewed where the largest of what is evaluated has at least three times the samples of
# the smallest, and five more: in a small split a class has three or one by chance.
SKEW_FACTOR, SKEW_MARGIN = 3, 5


def balanced_accuracy(correct: Tensor, counts: Tensor) -> float | None:
    """The mean recall over the classes that are there; None where classes are not skewed.

    correct: [C], of each class the samples that were taken for it. counts: [C], all of it.
    """
    there = counts > 0
    correct, counts = correct[there].double(), counts[there].double()
    if not len(counts):
        return None
    largest, smallest = counts.max().item(), counts.min().item()
    if largest < SKEW_FACTOR * smallest or largest < smallest + SKEW_MARGIN:
        return None
    return (correct / counts).mean().item()


def soft_vote(probabilities: Tensor) -> Tensor:
    """[S, N, C, ...] -> [N, C, ...]: the mean probabilities."""
    return probabilities.mean(dim=0)


def hard_vote(probabilities: Tensor) -> Tensor:
    """[S, N, C, ...] -> [N, C, ...]: the share of models for which a class is the likeliest; a tie
    goes to the soft vote.

    The mean probability is below 1 a ballot, so half of it can decide a tie but never overturn a
    majority.
    """
    ballots = F.one_hot(probabilities.argmax(dim=2), probabilities.shape[2]).sum(dim=0)
    ballots = ballots.movedim(-1, 1)
    return (ballots + 0.5 * probabilities.mean(dim=0)) / (len(probabilities) + 0.5)


@dataclass(frozen=True)
class Classification:
    """The task of giving each image one of ``classes``; see ``training.Task``.

    label_smoothing: of the cross-entropy that is trained with, in [0, 1]. What evaluations report
    as "loss" is the plain cross-entropy. Raises ValueError for a smoothing out of that range.
    """

    classes: tuple[str, ...]
    label_smoothing: float = 0.0

    name: ClassVar[str] = "classification"
    metric: ClassVar[Measure] = ACCURACY
    votes: ClassVar[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType(
        {"soft": soft_vote, "hard": hard_vote}
    )

    def __post_init__(self) -> None:
        check_smoothing(self.label_smoothing)

    @property
    def num_outputs(self) -> int:
        return len(self.classes)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[N]: the smoothed cross-entropy of logits [N, C, ...] and int64 classes [N, ...]."""
        smoothing = self.label_smoothing
        loss = F.cross_entropy(_full(outputs), targets, reduction="none", label_smoothing=smoothing)
        return _by_sample(loss)

    def criterion(
        self,
        explore: float,
        exploit: bool = True,
        router_supervision: float = 0.0,
        router_temperature: float = 1.0,
    ) -> HubPathwayLoss:
        return HubPathwayLoss(
            None, explore, self.label_smoothing, exploit, router_supervision, router_temperature
        )

    def ensemble(self, outputs: Tensor, temperature: float = 1.0) -> Tensor:
        """[S, N, C, ...] -> [N, C, ...]: T log of the mean over models of softmax(z / T), logits
        whose softmax at the temperature T is that mean."""
        probabilities = (_full(outputs) / temperature).softmax(dim=2).mean(dim=0)
        return temperature * probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()

    def distance(self, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """[N]: T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits [N, C, ...].

        T^2 undoes the 1 / T^2 by which a higher temperature shrinks the gradient.
        """
        log_p = F.log_softmax(_full(teacher).detach() / temperature, dim=1)
        log_q = F.log_softmax(_full(student) / temperature, dim=1)
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True)
        return temperature**2 * _by_sample(divergence.sum(dim=1))

    def meter(self, device: torch.device) -> ClassificationMeter:
        return ClassificationMeter(device)

    def predict(self, outputs: Tensor) -> Tensor:
        """Logits [N, C, ...] -> probabilities [N, C, ...], float32."""
        return outputs.float().softmax(dim=1)

    def scores(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """[N] float64: 1 where the likeliest class is right, else 0."""
        return _by_sample((predictions.argmax(dim=1) == targets).double())

    def results(self, predictions: Tensor, targets: Tensor) -> dict[str, float]:
        check_some("predictions", predictions)
        loss = F.nll_loss(predictions.double().clamp_min(1e-12).log(), targets)
        return {"accuracy": self.scores(predictions, targets).mean().item(), "loss": loss.item()}

    def record(self) -> dict[str, list[str]]:
        return {"classes": list(self.classes)}

    def report(self, predictions: Tensor, targets: Tensor) -> dict[str, Any]:
        from .classification_report import report_fields  # imports what draws figures

        return report_fields(self.classes, predictions, targets)

    def check_same(self, other: Classification, where: Any) -> None:
        """Raises ValueError if ``other``, the task of the data ``where``, has other classes."""
        if other.classes == self.classes:
            return
        missing = sorted(set(self.classes) - set(other.classes))
        new = sorted(set(other.classes) - set(self.classes))
        found = f"without {missing[:5]}, with {new[:5]} in addition"
        raise ValueError(
            f"{where} has other classes than the run: {found if missing or new else 'their order'}"
            f"; give data of the {len(self.classes)} classes that it was trained on"
        )

    def expected_shape(self, size: int) -> tuple[int, ...]:
        return (self.num_outputs,)

    def attach_head(self, network: nn.Module) -> None:
        """Nothing: the libraries make their networks for a number of classes."""


class ClassificationMeter:
    """Accuracy (0..1) and mean cross-entropy of logits [N, C, ...] and classes [N, ...]; beside
    them ``balanced_accuracy`` where classes are skewed."""

    def __init__(self, device: torch.device):
        self._loss = torch.zeros(1, dtype=torch.float64, device=device)
        self._classes: Tensor | None = None  # [2, C + 1]: correct and all of a class; last: others
        self._samples = self._labels = 0

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        outputs = _full(outputs)
        self._loss += F.cross_entropy(outputs, targets, reduction="sum").double()
        classes = outputs.shape[1]
        if self._classes is None:
            self._classes = self._loss.new_zeros(2, classes + 1)
        correct = (outputs.argmax(1) == targets).flatten().double()
        known = targets.flatten().long()
        known = known.where(known >= 0, classes)  # others: to be ignored
        self._classes.index_add_(1, known, torch.stack([correct, torch.ones_like(correct)]))
        self._samples, self._labels = self._samples + len(outputs), self._labels + targets.numel()

    def cpu(self) -> ClassificationMeter:
        self._loss = self._loss.cpu()
        self._classes = None if self._classes is None else self._classes.cpu()
        return self

    def merge(self, other: ClassificationMeter) -> None:
        if other._classes is None:
            return
        self._loss = self._loss + other._loss
        self._classes = other._classes if self._classes is None else self._classes + other._classes
        self._samples += other._samples
        self._labels += other._labels

    def result(self) -> dict[str, float]:
        if not self._labels:
            raise ValueError("batches: expected at least one sample to evaluate on, got none")
        totals = torch.cat([self._loss, self._classes.flatten()]).cpu()  # one read
        loss, (correct, counts) = totals[0], totals[1:].view(2, -1)
        balanced = balanced_accuracy(correct[:-1], counts[:-1])
        return {
            "accuracy": correct.sum().item() / self._labels,
            **({} if balanced is None else {"balanced_accuracy": balanced}),
            "loss": loss.item() / self._labels,
            "n": self._samples,
        }


def _by_sample(values: Tensor) -> Tensor:
    """[N, ...] -> [N]: the means over the positions of maps."""
    return values if values.dim() == 1 else values.flatten(1).mean(dim=1)


def _full(logits: Tensor) -> Tensor:
    """At least float32: under autocast logits may come with 8 bits of precision."""
    return logits if logits.dtype == torch.float64 else logits.float()
