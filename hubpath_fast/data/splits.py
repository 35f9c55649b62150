"""The parts of a data set: image files or arrays with their classes, and what is held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .decode import load_image
from .layouts import DataError
from .order import generator


@dataclass(frozen=True)
class ImageSplit:
    """Files and their targets: paths [n], targets [n], each a position in the splits' classes or
    whatever tensor a task has for an image, all of one shape."""

    paths: tuple[Path, ...]
    targets: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Image.Image:
        """Decodes one image to RGB; DataError that names its path if it is broken."""
        return load_image(self.paths[index])

    def subset(self, indices: Sequence[int]) -> ImageSplit:
        return ImageSplit(
            tuple(self.paths[i] for i in indices), tuple(self.targets[i] for i in indices)
        )


@dataclass(frozen=True, eq=False)
class ArraySplit:
    """Decoded images and their targets: pixels uint8 [m, H, W, 3], targets [n], indices int64 [n].

    pixels may lie in memory or be mapped from a file, and may be shared by splits: ``indices`` are
    this one's images in it; None: all, in order.
    """

    pixels: np.ndarray
    targets: tuple[Any, ...]
    indices: np.ndarray | None = None

    def __post_init__(self):
        shape, dtype = self.pixels.shape, self.pixels.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"pixels: expected uint8 [m, H, W, 3], got {dtype} {list(shape)}")
        images = len(self.pixels) if self.indices is None else len(self.indices)
        if images != len(self.targets):
            raise ValueError(f"targets: expected {images}, one an image, got {len(self.targets)}")

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index if self.indices is None else self.indices[index]])

    def subset(self, indices: Sequence[int]) -> ArraySplit:
        """Some of the images; they are not copied."""
        chosen = np.asarray(indices, dtype=np.int64)
        own = chosen if self.indices is None else self.indices[chosen]
        return ArraySplit(self.pixels, tuple(self.targets[i] for i in indices), own)


Split = ImageSplit | ArraySplit


@dataclass(frozen=True)
class ImageSplits:
    """A data set of images.

    classes: names, in the order of the targets. validation: what settings and checkpoints are
    chosen on; empty if nothing was held out. test: what figures are reported on; the same as
    validation where ``test_is_validation``. notes: what a user should be told about how the splits
    came about. parts: the splits that the data itself has, from which the others were made.
    changes: what has changed in the data since a run began with it.
    """

    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    test_is_validation: bool
    notes: tuple[str, ...]
    parts: Mapping[str, Split] = field(default_factory=dict)
    changes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def distinct(self) -> dict[str, Split]:
        """The splits by name, each image once: without test where validation stands in for it."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        if self.test_is_validation:
            del splits["test"]
        return splits


def check_share(validation: float) -> None:
    """Raises ValueError unless ``validation`` can be the held-out share of a training set."""
    if not 0 <= validation < 1:
        raise ValueError(
            f"validation: expected a share from 0 to below 1, got {validation}; 0: train on "
            "everything"
        )


def assemble(
    classes: tuple[str, ...],
    splits: dict[str, Split],
    where: str | Path,
    validation: float,
    seed: int,
    hint: str,
) -> ImageSplits:
    """The set of ``splits`` ("train", perhaps "validation" and "test"), with what is missing made.

    validation: the share of train that is held out, class by class, where there is no validation
    split; 0: none is. seed: of that draw. where: the data's place, and hint: how a user would give
    a validation split, for messages.

    Raises DataError if nothing can be held out or nothing is left to report on.
    """
    parts, splits, notes = splits, dict(splits), []
    if "validation" not in splits:
        whole = splits["train"]
        kept, held = stratified_split(whole.targets, validation, seed)
        if validation and not held:
            raise DataError(
                f"{where} has a single image a class to train on, so none can be held out for "
                f"validation; add images, or {hint}"
            )
        splits["train"], splits["validation"] = whole.subset(kept), whole.subset(held)
        notes.append(
            f"no validation split in {where}: {len(held)} of {len(whole)} training images held out "
            f"(seed {seed})"
            if validation
            else f"nothing held out of {where}: the weights of the last step are kept, unchosen"
        )
    test_is_validation = "test" not in splits
    if test_is_validation:
        if not len(splits["validation"]):
            raise DataError(
                f"{where} has no test split and nothing is held out (validation is 0), so nothing "
                "is left to report on; add a test split or hold out a share"
            )
        splits["test"] = splits["validation"]
        notes.append(
            f"no test split in {where}: results are on the validation images, on which settings "
            "and checkpoints are chosen too, and so are a little too good"
        )
    return ImageSplits(
        classes, **splits, test_is_validation=test_is_validation, notes=tuple(notes), parts=parts
    )


def stratified_split(
    targets: Sequence[int], share: float, seed: int, word: str = "hold out"
) -> tuple[list[int], list[int]]:
    """(kept, held): positions in ``targets``, ascending, with ``share`` of each class held.

    At least one image of a class is held, unless it is the class's only one or the share is 0, and
    one is always kept. word: tells draws with the same seed apart; part of every draw, so that it
    never changes.
    """
    by_class: dict[int, list[int]] = {}
    for i, target in enumerate(targets):
        by_class.setdefault(target, []).append(i)
    held = []
    for target, members in by_class.items():
        count = min(max(round(len(members) * share), 1), len(members) - 1) if share else 0
        order = torch.randperm(len(members), generator=generator(seed, word, target))
        held += [members[i] for i in order[:count].tolist()]
    chosen = set(held)
    return [i for i in range(len(targets)) if i not in chosen], sorted(held)
