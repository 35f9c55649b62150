"""The settings of a run: a frozen dataclass that checks itself and survives a trip to JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.cache import CACHES
from ..data.named import FOLDER, find_dataset, needs_root
from ..data.splits import check_share
from ..data.transforms import CROPS
from ..executors import EXECUTORS
from ..hub.spec import expand_names
from ..training import TrainerConfig

# What may differ between two runs that count as the same: where the data lies, and what changes no
# result but by rounding.
FREE = ("data", "workers", "ahead", "cache", "cache_dir", "executor", "channels_last")

AGGREGATORS = ("linear", "mlp")
AUGMENT = ("host", "device")


@dataclass(frozen=True)
class FitConfig:
    """What ``hubpath fit`` trains, on what, and how.

    data: a folder of images (see ``hubpath_fast.data.open_images`` for its layouts), or the folder
        that ``dataset`` lies in; None for one that lies in none.
    hub: model names, such as "resnet50.a1_in1k"; one may occur more than once. The name of a hub,
        such as "tiny", is replaced by the names of its experts.
    dataset: what ``data`` holds: "folder", a user's own images, or a set of ``data.DATASETS``.
    pretrained: start from the weights the names stand for; False: random weights, no network.
    k: K, active experts per sample. min_group: see ``HubPathway``.
    image_size: pixels a side; None: what most models of the hub were pre-trained at.
    flip, min_area: of the augmentation: mirror half of the images; the least share of an image that
        a random crop keeps.
    augment: where images are cropped and flipped: "host", one by one by the processes that decode,
        or "device", the whole batch at once where the model is.
    validation: share of train held out, class by class, where the data has no validation split; 0:
        train on everything and keep the weights of the last step.
    crops: 5 or 10: report the test accuracy over that many crops of each image, too; 1: do not.
    workers: processes that decode images; None: as many as there are cores to spare. ahead: batches
        that each decodes ahead.
    cache, cache_dir: keep decoded images, "memory" or "disk", there; see ``data.cache_splits``.
    head_init: standard deviation of the new heads' weights, drawn from a normal distribution, with
        biases at 0; None: as each network initialises its own.
    explore: lambda, the weight of the exploration loss. label_smoothing: of the cross-entropy.
    aggregator: "linear" (starts as the weighted sum) or "mlp".
    generator_width, generator_stride: see ``PathwayGenerator``; stride None: by image size.
    renormalize: divide the K weights by their sum (not in the paper).
    executor: what runs the experts, see ``HubPathway``. channels_last: keep convolutions' weights,
        and so their rows, with the channels last in memory, which convolutions are faster in.
    trainer: optimizer, schedule, rates, steps, precision, seed, device: see ``TrainerConfig``.
    """

    data: str | None
    hub: tuple[str, ...]
    dataset: str = FOLDER
    pretrained: bool = True
    k: int = 2
    min_group: int = 2
    image_size: int | None = None
    flip: bool = True
    min_area: float = 0.08
    augment: str = "host"
    validation: float = 0.15
    crops: int = 1
    workers: int | None = 2
    ahead: int = 4
    cache: str = "none"
    cache_dir: str | None = None
    head_init: float | None = None
    explore: float = 0.5
    label_smoothing: float = 0.0
    aggregator: str = "linear"
    generator_width: int = 16
    generator_stride: int | None = None
    renormalize: bool = False
    executor: str = "auto"
    channels_last: bool = True
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hub", expand_names(self.hub))
        object.__setattr__(self, "dataset", find_dataset(self.dataset))
        if self.data is None and needs_root(self.dataset):
            raise ValueError(
                "data: nothing given; use --data FOLDER, or --dataset NAME --data-root DIR"
            )
        check_share(self.validation)
        if not self.hub:
            raise ValueError("hub: expected at least one model name, got none")
        if not 1 <= self.k <= len(self.hub):
            raise ValueError(
                f"k: expected an integer in 1..{len(self.hub)} (the experts), got {self.k}"
            )
        for name, allowed in (
            ("aggregator", AGGREGATORS),
            ("crops", CROPS),
            ("cache", CACHES),
            ("augment", AUGMENT),
            ("executor", EXECUTORS),
        ):
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
        lowest = {
            "explore": 0,
            "label_smoothing": 0,
            "workers": 0,
            "min_group": 1,
            "ahead": 1,
            "head_init": 0,
        }
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}: expected at least {low}, got {value}")
        for name in ("image_size", "generator_stride", "generator_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value}")

    @property
    def data_name(self) -> str:
        """What the data is called: a set's name, or that of the user's folder."""
        return Path(self.data).name if self.dataset == FOLDER else self.dataset

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as JSON takes them."""
        values = dataclasses.asdict(self)
        return {**values, "hub": list(self.hub), "trainer": self.trainer.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FitConfig:
        """The inverse of ``to_dict``; an unknown key is a ValueError with the closest names."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or known
                raise ValueError(f"unknown setting {key!r}; closest: {', '.join(close)}")
        trainer = TrainerConfig.from_dict(values.get("trainer", {}))
        return cls(**{"data": None, **values, "trainer": trainer})

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def load(cls, path: str | Path) -> FitConfig:
        """Reads a JSON file that ``to_json`` wrote."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} holds no settings of a run ({error})") from error
        return cls.from_dict(values)
