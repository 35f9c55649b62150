"""What methods are compared on: a data set and a hub, for one seed.

A problem gives every method the same experts, batches and splits. There are two kinds: images in
files, of classes or of faces, for the models of the hub with their weights; and "digits", the task
on which routing pays (see ``data.digits``, of landmarks ``tasks.landmarks.digits``), whose experts
are pre-trained here.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import EvalBatches, TensorBatches, TensorSet, TensorStream, TrainStream
from ..data.digits import DigitsTask
from ..data.kept import FileList
from ..data.named import DIGITS
from ..hub import Expert, default_input_size
from ..runs.build import eval_batches, make_experts, make_task, train_stream
from ..runs.config import LANDMARKS
from ..runs.images import mixing
from ..runs.kinds import kind_of
from ..tasks.landmarks.digits import InkStream, LandmarkDigits
from ..training import Task
from .digits_hub import DigitsHub, Pretraining, plain_spec
from .settings import CompareSettings, names_of_experts


class Problem(ABC):
    """A data set and a hub.

    task: what is learned. changes: of the data since the comparison began, a sentence each.
    expert_names: as tables show them. targets: of "validation" and "test".
    groups: what kind each test image is of, int64 [n], with ``group_names``; None where that means
    nothing. size: pixels a side. hub: weights that are pre-trained here; None: there are none.
    """

    task: Task
    hub: DigitsHub | None = None
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()
    group_label = ""
    changes: tuple[str, ...] = ()

    def __init__(self, settings: CompareSettings, seed: int):
        self.settings, self.seed = settings, seed
        self.fit = settings.fit.with_seed(seed)
        self.size = self.fit.image_size or default_input_size(self.fit.hub)
        self.expert_names = names_of_experts(settings)

    @property
    @abstractmethod
    def targets(self) -> dict[str, Tensor]: ...

    def experts(self, loaded: Iterable[int] | None = None) -> list[Expert]:
        """The hub, newly built: pre-trained bodies, heads drawn from torch's generator.

        loaded: which need their weights; None: all. (Weights that are pre-trained here may not be
        there yet; others come with the networks.)
        """
        fit = self.fit
        return make_experts(fit, self.task, self.size, fit.pretrained)

    def expert(self, index: int) -> Expert:
        """One of them, with the head that it has in ``experts``."""
        return self.experts([index])[index]

    def untrained(self) -> Expert:
        """The first of them with random weights, all of which are trained, whatever its spec says
        of fine-tuning."""
        first = str(plain_spec(self.fit.hub[0]))
        fit = self.fit.replace(hub=(first,), k=1, router_supervision=0.0)
        return make_experts(fit, self.task, self.size, pretrained=False)[0]

    def mean_shape(self) -> Tensor:
        """[L, 2]: of landmarks the mean of the training targets, nothing augmented."""
        raise ValueError(f"mean-shape: a task of {self.fit.task} has no shapes")

    @abstractmethod
    def stream(self) -> Any:
        """The training batches, as ``Trainer`` takes them."""

    @abstractmethod
    def batches(self, split: str) -> Iterable[tuple[Tensor, Tensor]]:
        """ "train", "validation" or "test" in its own order, nothing augmented."""

    @abstractmethod
    def images(self, indices: Tensor) -> Tensor:
        """Test images, uint8 [n, 3, S, S], as an expert sees them."""

    @property
    def split(self) -> str:
        """What the images are whose figures are reported: "test", or "validation" where there are
        no others."""
        return "test"

    def notes(self) -> list[str]:
        """What a user should know of data and hub, a sentence each."""
        return [] if self.hub is None else self.hub.notes

    def about(self) -> dict[str, Any]:
        """Of the test images: fields of a ``report.Analysis`` that the data fills."""
        return {}

    def files(self) -> FileList | None:
        """The list of all images, from which each seed holds out its own; None of arrays."""
        return None

    def fingerprint(self) -> str:
        """Of the data: two problems with the same one hold the same held-out images in the same
        order, as far as targets tell."""
        digest = hashlib.sha256()
        for names in self.task.record().values():
            digest.update(repr(tuple(names)).encode())
        for name in ("validation", "test"):
            digest.update(self.targets[name].numpy().tobytes())
        return digest.hexdigest()[:16]

    def check_same(self, noted: Mapping[str, Any], where: Path) -> None:
        """Raises ValueError if the data is not what was noted of it in the file ``where``."""
        if self.fingerprint() != noted["fingerprint"]:
            raise ValueError(
                f"the data is not what it was when this comparison began ({where}): its held-out "
                "images or their targets differ; compare again in another folder"
            )


class ImagesProblem(Problem):
    """Images in files, and models by name."""

    def __init__(
        self,
        settings: CompareSettings,
        seed: int,
        verify: bool,
        files: Path | None = None,
        scored: bool = False,
    ):
        super().__init__(settings, seed)
        fit = self.fit
        kind = kind_of(fit)
        if files is not None and files.is_file():
            kept = FileList.read(files)
            self.splits = kind.reopen(kept, fit, fit.data, scored, verify, "comparison")
        else:
            self.splits = kind.open(fit, fit.data, verify=verify)
        self.changes = self.splits.changes
        if len(self.splits.validation) == 0:
            raise ValueError(
                "validation: a comparison chooses on held-out images (the best experts, the rate, "
                "what goes into a soup), but there are none; give --validation a share above 0"
            )
        self.task = make_task(fit, self.splits)

    def files(self) -> FileList | None:
        return kind_of(self.fit).files(self.splits.parts, self.splits, self.fit)

    @property
    def split(self) -> str:
        return "validation" if self.splits.test_is_validation else "test"

    def notes(self) -> list[str]:
        if self.split == "test":
            return []
        return [
            "there is no test split: the figures are of the validation images, which rates, the "
            "best experts and soups are chosen on as well, and flatter what is chosen"
        ]

    def about(self) -> dict[str, Any]:
        return kind_of(self.fit).about(self.splits)

    @cached_property
    def targets(self) -> dict[str, Tensor]:
        parts = {"validation": self.splits.validation, "test": self.splits.test}
        kind = kind_of(self.fit)
        return {name: kind.targets(part, self.fit, self.size) for name, part in parts.items()}

    def mean_shape(self) -> Tensor:
        targets = kind_of(self.fit).targets(self.splits.train, self.fit, self.size)
        return targets[..., :2].mean(dim=0)

    def stream(self) -> TrainStream:
        return train_stream(self.splits.train, self.fit, self.size, self.task.num_outputs)

    def batches(self, split: str) -> EvalBatches:
        return eval_batches(getattr(self.splits, split), self.fit, self.size)

    def images(self, indices: Tensor) -> Tensor:
        dataset = kind_of(self.fit).eval_dataset(self.splits.test, self.fit, self.size)
        return torch.stack([dataset[i][0] for i in indices.tolist()])


class DigitsProblem(Problem):
    """Handwritten digits in five renderings; each expert pre-trained on one of them."""

    def __init__(self, settings: CompareSettings, seed: int, cache: Path | None = None):
        super().__init__(settings, seed)
        self.digits, classes = self._open(seed, settings.digits_validation)
        self.size = classes.size
        self.task = make_task(self.fit, self.digits)
        self.groups = self.digits.test.renderings
        self.group_names = self.digits.test.rendering_names
        self.group_label = "rendering of the digit"
        self.hub = None
        if self.fit.pretrained:
            pretraining = Pretraining(epochs=settings.digits_pretrain_epochs)
            known = settings.digits_rendering
            self.hub = DigitsHub(classes, pretraining, self.fit.hub, cache, known)

    def _open(self, seed: int, validation: int) -> tuple[Any, DigitsTask]:
        """What is learned, and the digits that experts are pre-trained on."""
        digits = DigitsTask(seed, validation)
        return digits, digits

    @property
    def targets(self) -> dict[str, Tensor]:
        return {name: self._set(name).targets for name in ("validation", "test")}

    def experts(self, loaded: Iterable[int] | None = None) -> list[Expert]:
        experts = make_experts(self.fit, self.task, self.size, pretrained=False)
        if self.hub is not None:
            for i in range(len(experts)) if loaded is None else loaded:
                self.hub.load(i, experts[i])
        return experts

    def stream(self) -> TensorStream:
        trainer = self.fit.trainer
        mixed = mixing(self.fit, self.task.num_outputs)
        return TensorStream(
            self.digits.target, trainer.batch_size, self.seed, device=trainer.device, mixing=mixed
        )

    def batches(self, split: str) -> TensorBatches:
        return TensorBatches(self._set(split), device=self.fit.trainer.device)

    def images(self, indices: Tensor) -> Tensor:
        return self.digits.test.images[indices]

    def _set(self, split: str) -> TensorSet:
        return self.digits.target if split == "train" else getattr(self.digits, split)


class LandmarkDigitsProblem(DigitsProblem):
    """Landmarks of digits, see ``tasks.landmarks.digits``; the experts know classes of others."""

    def _open(self, seed: int, validation: int) -> tuple[LandmarkDigits, DigitsTask]:
        digits = LandmarkDigits(seed, validation)
        return digits, digits.classes

    def mean_shape(self) -> Tensor:
        return self.digits.mean_shape()

    def stream(self) -> InkStream:
        trainer = self.fit.trainer
        return InkStream(self.digits.ink, trainer.batch_size, self.seed, trainer.device)


def open_problem(
    settings: CompareSettings,
    seed: int,
    verify: bool = False,
    cache: Path | None = None,
    files: Path | None = None,
    scored: bool = False,
) -> Problem:
    """The problem of one seed.

    verify: open every image once, to find broken ones. cache: where the digits' pre-trained experts
    are kept; None: the user's cache folder. files: the list of the comparison's images; only these
    are used, if it is there. scored: of them, only those that figures are reported on need be as
    they were.

    Raises ValueError for data or a hub that cannot be used, before anything is trained.
    """
    if settings.fit.dataset == DIGITS:
        of_landmarks = settings.fit.task == LANDMARKS
        return (LandmarkDigitsProblem if of_landmarks else DigitsProblem)(settings, seed, cache)
    return ImagesProblem(settings, seed, verify, files, scored)
