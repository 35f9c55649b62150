"""The settings of a run: those of its data, its model, its losses and its training, in one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.mixup import check_even
from ..data.settings import DataSettings
from ..fields import setting
from ..hub.settings import ModelSettings
from ..tasks.settings import LossSettings
from ..training import TrainerConfig
from .warm_up import read_warm_up

FALLBACKS = ("none", "fixed")


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

    def check(self) -> None:
        super().check()
        if self.mixes:
            check_even(self.trainer.batch_size)
        if self.router_supervision and self.k == 1:
            raise ValueError(
                f"router_supervision: expected 0 with k=1, got {self.router_supervision}; with one "
                "active expert a sample has nothing to compare: set it to 0 or take a larger k"
            )

    @classmethod
    def upgrade(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"prefetch" if name == "ahead" else name: values[name] for name in values}

    def with_seed(self, seed: int) -> FitConfig:
        return self.replace(trainer=self.trainer.replace(seed=seed))

    def placed(self) -> FitConfig:
        """With the whole path of the data: who looks at a run later is in another folder."""
        return self if self.data is None else self.replace(data=os.path.abspath(self.data))

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
