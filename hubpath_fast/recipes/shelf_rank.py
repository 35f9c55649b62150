"""``hubpath shelf rank``: the models of a shelf in order, and sets of them that belong together."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..features import Shelf
from ..files import write_json
from ..shelf.heads import FittedHead, Tell, held_out
from ..shelf.logistic import FOLDS
from ..shelf.ranking import BEST, SCORES, TOP, YARDSTICK, Ranked, agreements, ordered
from ..shelf.ranking import rank as rank_models
from ..shelf.selection import OBJECTIVES, Budget, greedy

RANK = "rank.json"
OF_SOURCE_HEADS = ("leep", "nce")  # scores that need one
MODELS = 16  # of a set, where no budget is given


def rank(
    folder: str | Path,
    by: str | None = None,
    linear: bool = True,
    budget: Budget | None = None,
    seed: int = 0,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Ranks all models of a shelf, chooses sets of them, and writes ``rank.json``.

    Args:
        folder: of the shelf.
        by: what models are sorted by, of ``SCORES`` or "linear"; None: that, and without heads
            "log_me".
        linear: fit heads, which are kept on the shelf. Without them there is no yardstick, and no
            set is chosen.
        budget: of the sets; None: 16 models.
        seed: of the heads' cross-validation.
        tell: is told what is being done.

    Returns what ``rank.json`` holds; see docs/shelf.md.

    Raises:
        ValueError: no shelf; fewer training images than classes; a score that no model has; a
            budget without heads, that no model fits, or of what is not known of the models.
    """
    began = time.perf_counter()
    if budget is not None and not linear:
        given = [name for name, value in asdict(budget).items() if value is not None]
        options = " and ".join(f"--{name}" for name in given)
        raise ValueError(
            f"{given[0]}: expected no budget with --no-linear, since sets are chosen by linear "
            f"heads; leave out {options}, or --no-linear"
        )
    shelf = Shelf.open(folder)
    by = check_by(shelf, by, linear)
    rows, heads = rank_models(shelf, linear, seed, tell)
    result = {
        "by": by,
        "seed": seed,
        "images": len(shelf.splits["train"]),
        "folds": min(FOLDS, len(shelf.splits["train"])) if linear else None,
        "classes": len(shelf.classes),
        "models": [
            _row(shelf, place, row, heads) for place, row in enumerate(ordered(rows, by), 1)
        ],
        "best": BEST,
        "top": TOP,
        "agreement": {name: asdict(found) for name, found in agreements(rows).items()},
        "sets": _sets(shelf, heads, budget, tell) if linear else None,
    }
    result["seconds"] = time.perf_counter() - began
    write_json(shelf.folder / RANK, result)
    return result


def has_linear(folder: str | Path) -> bool:
    """Whether ``rank.json`` of a shelf is a ranking with linear heads."""
    try:
        return bool(json.loads((Path(folder) / RANK).read_text(encoding="utf-8"))["agreement"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or not ours: it is written anew
        return False


def check_by(shelf: Shelf, by: str | None, linear: bool) -> str:
    """What to sort by; ValueError for what no model will have."""
    every = (YARDSTICK, *SCORES)
    if by is None:
        return YARDSTICK if linear else "log_me"
    if by not in every:
        raise ValueError(f"by: expected one of {', '.join(every)}, got {by!r}")
    if by == YARDSTICK and not linear:
        raise ValueError(
            f"by: expected one of {', '.join(SCORES)} with --no-linear, got {by!r}; leave out one"
        )
    if by in OF_SOURCE_HEADS and not any(model.source_classes for model in shelf.models):
        others = ", ".join(name for name in every if name not in OF_SOURCE_HEADS)
        raise ValueError(
            f"by: expected one of {others}, since no model on the shelf has the head that it was "
            f"pre-trained with, got {by!r}"
        )
    return by


def _row(shelf: Shelf, place: int, row: Ranked, heads: Sequence[FittedHead]) -> dict[str, Any]:
    model = shelf.models[row.index]
    return {
        "rank": place,
        "label": model.label,
        "name": model.name,
        "scores": dict(row.scores),
        "seconds": dict(row.seconds),
        "loss": row.loss,
        "decay": heads[row.index].decay if heads else None,
        "features": model.num_features,
        "parameters": model.parameters,
        "ms": model.ms,
    }


def _sets(
    shelf: Shelf, heads: Sequence[FittedHead], budget: Budget | None, tell: Tell
) -> dict[str, Any]:
    tell("choosing sets")
    budget = Budget(min(MODELS, len(heads))) if budget is None else budget
    logits, targets, split = held_out(shelf, heads, range(len(heads)))
    found: dict[str, Any] = {"split": split, "images": len(targets), "budget": asdict(budget)}
    found["best"] = {}
    for objective in OBJECTIVES:
        chosen = greedy(logits, targets, budget, objective, shelf.models)
        losses = [c.loss for c in chosen]
        found["best"][objective] = losses.index(min(losses)) + 1
        found[objective] = [{"label": shelf.models[c.index].label, **asdict(c)} for c in chosen]
    return found
