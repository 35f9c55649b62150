"""The kinds of runs: which task, of what data. What else differs between them lies in the task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.kept import FileList
from ..training import Task
from .config import LANDMARKS, FitConfig
from .images import ImageRuns


class RunKind(Protocol):
    """What a run needs of a kind of task besides the ``Task``: how its data is opened, and what
    becomes of it on its way to the model.

    task: the class. command: what its commands begin with, such as "hubpath landmarks". recorded:
    the names in the task's ``record``.

    "Splits" below are those of its data, with train, validation, test, parts, distinct, notes and
    changes as ``ImageSplits`` has them.
    """

    task: type
    command: str
    recorded: tuple[str, ...]

    def open(
        self,
        config: FitConfig,
        root: str | Path | None,
        scored: bool = False,
        verify: bool = True,
    ) -> Any:
        """The data. root: where it lies. verify: look for broken images; scored: only in the split
        that figures are reported on."""

    def reopen(
        self,
        kept: FileList,
        config: FitConfig,
        root: str | Path | None,
        scored: bool = False,
        verify: bool = True,
        what: str = "run",
    ) -> Any:
        """The data by the list of it that a run kept. what: "run" or "comparison", for messages."""

    def files(self, parts: Mapping[str, Any], splits: Any, config: FitConfig) -> FileList | None:
        """That list, of some splits; None of what lies in no files."""

    def make_task(self, config: FitConfig, data: Any) -> Task:
        """What a run learns of its data."""

    def saved_task(self, config: FitConfig, record: Mapping[str, Sequence[str]]) -> Task:
        """The task again, from what its ``record`` was when it was written down."""

    def describe(self, task: Any) -> str:
        """What is learned, for a run's first lines."""

    def cached(
        self, splits: Any, config: FitConfig, image_size: int, tell: Callable[[str], None]
    ) -> Any:
        """The splits as ``config.cache`` keeps them."""

    def train_dataset(self, split: Any, config: FitConfig, image_size: int) -> Any:
        """Images and targets of a ``TrainStream``, augmented."""

    def batch_changes(
        self, config: FitConfig, image_size: int, num_outputs: int
    ) -> Sequence[Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]]:
        """What happens to whole training batches, in turn."""

    def eval_dataset(self, split: Any, config: FitConfig, image_size: int, crops: int = 1) -> Any:
        """Images and targets as evaluation sees them."""

    def about(self, splits: Any) -> dict[str, Any]:
        """Of the test split: fields of a ``report.Analysis`` that the data fills."""

    def targets(self, split: Any, config: FitConfig, image_size: int) -> Tensor:
        """The targets of ``eval_dataset``, [n, ...], without reading an image."""

    def random_targets(
        self, task: Any, count: int, image_size: int, draw: torch.Generator
    ) -> Tensor:
        """Targets of ``train_dataset``, [count, ...], of no image."""


@lru_cache
def _of(task: str) -> RunKind:
    if task != LANDMARKS:
        return ImageRuns()
    from .faces import FaceRuns  # reads formats that other runs need not import

    return FaceRuns()


def kind_of(config: FitConfig) -> RunKind:
    return _of(config.task)
