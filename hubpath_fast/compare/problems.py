"""What methods are compared on: a data set and a hub, for one seed.

A problem gives every method the same experts, batches and splits. There are two kinds: images that
``open_dataset`` reads, for the models of the hub with their weights; and "digits", the task on
which routing pays (see ``data.digits``), whose experts are pre-trained here.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..data import (
    EvalBatches,
    TensorBatches,
    TensorSet,
    TensorStream,
    TrainStream,
    open_dataset,
)
from ..data.digits import SIZE, DigitsTask
from ..data.named import DIGITS
from ..data.transforms import eval_transform
from ..hub import Expert, default_input_size
from ..runs.build import eval_batches, make_experts, train_stream
from .digits_hub import Pretraining, pretrained_experts
from .settings import CompareSettings, names_of_experts


class Problem(ABC):
    """A data set and a hub.

    classes, expert_names: as tables show them. targets: of "validation" and "test", int64 [n] each.
    groups: what kind each test image is of, int64 [n], with ``group_names``; None where that means
    nothing. size: pixels a side.
    """

    classes: tuple[str, ...]
    expert_names: list[str]
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()
    group_label = ""

    def __init__(self, settings: CompareSettings, seed: int):
        self.settings, self.seed = settings, seed
        self.fit = settings.fit.with_seed(seed)
        self.size = self.fit.image_size or default_input_size(self.fit.hub)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    @abstractmethod
    def targets(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def experts(self) -> list[Expert]:
        """The hub anew: pre-trained bodies, heads drawn from torch's generator."""

    @abstractmethod
    def stream(self) -> Any:
        """The training batches, as ``Trainer`` takes them."""

    @abstractmethod
    def batches(self, split: str) -> Iterable[tuple[Tensor, Tensor]]:
        """ "validation" or "test" in its own order."""

    @abstractmethod
    def images(self, indices: Tensor) -> Tensor:
        """Test images, uint8 [n, 3, S, S], as an expert sees them."""

    def fingerprint(self) -> str:
        """Of the data: two problems with the same one hold the same held-out images in the same
        order, as far as classes tell."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for name in ("validation", "test"):
            digest.update(self.targets[name].numpy().tobytes())
        return digest.hexdigest()[:16]


class ImagesProblem(Problem):
    """Images in files, and models by name."""

    def __init__(self, settings: CompareSettings, seed: int, verify: bool = True):
        super().__init__(settings, seed)
        fit = self.fit
        self.splits = open_dataset(fit.dataset, fit.data, fit.validation, seed, verify)
        if len(self.splits.validation) == 0:
            raise ValueError(
                "validation: a comparison chooses on held-out images (the best experts, the rate, "
                "what goes into a soup), but there are none; give --validation a share above 0"
            )
        self.classes, self.expert_names = self.splits.classes, names_of_experts(settings)

    @cached_property
    def targets(self) -> dict[str, Tensor]:
        parts = {"validation": self.splits.validation, "test": self.splits.test}
        return {name: torch.tensor(part.targets) for name, part in parts.items()}

    def experts(self) -> list[Expert]:
        return make_experts(self.fit, self.num_classes, self.size, self.fit.pretrained)

    def stream(self) -> TrainStream:
        return train_stream(self.splits.train, self.fit, self.size)

    def batches(self, split: str) -> EvalBatches:
        return eval_batches(getattr(self.splits, split), self.fit, self.size)

    def images(self, indices: Tensor) -> Tensor:
        transform = eval_transform(self.size)
        return torch.stack([transform(self.splits.test.load(i)) for i in indices.tolist()])


class DigitsProblem(Problem):
    """Handwritten digits in five renderings; each expert pre-trained on one of them."""

    def __init__(self, settings: CompareSettings, seed: int):
        super().__init__(settings, seed)
        self.size = SIZE
        self.task = DigitsTask(seed, settings.digits_validation)
        self.classes = self.task.test.classes
        self.expert_names = names_of_experts(settings)
        self.groups, self.group_names = self.task.test.renderings, self.task.test.rendering_names
        self.group_label = "rendering of the digit"

    @property
    def targets(self) -> dict[str, Tensor]:
        return {name: self._set(name).targets for name in ("validation", "test")}

    @cached_property
    def _make(self) -> Callable[[], list[Expert]]:
        fit = self.fit
        if not fit.pretrained:
            return lambda: make_experts(fit, self.num_classes, SIZE, pretrained=False)
        pretraining = Pretraining(epochs=self.settings.digits_pretrain_epochs)
        make, _ = pretrained_experts(
            self.task, pretraining, self.num_classes, Console(quiet=True), networks=fit.hub
        )
        return make

    def experts(self) -> list[Expert]:
        return self._make()

    def stream(self) -> TensorStream:
        trainer = self.fit.trainer
        return TensorStream(self.task.target, trainer.batch_size, self.seed, device=trainer.device)

    def batches(self, split: str) -> TensorBatches:
        return TensorBatches(self._set(split), device=self.fit.trainer.device)

    def images(self, indices: Tensor) -> Tensor:
        return self.task.test.images[indices]

    def _set(self, split: str) -> TensorSet:
        return getattr(self.task, split)


def open_problem(settings: CompareSettings, seed: int, verify: bool = False) -> Problem:
    """The problem of one seed. verify: open every image once, to find broken ones.

    Raises ValueError for data or a hub that cannot be used, before anything is trained.
    """
    if settings.fit.dataset == DIGITS:
        return DigitsProblem(settings, seed)
    return ImagesProblem(settings, seed, verify)
