"""What runs that learn landmarks have of their own: their data, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.images import default_workers
from ..data.kept import FileList
from ..data.named import DIGITS
from ..tasks.landmarks.cache import cache_faces
from ..tasks.landmarks.faces import CELL, FaceAugment, FaceDataset, FaceSplit, FaceSplits
from ..tasks.landmarks.kept import face_list, reopen_faces
from ..tasks.landmarks.sets import open_faces
from ..tasks.landmarks.settings import layout_for
from ..tasks.landmarks.task import Landmarks
from .config import FitConfig


class FaceRuns:
    """See ``kinds.RunKind``."""

    task = Landmarks
    command = "hubpath landmarks"
    recorded = ("landmarks",)

    def open(
        self,
        config: FitConfig,
        root: str | Path | None,
        scored: bool = False,
        verify: bool = True,
    ) -> FaceSplits:
        if config.dataset == DIGITS:
            raise ValueError(
                "dataset: the landmarks of digits lie in no files; `hubpath landmarks demo` learns "
                "them, and `hubpath compare --task landmarks --data digits`"
            )
        return open_faces(config.dataset, root, **_how(config), scored=scored, verify=verify)

    def reopen(
        self,
        kept: FileList,
        config: FitConfig,
        root: str | Path | None,
        scored: bool = False,
        verify: bool = True,
        what: str = "run",
    ) -> FaceSplits:
        how = _how(config)
        return reopen_faces(
            kept, config.dataset, root, **how, scored=scored, verify=verify, what=what
        )

    def files(
        self, parts: Mapping[str, FaceSplit], splits: FaceSplits, config: FitConfig
    ) -> FileList | None:
        return face_list(parts)

    def make_task(self, config: FitConfig, data: Any) -> Landmarks:
        """data: anything that has ``layout``."""
        own = config.landmarks
        layout = layout_for(config.dataset, data.layout.names, own)
        return Landmarks(layout, own.targets, own.sigma, own.head_width, layout.unit)

    def saved_task(self, config: FitConfig, record: Mapping[str, Sequence[str]]) -> Landmarks:
        own = config.landmarks
        layout = layout_for(config.dataset, record["landmarks"], own)
        return Landmarks(layout, own.targets, own.sigma, own.head_width, layout.unit)

    def describe(self, task: Landmarks) -> str:
        return (
            f"{task.num_outputs} landmarks ({task.targets} targets, sigma {task.bump:g} cells, "
            f"errors over {task.unit_name})"
        )

    def cached(
        self,
        splits: FaceSplits,
        config: FitConfig,
        image_size: int,
        tell: Callable[[str], None],
    ) -> FaceSplits:
        workers = default_workers() if config.workers is None else config.workers
        augment = _augment(config)
        return cache_faces(
            splits, image_size, augment, config.cache, config.cache_dir, tell, workers
        )

    def train_dataset(self, split: FaceSplit, config: FitConfig, image_size: int) -> FaceDataset:
        return FaceDataset(split, image_size, augment=_augment(config))

    def batch_changes(self, config: FitConfig, image_size: int, num_outputs: int) -> list:
        return []

    def eval_dataset(
        self, split: FaceSplit, config: FitConfig, image_size: int, crops: int = 1
    ) -> FaceDataset:
        return FaceDataset(split, image_size)

    def about(self, splits: FaceSplits) -> dict[str, Any]:
        faces = splits.test.faces
        details = {"image": [face.image for face in faces], "line": [face.line for face in faces]}
        return {"subsets": splits.subsets, "details": details}

    def targets(self, split: FaceSplit, config: FitConfig, image_size: int) -> Tensor:
        return FaceDataset(split, image_size).targets()

    def random_targets(
        self, task: Landmarks, count: int, image_size: int, draw: torch.Generator
    ) -> Tensor:
        cells = image_size // CELL
        points = torch.rand(count, task.num_outputs, 2, generator=draw) * (cells - 1)
        weight, unit = torch.ones(count, task.num_outputs, 1), cells / 2
        return torch.cat([points, weight, unit * weight], dim=2)


def _how(config: FitConfig) -> dict[str, Any]:
    own = config.landmarks
    return {
        "images": own.images,
        "validation": config.validation,
        "seed": config.trainer.seed,
        "box": own.box,
        "settings": own,
    }


def _augment(config: FitConfig) -> FaceAugment:
    own = config.landmarks
    return FaceAugment(config.flip, own.rotation, own.rotation_prob, own.scaling)
