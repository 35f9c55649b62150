"""Which experts a routed hub of a shelf can do without: ``runs.prune``, on cached features.

Every expert is asked about every validation image, which is a product on its features; each smaller
hub is computed from that. What is proposed is scored once on the test images.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..model import NewcomerGenerator
from ..runs.answers import HubAnswers, ask, check_memory
from ..runs.prune import (
    Losses,
    check_droppable,
    check_points,
    describe,
    keep_only,
    smallest_within,
)
from .run import ShelfHub

BATCH = 256  # images that all experts are asked about at a time


def prune_hub(
    hub: ShelfHub, points: float, tell: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, Any], tuple[int, ...] | None]:
    """The smallest hub that loses at most so many percentage points of accuracy.

    Args:
        hub: it stays as it is.
        points: on validation images; below 0: that must be gained.
        tell: is told what is being done.

    Returns:
        (what ``runs.prune.describe`` says of it; the experts that are kept, None: none can go).

    Raises:
        ValueError: a hub without an expert to spare, or that a newcomer has joined; a shelf without
            validation images; points that no accuracy can differ by.
    """
    check_points(points)
    if not -100 < points <= 100:
        raise ValueError(
            f"points: expected percentage points above -100 and up to 100, got {points:g}; more "
            "can be neither gained nor lost"
        )
    check_droppable(hub.folder, hub.model)
    if isinstance(hub.model.generator, NewcomerGenerator):
        raise ValueError(
            f"{hub.folder}: a newcomer takes the place of others, so what is lost without these is "
            "not known; prune the hub that it was added to, then add it again"
        )
    if not len(hub.shelf.splits["validation"]):
        raise ValueError(
            f"{hub.shelf.folder} has no validation images, on which experts are dropped; extract "
            "a shelf of data with some"
        )

    def losses(split: str) -> Losses:
        numbers = hub.shelf.splits[split]
        tell(f"asking {len(hub.models)} experts about {len(numbers)} {split} images")
        return Losses(answers_of(hub, numbers), hub.task)

    found = losses("validation")
    tell("dropping experts one after another")
    steps = found.eliminate()
    chosen = smallest_within(steps, points)
    record = hub.shelf.record
    has_test = record.sizes[2] and not record.test_is_validation
    tested = losses("test") if chosen is not None and has_test else None
    result = describe(found, steps, chosen, tested, points, hub.labels)
    return result, None if chosen is None else chosen.kept


def batches_of(hub: ShelfHub, numbers: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Images by their numbers [n], as evaluation sees them, and their targets."""
    return [(part.double(), hub.shelf.targets[part]) for part in numbers.split(BATCH)]


def answers_of(hub: ShelfHub, numbers: Tensor) -> HubAnswers:
    """What a hub says of images [n]. Raises ValueError where memory does not suffice."""
    room = functools.partial(check_memory, images=len(numbers))
    return ask(hub.model, batches_of(hub, numbers), "cpu", room=room)


def smaller(hub: ShelfHub, kept: tuple[int, ...]) -> ShelfHub:
    """A hub of the experts ``kept`` alone; ``hub.model`` becomes its model."""
    keep_only(hub.model, kept)
    models = tuple(hub.models[i] for i in kept)
    return dataclasses.replace(hub, models=models)
