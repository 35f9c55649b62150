"""What runs that learn classes have of their own: their data, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import (
    ImageDataset,
    ImageSplit,
    ImageSplits,
    Mixing,
    RandomCrops,
    cache_splits,
    open_dataset,
)
from ..data.decode import verify_images
from ..data.images import default_workers
from ..data.kept import FileList, data_base, reopen
from ..data.named import DIGITS
from ..data.names import one_form
from ..data.splits import Split
from ..data.transforms import eval_transform, resized_side, square_transform, train_transform
from ..tasks import Classification
from .config import FitConfig


class ImageRuns:
    """See ``kinds.RunKind``."""

    task = Classification
    command = "hubpath"
    recorded = ("classes",)

    def open(
        self,
        config: FitConfig,
        root: str | Path | None,
        scored: bool = False,
        verify: bool = True,
    ) -> ImageSplits:
        draw = config.validation, config.trainer.seed
        splits = open_dataset(config.dataset, root, *draw, verify=verify and not scored)
        if scored and isinstance(splits.test, ImageSplit):
            verify_images(splits.test.paths)
        return splits

    def reopen(
        self,
        kept: FileList,
        config: FitConfig,
        root: str | Path | None,
        scored: bool = False,
        verify: bool = True,
        what: str = "run",
    ) -> ImageSplits:
        draw = config.validation, config.trainer.seed
        return reopen(kept, config.dataset, root, *draw, scored, verify, what)

    def files(
        self, parts: Mapping[str, Split], splits: ImageSplits, config: FitConfig
    ) -> FileList | None:
        if config.dataset == DIGITS:
            return None
        return FileList.of(parts, splits.classes, data_base(config.dataset, config.data))

    def make_task(self, config: FitConfig, data: Any) -> Classification:
        """data: anything that has ``classes``."""
        return Classification(tuple(data.classes), config.label_smoothing)

    def saved_task(self, config: FitConfig, record: Mapping[str, Sequence[str]]) -> Classification:
        return Classification(tuple(map(one_form, record["classes"])), config.label_smoothing)

    def describe(self, task: Classification) -> str:
        return f"{task.num_outputs} classes"

    def cached(
        self,
        splits: ImageSplits,
        config: FitConfig,
        image_size: int,
        tell: Callable[[str], None],
    ) -> ImageSplits:
        workers = default_workers() if config.workers is None else config.workers
        side = resized_side(image_size)
        return cache_splits(splits, side, config.cache, config.cache_dir, tell, workers)

    def train_dataset(self, split: Split, config: FitConfig, image_size: int) -> ImageDataset:
        if config.augment == "device":
            return ImageDataset(split, square_transform(image_size))
        if config.augment == "none":
            return self.eval_dataset(split, config, image_size)
        return ImageDataset(split, train_transform(image_size, config.flip, config.min_area))

    def batch_changes(
        self, config: FitConfig, image_size: int, num_outputs: int
    ) -> list[Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]]:
        changes: list[Callable] = []
        if config.augment == "device":
            seed = config.trainer.seed
            changes.append(RandomCrops(image_size, config.flip, config.min_area, seed))
        mixed = mixing(config, num_outputs)
        return changes if mixed is None else [*changes, mixed]

    def eval_dataset(
        self, split: Split, config: FitConfig, image_size: int, crops: int = 1
    ) -> ImageDataset:
        return ImageDataset(split, eval_transform(image_size, crops))

    def about(self, splits: ImageSplits) -> dict[str, Any]:
        return {}

    def targets(self, split: Split, config: FitConfig, image_size: int) -> Tensor:
        return torch.tensor(split.targets)

    def random_targets(
        self, task: Classification, count: int, image_size: int, draw: torch.Generator
    ) -> Tensor:
        return torch.randint(task.num_outputs, (count,), generator=draw)


def mixing(config: FitConfig, num_outputs: int) -> Mixing | None:
    """What mixes the training images; None where the settings say nothing of it."""
    if not config.mixes:
        return None
    return Mixing(
        num_outputs,
        config.mixup,
        config.cutmix,
        config.mixup_prob,
        config.mixup_switch_prob,
        config.mixup_mode,
        config.trainer.seed,
    )
