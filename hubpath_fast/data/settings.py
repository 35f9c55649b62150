"""What a run learns from: the settings of its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..fields import Settings, setting
from .cache import CACHES
from .images import PREFETCH
from .named import DIGITS, FOLDER, find_dataset
from .transforms import CROPS


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Which images, what is held out, and how they get to the model."""

    data: str | None = setting(
        None,
        "folder with train/ (val/, test/) or train.txt, or the folder that the named set lies in",
        free=True,
        convert=str,
    )
    dataset: str = setting(
        FOLDER,
        "a set of `hubpath data list`, such as cars (its folder: --data-root DIR); folder: your "
        "own images",
        convert=find_dataset,
    )
    image_size: int | None = setting(
        None, "pixels a side; None: what most models of the hub were pre-trained at", low=8
    )
    flip: bool = setting(True, "mirror half of the training images")
    min_area: float = setting(
        0.08, "least share of an image that a random crop keeps", above=0, high=1
    )
    augment: str = setting(
        "host",
        "where images are cropped and flipped: one by one where they are decoded, or by batch on "
        "the device; none: nowhere, and training sees them as evaluation does",
        choices=("host", "device", "none"),
    )
    validation: float = setting(
        0.15,
        "share of train held out, class by class, where the data has no validation split; 0: train "
        "on everything and keep the weights of the last step",
        low=0,
        below=1,
    )
    crops: int = setting(
        1, "5 or 10: report the test result over that many crops of each image, too",
        choices=CROPS, free=True,
    )  # fmt: skip
    workers: int | None = setting(
        2,
        "processes that decode images; None: as many as there are cores to spare",
        low=0,
        free=True,
    )
    prefetch: int = setting(PREFETCH, "batches that each of them prefetches", low=1, free=True)
    cache: str = setting("none", "where decoded images are kept", choices=CACHES, free=True)
    cache_dir: str | None = setting(
        None, "folder of cache=disk; None: the user's cache folder", free=True
    )

    @property
    def data_name(self) -> str:
        """What the data is called: a set's name, or that of the user's folder."""
        return Path(self.data).name if self.dataset == FOLDER else self.dataset

    def check(self) -> None:
        super().check()
        if self.data is None and self.dataset == FOLDER:
            raise ValueError(
                "data: nothing given; use --data FOLDER, or --dataset NAME --data-root DIR"
            )
        if self.data is None and self.dataset != DIGITS:
            raise ValueError(
                f"data: the data set {self.dataset} lies in a folder, and none is given; add "
                "--data-root DIR"
            )
