"""The settings of a run: those of its data, its model, its losses and its training, in one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.mixup import check_even
from ..data.named import DIGITS, FACES, FOLDER
from ..data.settings import DataSettings
from ..fields import setting
from ..hub.settings import ModelSettings
from ..parallel.ranks import read_layout
from ..tasks.landmarks.settings import LandmarkSettings
from ..tasks.settings import LossSettings
from ..training import TrainerConfig
from .start import absolute
from .warm_up import read_warm_up

FALLBACKS = ("none", "fixed")
CLASSIFICATION, LANDMARKS = TASKS = ("classification", "landmarks")


@dataclass(frozen=True, kw_only=True)
class FitConfig(LossSettings, ModelSettings, DataSettings):
    """What ``hubpath fit`` trains, on what, and how; every field says what it means."""

    # Free: it decides after the training, and a finished run can still be asked to decide.
    fallback: str = setting(
        "none",
        "fixed: after the training, where always asking the best K experts is at least as good on "
        "validation images, the run keeps that in place of its router",
        choices=FALLBACKS,
        free=True,
        added=True,
    )
    trainer: TrainerConfig = setting(TrainerConfig, "of the training")
    warm_up: str | None = setting(
        None,
        "heads:E: heads and router first, the bodies frozen, by E passes over the training images",
        added=True,
        convert=read_warm_up,
    )
    start: str | None = setting(
        None,
        "file of trained heads that the experts start with, and the router and aggregator where it "
        "has them, as `hubpath shelf unfreeze SHELF` writes it",
        added=True,
        convert=absolute,
    )

    # Free: a run may go on with any number of ranks.
    parallel: str | None = setting(
        None,
        "what several ranks share out, which torchrun starts: ep, the experts; dp, none of them; "
        "DPxEP, such as 2x4, the experts in each of so many replicas; None: ep, or dp where there "
        "are more ranks than experts",
        added=True,
        free=True,
        convert=read_layout,
    )

    task: str = setting(
        CLASSIFICATION,
        "what is learned: `hubpath fit` learns classes, `hubpath landmarks fit` landmarks",
        choices=TASKS,
        added=True,
    )
    landmarks: LandmarkSettings = setting(LandmarkSettings, "of a task of landmarks")

    def check(self) -> None:
        self._check_task()
        super().check()
        if self.mixes:
            check_even(self.trainer.batch_size)
        if self.router_supervision and self.k == 1:
            raise ValueError(
                f"router_supervision: expected 0 with k=1, got {self.router_supervision}; with one "
                "active expert a sample has nothing to compare: set it to 0 or take a larger k"
            )

    def _check_task(self) -> None:
        """Raises ValueError for settings that only another task has."""
        if self.task == CLASSIFICATION:
            if self.dataset in FACES:
                raise ValueError(
                    f"dataset: {self.dataset} has landmarks and no classes; use `hubpath landmarks "
                    f"fit --dataset {self.dataset}`"
                )
            if self.landmarks != LandmarkSettings():
                changed = LandmarkSettings().to_dict()
                held = self.landmarks.to_dict()
                names = [name for name in changed if held[name] != changed[name]]
                raise ValueError(
                    f"{names[0]}: of landmarks, and this run learns classes; use `hubpath "
                    "landmarks fit`, or leave it out"
                )
            return
        if self.dataset not in (*FACES, FOLDER, DIGITS):
            raise ValueError(
                f"dataset: {self.dataset} has classes and no landmarks; expected one of "
                f"{', '.join(FACES)}, {FOLDER} (your own list) or {DIGITS}"
            )
        if self.data is None and self.dataset == FOLDER:
            raise ValueError(
                "data: nothing given; use --data faces.csv, or --dataset wflw --data-root DIR"
            )
        of_classes = {
            "crops": self.crops != 1,
            "label_smoothing": self.label_smoothing != 0,
            "mixup": self.mixup != 0,
            "cutmix": self.cutmix != 0,
            "augment": self.augment != "host",
            "start": self.start is not None,
        }
        wrong = next((name for name, given in of_classes.items() if given), None)
        if wrong is not None:
            raise ValueError(
                f"{wrong}: for classes alone, and this run learns landmarks, got "
                f"{getattr(self, wrong)}; leave it out"
            )
        if self.image_size is not None and self.image_size % 32:
            raise ValueError(
                "image_size: expected a multiple of 32, since maps have a quarter of an image's "
                f"side, got {self.image_size}"
            )

    @classmethod
    def upgrade(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"prefetch" if name == "ahead" else name: values[name] for name in values}

    def with_seed(self, seed: int) -> FitConfig:
        return self.replace(trainer=self.trainer.replace(seed=seed))

    def placed(self) -> FitConfig:
        """With the whole path of the data: who looks at a run later is in another folder."""
        if self.data is None:
            return self
        placed, images = self.replace(data=os.path.abspath(self.data)), self.landmarks.images
        if images is None:
            return placed
        own = self.landmarks.replace(images=os.path.abspath(images))
        return placed.replace(landmarks=own)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def load(cls, path: str | Path) -> FitConfig:
        """Reads a JSON file that ``to_json`` wrote."""
        try:
            values = dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no settings of a run ({error})") from error
        return cls.from_dict(values)
