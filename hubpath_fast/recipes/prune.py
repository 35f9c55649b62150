"""``hubpath prune``: which experts a trained hub can do without.

Every expert is asked once about every validation image. What is lost without each expert, and which
are dropped one after another, is computed from that (see ``runs.prune``). The hub that is chosen is
then scored once on the test images, which had no part in the choice. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import write_json
from ..model import HubPathway, always_on
from ..pretrained.save import check_free, save_model
from ..runs.answers import ask
from ..runs.build import eval_batches
from ..runs.data import open_held_out
from ..runs.folder import open_run
from ..runs.prune import (
    Losses,
    check_droppable,
    check_points,
    describe,
    keep_only,
    smallest_within,
)
from .save import settings_told

PRUNE = "prune.json"
POINTS = 0.5  # that the smallest hub may lose


def prune(
    run: str | Path,
    points: float = POINTS,
    out: str | Path | None = None,
    device: str = "cpu",
    data_root: str | Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Finds the smallest hub that loses at most ``points``, and writes ``prune.json``.

    Args:
        run: the folder of a run.
        points: of the run's metric as it is shown, such as percentage points of accuracy; below 0:
            that must be gained.
        out: where the smaller hub is saved, as by ``hubpath save``; nothing is, where no expert can
            be dropped.
        data_root: where the run's data lies now.
        tell: is told what is being done.

    Returns what ``prune.json`` holds; see docs/budget.md.

    Raises:
        ValueError: no run, one without validation images or with fixed routes, one that asks all of
            its experts about every image, or data that is not what it was; a folder ``out`` of
            something else.
    """
    check_points(points)
    if out is not None:
        check_free(Path(out))
    opened = open_run(run, device)
    if out is not None:
        opened.check_apart(out)
    validation, test = open_held_out(opened, run, data_root, "experts are dropped")
    check_droppable(run, opened.model)

    def losses(split: Any, name: str) -> Losses:
        config = opened.config
        tell(f"asking {len(opened.names)} experts about {len(split)} {name} images")
        batches = eval_batches(split, config, opened.image_size, device=device)
        return Losses(ask(opened.model, batches, device, config.trainer.amp), opened.task)

    found = losses(validation, "validation")
    tell("dropping experts one after another")
    fixed = not_removable(opened.model)
    steps = found.eliminate(fixed)
    chosen = smallest_within(steps, points)
    tested = None if test is None or chosen is None else losses(test, "test")
    result = describe(found, steps, chosen, tested, points, opened.names, fixed)
    if out is not None and chosen is not None:
        keep_only(opened.model, chosen.kept)
        told = settings_told(opened, run)
        save_model(opened.model, Path(out), more=told, card=Path(out).resolve().name)
    write_json(Path(run) / PRUNE, result)  # last: it says that all is done
    return result


def not_removable(model: HubPathway) -> list[int]:
    """Experts that ``remove_expert`` refuses: that whose features the router looks at."""
    watched = always_on(model.generator)
    if watched is None:
        return []
    return [i for i, expert in enumerate(model.experts) if watched.source.module is expert]
