"""``hubpath predict``: what a trained run says of images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from PIL.Image import Image
from torch import Tensor

from ..data import DataError, load_image
from ..data.given import Given
from ..data.transforms import eval_transform
from ..runs import measure
from ..runs.config import CLASSIFICATION
from ..runs.folder import Run, open_run

BATCH = 32  # images at a time, so that a thousand files do not need a thousand images of memory
AHEAD = 2 * BATCH  # images that are decoded in advance
T = TypeVar("T")


@dataclass(frozen=True)
class Prediction:
    """What a run says of an image.

    given: its path, as it was given. label, probability: the likeliest class. experts: who spoke
    with what weight, largest first. error: why the image could not be read; then the fields before
    are None or empty. probabilities: of all classes in their order, float32 [C].
    """

    given: str
    label: str | None = None
    probability: float | None = None
    experts: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    probabilities: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def path(self) -> Path:
        return Path(self.given)


def predict(
    run: str | Path, images: Sequence[str | Path], device: str = "cpu", workers: int = 0
) -> list[Prediction]:
    """Classifies image files with a run's best checkpoint.

    workers: threads that decode; 0: decode here.

    Raises:
        ValueError: no run in the folder; a file that is missing or no image (by path).
    """
    if not images:
        raise ValueError("images: expected at least one file, got none")
    opened, found = open_run(run, device, CLASSIFICATION), []
    for prediction in predict_each(opened, images, workers):
        if prediction.error is not None:
            raise DataError(prediction.error)
        found.append(prediction)
    return found


def predict_each(
    run: Run, images: Iterable[str | Path | Given], workers: int = 0, expert_major: bool = False
) -> Iterator[Prediction]:
    """Classifies images one batch after another; one that cannot be read has its ``error``, and
    the others are answered. In the order given, and never more than a few batches in memory.

    run: of ``open_run``. images: paths, or what ``find_images`` made of them. workers: see
    ``predict``. expert_major: expert by expert, over as many images as ``images_at_once`` says,
    which are answered together.
    """
    device = str(run.device)
    task, names = run.task, run.names
    size = measure.images_at_once(run.model, task, run.image_size) if expert_major else BATCH
    decoding = decoded(images, eval_transform(run.image_size), workers)
    while part := list(islice(decoding, size)):
        read = [image for _, image in part if isinstance(image, Tensor)]
        part = [(given, image if isinstance(image, str) else None) for given, image in part]
        answers: Iterator[tuple[Tensor, Tensor]] = iter(())
        if read:
            # As fit and evaluate do it, the precision included.
            amp = run.config.trainer.amp
            found = measure.predict(run.model, task, stacked(read), device, amp, expert_major)
            answers = zip(*found, strict=True)
        for given, error in part:
            if error is not None:
                yield Prediction(given, error=error)
                continue
            yield answered(given, *next(answers), run.classes, names)


def answered(
    given: str, probabilities: Tensor, weights: Tensor, classes: Sequence[str], names: Sequence[str]
) -> Prediction:
    """What is said of an image. probabilities: [C]. weights: [M], 0 of an expert that was not
    asked."""
    best = int(probabilities.argmax())
    asked = [i for i in weights.argsort(descending=True).tolist() if weights[i] > 0]
    spoke = {names[i]: weights[i].item() for i in asked}
    return Prediction(given, classes[best], probabilities[best].item(), spoke, None, probabilities)


def stacked(images: list[Tensor], size: int = BATCH) -> Iterator[tuple[Tensor, None]]:
    """Batches of images, which leave the list: none of them is in memory twice."""
    while images:
        batch = torch.stack(images[:size])
        del images[:size]
        yield batch, None


def decoded(
    images: Iterable[str | Path | Given], transform: Callable[[Image], T], workers: int
) -> Iterator[tuple[str, T | str]]:
    """(path, what ``transform`` makes of the image, or why there is none), in order."""

    def read(item: str | Path | Given) -> tuple[str, T | str]:
        path, problem = item if isinstance(item, Given) else (str(item), None)
        if problem is not None:
            return path, f"{path}: {problem}"
        try:
            return path, transform(load_image(path))
        except DataError as error:
            return path, str(error)
        except Exception as error:  # a file may break a decoder in ways that nobody foresaw
            return path, f"cannot read the image {path} ({str(error) or type(error).__name__})"

    if workers < 0:
        raise ValueError(f"workers: expected an integer of at least 0, got {workers}")
    if workers == 0:
        yield from map(read, images)
        return
    pool, begun, left = ThreadPoolExecutor(workers), deque(), iter(images)
    try:
        begun.extend(pool.submit(read, item) for item in islice(left, AHEAD))
        while begun:
            yield begun.popleft().result()
            begun.extend(pool.submit(read, item) for item in islice(left, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
