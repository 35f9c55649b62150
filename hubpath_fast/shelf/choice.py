"""Which models of a shelf a hub routes among.

A set for a router is one whose members know different images: it is chosen by the least loss that
any of them has on an image, not by what their mean says, nor by how good each is alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..features import Shelf
from .heads import FittedHead, fit_heads, held_out
from .model import check_choice, router_model
from .selection import greedy
from .settings import ALL, DEFAULT_EXPERTS, FITTED, ShelfFitSettings


class Routed(NamedTuple):
    """models: numbers on the shelf, in the order of the experts. heads: fitted ones that they start
    from, None: new ones. reason: how they were chosen, in words."""

    models: tuple[int, ...]
    heads: list[FittedHead] | None
    reason: str


def choose_models(
    shelf: Shelf, settings: ShelfFitSettings, tell: Callable[[str], None] = lambda _: None
) -> Routed:
    """The models that settings ask for; those that are chosen are in the order of the shelf.

    Heads are fitted where they are not kept yet. tell: is told of what takes time.

    Raises:
        ValueError: more experts than models, K above the experts, fewer training images than
            classes, a router of another form or of a model that the shelf has not.
    """
    watched = router_model(shelf, settings.router)
    candidates = [i for i in range(len(shelf.models)) if i != watched]
    count = _count(shelf, settings.experts, len(candidates), watched is not None)
    check_choice(shelf, count, settings.k)
    fitted = None
    if count < len(candidates) or settings.heads == FITTED:
        fitted = fit_heads(shelf, candidates, tell=tell)
    kept, reason = list(range(len(candidates))), "all models"
    if count < len(candidates):
        logits, targets, split = held_out(shelf, fitted, candidates)
        kept = sorted(chosen.index for chosen in greedy(logits, targets, count, "routing"))
        reason = (
            f"{count} of {len(candidates)} models, chosen in turn by the least loss that any of "
            f"them has on an image ({split} images that heads were not fitted to)"
        )
    if watched is not None:
        reason += f", without {shelf.models[watched].label}, which the router looks at"
    heads = [fitted[i] for i in kept] if settings.heads == FITTED else None
    return Routed(tuple(candidates[i] for i in kept), heads, reason)


def _count(shelf: Shelf, asked: str | None, candidates: int, watching: bool) -> int:
    """How many experts there are to be."""
    if asked == ALL:
        return candidates
    if asked is None:
        return min(DEFAULT_EXPERTS, candidates)
    if int(asked) > candidates:
        but = " beside the one that the router looks at" if watching else ""
        raise ValueError(
            f"experts: expected a number in 1..{candidates}, the models of {shelf.folder}{but}, or "
            f"all, got {asked}"
        )
    return int(asked)
