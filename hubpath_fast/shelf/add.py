"""One more model of the shelf joins its routed hub, which stays as it is.

Its head is fitted on the training images, as those of the others were, and then its score, a linear
map of what the router makes its scores of, on validation images (``runs.calibrate``): of training
images the hub is too sure to be helped. Other validation images choose, and others are reported on.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data.splits import stratified_split
from ..model import NewcomerGenerator
from ..runs.calibrate import CHOSEN, REPORTED, Seen, apply, calibrate
from ..runs.measure import predict
from .heads import fit_heads
from .model import join, start_from
from .prune import answers_of, batches_of
from .run import ShelfHub

STEPS = 500


class NothingBetter(ValueError):
    """The newcomer makes nothing better on the images that choose."""


def add_model(
    hub: ShelfHub,
    index: int,
    steps: int = STEPS,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], ShelfHub]:
    """Fits a newcomer's head and its score.

    Args:
        hub: it stays as it is.
        index: of the newcomer on the hub's shelf.
        steps: of the fit of the score.
        seed: of the draws, of images to choose on and of those of a step.
        tell: is told what is being done.

    Returns:
        (what ``add.json`` holds, see ``recipes.shelf_add``; the larger hub).

    Raises:
        ValueError: as of ``check_new``; too few validation images; NothingBetter.
    """
    check_new(hub, index)
    began = time.perf_counter()
    shelf, label = hub.shelf, hub.shelf.models[index].label
    fit, choose, report, reported = _groups(hub, seed)
    tell(f"fitting the head of {label} on {len(shelf.splits['train'])} training images")
    [head] = fit_heads(shelf, [index])
    tell(
        f"asking {len(hub.models)} experts about {len(fit)} validation images to fit on and "
        f"{len(choose)} to choose on"
    )
    seen = [_look(hub, index, numbers) for numbers in (fit, choose)]
    tell(f"fitting the score of {label}, {steps} steps")
    model = copy.deepcopy(hub.model)
    expert = join(model, shelf, index)
    start_from(expert, head)
    found = calibrate(*seen, expert.layer, hub.task, steps, seed, fit_head=False)
    if found is None:
        raise NothingBetter(
            f"name: {label} makes nothing better on the {len(choose)} validation images to choose "
            "on, so no hub was saved; take another model"
        )
    apply(model, expert.layer, found)
    larger = dataclasses.replace(hub, model=model.eval(), models=(*hub.models, index))
    group, unchanged = _compared(hub, larger, report)
    result = {
        "expert": label,
        "head_accuracy": head.accuracy,
        "groups": [{"name": "the shelf's", "split": reported, **group}],
        "fit_images": len(fit),
        "choose_images": len(choose),
        "loss": {"before": found.before, "after": found.after},
        "steps": steps,
        "seconds": time.perf_counter() - began,
        "unchanged": unchanged,
    }
    return result, larger


def check_new(hub: ShelfHub, index: int) -> None:
    """Raises ValueError for a model that is in the hub already, or that its router looks at."""
    label = hub.shelf.models[index].label
    if index in hub.models:
        raise ValueError(
            f"name: {label} is an expert of the hub in {hub.folder} already; give another model"
        )
    if index == hub.watched:
        raise ValueError(
            f"name: the router of the hub in {hub.folder} looks at the features of {label}, so it "
            "can be no expert of it; give another model"
        )


def _groups(hub: ShelfHub, seed: int) -> tuple[Tensor, Tensor, Tensor, str]:
    """Images to fit on, to choose on and to report on, and what the last ones are called. Raises
    ValueError."""
    shelf = hub.shelf
    held, report, reported = shelf.splits["validation"], shelf.splits["test"], "test"
    if shelf.record.test_is_validation or not len(report):
        held, report = _drawn(hub, held, REPORTED, seed, "newcomer reported")
        reported = "held back"
    fit, choose = _drawn(hub, held, CHOSEN, seed, "newcomer chosen")
    if not all(len(part) for part in (fit, choose, report)):
        raise ValueError(
            f"{shelf.folder} has {len(shelf.splits['validation'])} validation images, too few to "
            "fit, choose and report on; extract a shelf with at least 3 of a class"
        )
    return fit, choose, report, reported


def _drawn(
    hub: ShelfHub, numbers: Tensor, share: float, seed: int, word: str
) -> tuple[Tensor, Tensor]:
    kept, held = stratified_split(hub.shelf.targets[numbers].tolist(), share, seed, word)
    return numbers[kept], numbers[held]


@torch.no_grad()
def _look(hub: ShelfHub, index: int, numbers: Tensor) -> Seen:
    answers, outer = answers_of(hub, numbers), hub.model.generator
    generator = outer.generator if isinstance(outer, NewcomerGenerator) else outer
    features = [generator.features(generator.seen(x)) for x, _ in batches_of(hub, numbers)]
    inputs = hub.shelf.features(index)[0][numbers].float()
    group = torch.zeros(len(numbers), dtype=torch.int64)
    return Seen(answers, torch.cat(features), inputs, answers.predict(), group)


def _compared(
    hub: ShelfHub, larger: ShelfHub, numbers: Tensor
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(accuracy before and after, and the share of images that go to the newcomer; of the others,
    by themselves, how many there are and by how much a probability changed at most)."""
    task, targets = hub.task, hub.shelf.targets[numbers]

    def said(of: ShelfHub, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return predict(of.model, task, batches_of(hub, numbers), "cpu")

    old, (new, weights) = said(hub, numbers)[0], said(larger, numbers)
    sent = weights[:, -1] > 0
    before, after = (task.scores(each, targets).mean().item() for each in (old, new))
    group = {
        "images": len(numbers),
        "before": before,
        "after": after,
        "share": sent.double().mean().item(),
    }
    others, change = numbers[~sent], 0.0
    if len(others):
        change = (said(larger, others)[0] - said(hub, others)[0]).abs().max().item()
    return group, {"images": len(others), "largest_change": change}
