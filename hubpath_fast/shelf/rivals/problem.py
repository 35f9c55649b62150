"""What rivals are given, what they answer, and what an answer is worth and costs.

All of them see the same: what the fitted heads say of the validation images, by which everything is
chosen, and of the images that they are scored on. What a rival costs is counted, not told: it says
which models it runs for each image, and forwards, milliseconds and parameters follow.

Letters: n images, M models, C classes, K models of an image, F numbers of a look.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..selection import own_losses

SMALLEST = 1e-12  # a probability, in a log-loss: float32 underflows to 0, whose loss is infinite


class CannotRun(Exception):
    """Why a rival has no answer: a sentence for its row."""


@dataclass(frozen=True)
class Look:
    """What a router looks at: of each split [n, F] float32; title names it.

    model: the number of the model whose features they are, which then runs for every image; None:
    the image itself, which costs no forward.
    """

    title: str
    vectors: Mapping[str, Tensor]
    model: int | None = None

    @property
    def kind(self) -> str:
        return "image" if self.model is None else "features"


@dataclass(frozen=True)
class Problem:
    """A shelf, as rivals see it.

    labels: of the M models. log_probs: of "validation" and "test" the heads' log-probabilities,
    [M, n, C] float32. targets: int64 [n] of each. k: K. looks: what a router may look at.
    parameters, ms: of each model, and an image, float64 [M]; NaN where they are not known.
    train_losses: float32 [n, M], on training images of heads that were fitted without the image;
    None where they are not known. ``split`` is the one that answers are scored on.
    """

    labels: tuple[str, ...]
    log_probs: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    k: int
    looks: tuple[Look, ...]
    parameters: Tensor
    ms: Tensor
    train_losses: Tensor | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.k <= len(self.labels):
            raise ValueError(
                f"k: expected an integer in 1..{len(self.labels)}, the models on the shelf, got "
                f"{self.k}"
            )
        if not len(self.targets["validation"]):
            raise ValueError(
                "the shelf has no validation images, by which rivals choose; extract it with "
                "--validation"
            )

    @property
    def split(self) -> str:
        """ "test"; where there are no test images, "validation"."""
        return "test" if len(self.targets["test"]) else "validation"

    @property
    def splits(self) -> tuple[str, ...]:
        return ("validation", "test") if self.split == "test" else ("validation",)

    def losses(self, split: str) -> Tensor:
        """[n, M]: of each head on each image."""
        return own_losses(self.log_probs[split], self.targets[split]).float().T.contiguous()


@dataclass(frozen=True)
class Answer:
    """What a rival says.

    probabilities: of each split [n, C], or [T, n, C] of T draws, whose scores are averaged. A split
    may be missing: "validation" where what was chosen on it has nothing honest to say of it.
    asked: of the scored images, float [n, M]: which models run, 1 or 0, or the share of draws.
    kept: float [M], which models have to be there; None: those that are asked.
    chosen: what validation chose, for the record. extra_parameters, extra_ms: besides those of the
    models.
    """

    probabilities: Mapping[str, Tensor]
    asked: Tensor
    kept: Tensor | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    extra_parameters: int = 0
    extra_ms: float = 0.0


def score(probabilities: Tensor, targets: Tensor) -> dict[str, float]:
    """Accuracy and log-loss, float64 means over images and draws."""
    right = probabilities.argmax(-1) == targets
    picked = targets[:, None].expand(*probabilities.shape[:-1], 1)
    loss = -probabilities.gather(-1, picked).double().clamp_min(SMALLEST).log()
    return {"accuracy": right.double().mean().item(), "loss": loss.mean().item()}


def costs(answer: Answer, problem: Problem) -> dict[str, float | None]:
    """forwards and ms of an image, means over the scored images; parameters to hold."""
    share = answer.asked.double().mean(0)
    kept = (share > 0).double() if answer.kept is None else answer.kept.double()
    held, ms = _total(kept, problem.parameters), _total(share, problem.ms)
    return {
        "forwards": share.sum().item(),
        "parameters": None if held is None else held + answer.extra_parameters,
        "ms": None if ms is None else ms + answer.extra_ms,
    }


def _total(share: Tensor, values: Tensor) -> float | None:
    """Of those that have a share; None where one of them is not known."""
    total = torch.where(share > 0, share * values, 0).sum().item()
    return None if total != total else total


def mix(log_probs: Tensor, weights: Tensor) -> Tensor:
    """[n, C]: probabilities of log_probs [M, n, C], averaged by weights [n, M] or [M]."""
    weights = weights.expand(log_probs.shape[1], -1) if weights.dim() == 1 else weights
    return torch.einsum("nm,mnc->nc", weights.to(log_probs.dtype), log_probs.exp())


def always(members: Tensor, problem: Problem) -> Tensor:
    """[n, M], what is asked of the scored images, of a rival that runs the same models for all.
    members: int64, or float [M] shares."""
    count, models = len(problem.targets[problem.split]), len(problem.labels)
    if not members.is_floating_point():
        members = torch.zeros(models).index_fill(0, members, 1.0)
    return members.expand(count, models)


def folds(count: int, parts: int, seed: int) -> list[Tensor]:
    """Numbers 0..count-1, dealt at random to at most ``parts`` parts of equal sizes."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return [part for part in order.tensor_split(parts) if len(part)]
