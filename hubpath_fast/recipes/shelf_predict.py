"""``hubpath shelf predict``: what a routed hub of frozen bodies says of images.

An image is decoded once, and cut for every size that a body of the hub works at. Answers come
together, of as many images as ``MEMORY`` holds, since each body is opened once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from ..data.given import Given
from ..data.transforms import eval_transform
from ..devices import check_device
from ..features.pixels import router_transform
from ..model.expert_major import MEMORY
from ..runs.measure import weights_of
from ..shelf.predict import ShelfPredictor
from ..shelf.run import ShelfHub
from ..shelf.save import open_hub_of
from .predict import Prediction, answered, decoded


def open_predictor(
    shelf: str | Path, hub: str | Path | None = None, device: str = "cpu"
) -> tuple[ShelfHub, ShelfPredictor]:
    """A shelf's hub, opened to predict. hub: its folder; None: SHELF/hub.

    Raises ValueError: no shelf, no hub, a hub of other features, a device that is not there.
    """
    check_device(device)
    opened = open_hub_of(shelf, hub)
    return opened, ShelfPredictor(opened, device)


def predict_each(
    hub: ShelfHub,
    predictor: ShelfPredictor,
    images: Iterable[str | Path | Given],
    workers: int = 0,
    memory: int = MEMORY,
) -> Iterator[Prediction]:
    """Classifies images, in the order given; one that cannot be read, or whose features are no
    finite numbers, has its ``error``, and the others are answered.

    images, workers: as of ``recipes.predict.predict_each``. memory: bytes of decoded images and of
    features that are held at a time.

    Raises ValueError or HubError for a body that cannot be opened any more, or is another.
    """
    decoding = decoded(images, _cut(predictor), workers)
    while part := list(islice(decoding, _images_at_once(predictor, memory))):
        read = [cuts for _, cuts in part if not isinstance(cuts, str)]
        part = [(given, cuts if isinstance(cuts, str) else None) for given, cuts in part]
        answers: Iterator[tuple[Tensor, Tensor, str | None]] = iter(())
        if read:
            outputs, routing, failed = predictor.predict(*_stacked(read, predictor))
            why = map(failed.get, range(len(outputs)))
            answers = zip(hub.task.predict(outputs), weights_of(routing), why, strict=True)
        for given, error in part:
            if error is not None:
                yield Prediction(given, error=error)
                continue
            *answer, error = next(answers)
            if error is not None:
                yield Prediction(given, error=f"{given}: {error}")
            else:
                yield answered(given, *answer, hub.shelf.classes, hub.labels)


def sentence(predictor: ShelfPredictor) -> str:
    """What was run, in words."""
    run = predictor.forwards
    text = f"{run.experts:,} expert forwards of {run.images:,} images, {predictor.model.k} an image"
    if run.watched is not None:
        text += f", and {run.router:,} of {run.watched}, which the router looks at"
    return f"{text}; {run.opened:,} bodies opened, one at a time"


def _cut(predictor: ShelfPredictor) -> Callable[[Image], list[Tensor]]:
    """Decoded image -> uint8 [3, S, S] of each size, and last the router's where it looks at
    pixels."""
    transforms = [eval_transform(size) for size in predictor.sizes]
    if predictor.router_size is not None:
        crop = predictor.shelf.record.router_crop or predictor.router_size
        transforms.append(router_transform(crop, predictor.router_size))
    return lambda image: [transform(image) for transform in transforms]


def _stacked(
    cuts: list[list[Tensor]], predictor: ShelfPredictor
) -> tuple[dict[int, Tensor], Tensor | None]:
    """What ``ShelfPredictor.predict`` takes; the list is empty then, so that no image is in memory
    twice for long."""
    stacks = [torch.stack(stack) for stack in zip(*cuts, strict=True)]
    cuts.clear()
    pixels = stacks.pop() if predictor.router_size is not None else None
    return dict(zip(predictor.sizes, stacks, strict=True)), pixels


def _images_at_once(predictor: ShelfPredictor, memory: int) -> int:
    """How many images fit, with what an image's K experts say of it."""
    sides = [*predictor.sizes, predictor.router_size or 0]
    row = 4 * max(model.num_features for model in predictor.bodies)
    held = 2 * sum(3 * side**2 for side in sides) + predictor.model.k * row
    return max(1, memory // held)
