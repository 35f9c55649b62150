"""The rivals' problem, made of a shelf and the heads that were fitted on its training images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ...features import Shelf
from ..heads import FittedHead, outputs
from ..selection import own_losses
from .problem import Look, Problem

UNKNOWN = float("nan")


def problem_of(
    shelf: Shelf, heads: Sequence[FittedHead], k: int, watched: int | None = None, seed: int = 0
) -> Problem:
    """The problem of all models of a shelf.

    heads: of all of them. watched: the model whose features a router may look at; None: that whose
    head loses the least on the validation images.

    Raises ValueError: no validation images, k above the models.
    """
    models = range(len(shelf.models))
    splits = {name: numbers for name, numbers in shelf.splits.items() if name != "train"}
    if shelf.record.test_is_validation:  # then both names are of the same images
        splits["test"] = splits["test"][:0]
    log_probs = {
        name: outputs(shelf, heads, numbers, models).log_softmax(-1)
        for name, numbers in splits.items()
    }
    classes = len(shelf.classes)
    train = shelf.targets[shelf.splits["train"]]
    losses = own_losses([head.out_of_fold for head in heads], train)
    sizes = [
        UNKNOWN if m.parameters is None else m.parameters + (m.num_features + 1) * classes
        for m in shelf.models
    ]
    problem = Problem(
        labels=shelf.labels,
        log_probs=log_probs,
        targets={name: shelf.targets[numbers] for name, numbers in splits.items()},
        k=k,
        looks=(),
        parameters=torch.tensor(sizes, dtype=torch.float64),
        ms=torch.tensor([UNKNOWN if m.ms is None else m.ms for m in shelf.models]).double(),
        train_losses=losses.float().T.contiguous(),
        seed=seed,
    )
    if watched is None:
        watched = int(problem.losses("validation").mean(0).argmin())
    return dataclasses.replace(problem, looks=tuple(looks(shelf, watched)))


def looks(shelf: Shelf, watched: int) -> list[Look]:
    """The image, where the shelf has its pixels, and the features of one model."""
    title = f"the features of {shelf.labels[watched]}"
    found = [Look(title, _by_split(shelf, shelf.features(watched)[0]), watched)]
    pixels = shelf.pixels()
    if pixels is not None:
        found.insert(0, Look("the image", _by_split(shelf, pixels[0])))
    return found


def _by_split(shelf: Shelf, rows: Tensor) -> dict[str, Tensor]:
    """[n, F] float32 of each split, of rows [n, ...] of view 0."""
    return {name: rows[numbers].float().flatten(1) for name, numbers in shelf.splits.items()}
