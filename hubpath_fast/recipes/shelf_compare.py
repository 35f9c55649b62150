"""``hubpath shelf compare``: the routed hub beside other ways to use the same frozen models.

All of them have the same features, split and heads (those that ``shelf rank`` fits on the training
images); the hub's own heads start from these. Everything is chosen on the validation images. What
is said of them is said without the image itself where a rival learns from them (stack, kNN router,
DESlib), but the best single model, the static best and the hub were chosen by them: to be compared
are the test images.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..features import Shelf
from ..files import write_json
from ..runs.prune import LEVEL, RESAMPLES, paired_intervals
from ..shelf.heads import fit_heads
from ..shelf.rivals import HUB, CannotRun, Problem, Rival, costs, every_rival, score
from ..shelf.rivals.of_shelf import problem_of
from ..shelf.run import FOLDER, ShelfHub, has_hub
from ..shelf.save import open_hub_of

COMPARE = "compare.json"
DEFAULT_K = 2


def compare(
    shelf: str | Path,
    hub: str | Path | None = None,
    k: int | None = None,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Scores the hub and its rivals, and writes ``compare.json``.

    Args:
        shelf: the folder of a shelf.
        hub: the folder of its routed hub; None: that within the shelf, if there is one.
        k: K, the models that a rival asks about an image; None: the hub's, or 2.
        seed: of folds and draws.
        tell: is told what is being done.

    Returns what ``compare.json`` holds: ``k``, ``seed``, ``split`` that is scored, ``images`` of
    it, ``validation_images``, ``hub_models`` (None, or the number that the hub routes among), and
    ``rows``. Of each rival: name, title, bound, reason (None, or why it has no answer), chosen (by
    validation), "validation" and "test" (None, or accuracy and loss), forwards and ms of an image,
    parameters to hold, seconds, and ahead (None, or by how many points of accuracy the hub is
    better on the scored images, and the interval of that).

    Raises:
        ValueError: no shelf, one without validation images; a hub of another shelf; k out of range.
    """
    opened = Shelf.open(shelf)
    found = _open(opened, hub)
    if k is None:
        k = DEFAULT_K if found is None else found.model.k
    heads = fit_heads(opened, tell=tell)
    watched = None if found is None else found.watched
    problem = problem_of(opened, heads, k, watched, seed)
    right: dict[str, Tensor] = {}
    rows = [_row(rival, problem, right, tell) for rival in every_rival(problem, found)]
    for row in rows:
        row["ahead"] = _ahead(right, row["name"])
    result = {
        "k": k,
        "seed": seed,
        "models": len(opened.models),
        "classes": len(opened.classes),
        "split": problem.split,
        "images": len(problem.targets[problem.split]),
        "validation_images": len(problem.targets["validation"]),
        "hub": None if found is None else str(found.folder),
        "hub_models": None if found is None else len(found.models),
        "level": LEVEL,
        "resamples": RESAMPLES,
        "rows": rows,
    }
    write_json(opened.folder / COMPARE, result)
    return result


def _open(shelf: Shelf, folder: str | Path | None) -> ShelfHub | None:
    if folder is None and not has_hub(shelf.folder / FOLDER):
        return None
    return open_hub_of(shelf, folder)


def _row(rival: Rival, problem: Problem, right: dict[str, Tensor], tell: Any) -> dict[str, Any]:
    """right: is given which of the scored images the rival is right about, float64 [n]."""
    tell(f"{rival.title} ...")
    row = {"name": rival.name, "title": rival.title, "bound": rival.bound, "reason": None}
    row |= dict.fromkeys(("validation", "test", "forwards", "ms", "parameters"))
    row["chosen"] = {}
    began = time.perf_counter()
    try:
        answer = rival.answer()
    except CannotRun as reason:
        return {**row, "reason": str(reason), "seconds": None}
    except (ArithmeticError, RuntimeError) as error:  # of a solver: the others have their rows
        return {**row, "reason": f"it failed: {error}", "seconds": None}
    row["seconds"] = time.perf_counter() - began
    for split, probabilities in answer.probabilities.items():
        row[split] = score(probabilities, problem.targets[split])
    said = answer.probabilities[problem.split].argmax(-1) == problem.targets[problem.split]
    right[rival.name] = said.double() if said.dim() == 1 else said.double().mean(0)
    return {**row, **costs(answer, problem), "chosen": answer.chosen}


def _ahead(right: dict[str, Tensor], name: str) -> dict[str, Any] | None:
    """Of the hub, in points, with an interval of the same images for both."""
    if name == HUB or not {HUB, name} <= right.keys():
        return None
    differences = 100 * (right[HUB] - right[name])
    [interval] = paired_intervals(differences[None])
    return {"points": differences.mean().item(), "interval": interval}
